//! Loads the kernel modules the initramfs brings along, in the order it lists them.

use std::fs::{self, File};
use std::path::Path;

use super::BootError;
use crate::sys;

/// Where the initramfs keeps them.
const DIRECTORY: &str = "/modules";
/// Their names, one a line, in load order.
const ORDER: &str = "order";

/// Loads all modules. An initramfs without any is fine: the kernel may have everything built in.
///
/// # Errors
/// [`BootError::File`] names the module that is missing or refused.
pub fn load_all() -> Result<(), BootError> {
    let order = Path::new(DIRECTORY).join(ORDER);
    if !order.exists() {
        return Ok(());
    }
    let names = fs::read_to_string(&order);
    let names = names.map_err(BootError::file("read", order.to_string_lossy()))?;
    for name in names.lines().map(str::trim).filter(|name| !name.is_empty()) {
        let path = Path::new(DIRECTORY).join(name);
        let shown = path.to_string_lossy();
        let file = File::open(&path).map_err(BootError::file("open module", shown.clone()))?;
        sys::load_module(&file).map_err(BootError::file("load module", shown))?;
    }
    // Their memory is the guest's from here on.
    let _ = fs::remove_dir_all(DIRECTORY);
    Ok(())
}
