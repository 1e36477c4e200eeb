//! The daemon's own sockets, in its data directory.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use tokio::net::UnixListener;

/// Listens on `socket`, in the place of an earlier daemon.
///
/// # Errors
/// What the kernel says.
pub fn listen(socket: &Path) -> io::Result<UnixListener> {
    let (Some(dir), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    match fs::remove_file(socket) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
        _ => {}
    }
    // A socket's path may have 107 bytes, a data directory's may have more.
    let dir = File::open(dir)?;
    let through = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string());
    UnixListener::bind(through.join(name))
}
