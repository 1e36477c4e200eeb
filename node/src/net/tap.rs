//! Taps: made once and kept, opened by whoever runs the guest.

use std::ffi::{c_char, c_int, c_short};
use std::fs::{File, OpenOptions};
use std::io;

use super::netns::{self, tun};
use super::slot::Slot;

/// Where the kernel hands out taps.
const TUN_DEVICE: &str = "/dev/net/tun";
/// Who may attach to a slot's tap besides root: nobody, until VMMs run as a user of their own.
const OWNER: c_int = 0;

/// Makes the tap `name` in the calling thread's namespace; it stays when nobody has it open.
pub(super) fn create(name: &str) -> io::Result<()> {
    let device = open(name)?;
    tun::give_to(&device, OWNER)?;
    tun::keep(&device)
}

/// Opens the tap of `slot`, from outside its namespace: to be handed to a VMM as a descriptor.
///
/// Blocks. A tap has one holder at a time.
///
/// # Errors
/// If the namespace or the tap is gone, or someone else has the tap open.
pub fn open_in(slot: &Slot) -> io::Result<File> {
    netns::enter(&slot.netns_path, || open(&slot.tap))
}

/// Opens the tap `name` of the calling thread's namespace: one ethernet frame per read or write.
///
/// # Errors
/// If there may be no such tap, or someone else has it open.
pub fn open(name: &str) -> io::Result<File> {
    let device = OpenOptions::new().read(true).write(true).open(TUN_DEVICE)?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI).unwrap_or_default(),
        },
    };
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = c_char::from_ne_bytes([from]);
    }
    tun::attach(&device, &mut request)?;
    Ok(device)
}
