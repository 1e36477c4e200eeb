//! Extended attributes of open files.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;

use super::check;

/// Names of the extended attributes of an open file.
///
/// # Errors
/// What the kernel said, `Unsupported` on a file system without attributes.
pub fn list_attributes(file: impl AsFd) -> io::Result<Vec<OsString>> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the buffer is valid for the length that is passed with it.
    let names = read_growing(|buffer, room| unsafe { libc::flistxattr(fd, buffer.cast(), room) })?;
    let names = names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    Ok(names
        .map(|name| OsStr::from_bytes(name).to_owned())
        .collect())
}

/// The value of one extended attribute of an open file.
///
/// # Errors
/// What the kernel said.
pub fn get_attribute(file: impl AsFd, name: &OsStr) -> io::Result<Vec<u8>> {
    let (fd, name) = (file.as_fd().as_raw_fd(), CString::new(name.as_bytes())?);
    // SAFETY: `name` is a C string; the buffer is valid for the length passed with it.
    read_growing(|buffer, room| unsafe { libc::fgetxattr(fd, name.as_ptr(), buffer.cast(), room) })
}

/// Sets one extended attribute of an open file.
///
/// # Errors
/// What the kernel said.
pub fn set_attribute(file: impl AsFd, name: &OsStr, value: &[u8]) -> io::Result<()> {
    let name = CString::new(name.as_bytes())?;
    // SAFETY: `name` is a C string, `value` is valid for its length.
    check(unsafe {
        libc::fsetxattr(
            file.as_fd().as_raw_fd(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    })
}

/// Removes one extended attribute of an open file.
///
/// # Errors
/// What the kernel said.
pub fn remove_attribute(file: impl AsFd, name: &OsStr) -> io::Result<()> {
    let name = CString::new(name.as_bytes())?;
    // SAFETY: `name` is a C string.
    check(unsafe { libc::fremovexattr(file.as_fd().as_raw_fd(), name.as_ptr()) })
}

/// Asks a call for its size, then for its content, until both agree.
fn read_growing(call: impl Fn(*mut u8, usize) -> isize) -> io::Result<Vec<u8>> {
    loop {
        let size = call(std::ptr::null_mut(), 0);
        let size = usize::try_from(size).map_err(|_| io::Error::last_os_error())?;
        let mut buffer = vec![0; size];
        let filled = call(buffer.as_mut_ptr(), size);
        match usize::try_from(filled) {
            Ok(filled) => {
                buffer.truncate(filled);
                return Ok(buffer);
            }
            // It grew between the two calls.
            Err(_) if io::Error::last_os_error().raw_os_error() == Some(libc::ERANGE) => {}
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
}
