//! Files that tell programs in the guest who it is, for the two families of clients.

use std::fs;
use std::path::Path;

use super::BootError;
use crate::environment::Identity;

/// Directories and the prefix of the files in them.
const FAMILIES: [(&str, &str); 2] = [("/run/wrenn", "WRENN"), ("/run/e2b", "E2B")];

/// Writes what is known about the sandbox.
///
/// # Errors
/// [`BootError::File`] names the file.
pub fn publish(identity: &Identity) -> Result<(), BootError> {
    for (directory, family) in FAMILIES {
        fs::create_dir_all(directory).map_err(BootError::file("create", directory))?;
        let mark = Some("true".to_owned());
        for (name, value) in [
            ("SANDBOX", &mark),
            ("SANDBOX_ID", &identity.sandbox_id),
            ("TEMPLATE_ID", &identity.template_id),
        ] {
            let Some(value) = value else { continue };
            let path = Path::new(directory).join(format!(".{family}_{name}"));
            fs::write(&path, value).map_err(BootError::file("write", path.to_string_lossy()))?;
        }
    }
    Ok(())
}
