//! Taps: made once and kept, opened by whoever runs the guest.

use std::ffi::{c_char, c_int, c_short};
use std::fs::{File, OpenOptions};
use std::io;

use super::error::NetError;
use super::netns::{self, tun};
use super::slot::Slot;

/// Where the kernel hands out taps.
const TUN_DEVICE: &str = "/dev/net/tun";
/// Who may attach to a tap besides the network administrator, until it is given to a VMM's user.
const OWNER: c_int = 0;

/// Makes the tap `name` in the calling thread's namespace; it stays when nobody has it open.
pub(super) fn create(name: &str) -> io::Result<()> {
    let device = open(name)?;
    tun::give_to(&device, OWNER)?;
    tun::keep(&device)
}

/// Lets VMMs of `user`, or of root where they have no user of their own, attach to the tap of `slot`.
///
/// Blocks. Nobody may have it open.
///
/// # Errors
/// As for [`open_in`], or the user is none.
pub fn give_to(slot: &Slot, user: Option<u32>) -> Result<(), NetError> {
    let owner = user.map_or(Ok(OWNER), c_int::try_from);
    let given = owner.map_err(io::Error::other).and_then(|owner| {
        let device = open_in(slot)?;
        tun::give_to(&device, owner)
    });
    given.map_err(NetError::kernel("hand over the tap of slot", slot.serial))
}

/// Opens the tap of `slot`, from outside its namespace: to be handed to a VMM as a descriptor.
///
/// Blocks. A tap has one holder at a time. The kernel notices in the background that someone holds
/// it, within milliseconds as a rule, and loses what is sent to the guest before: whoever dials a
/// guest just resumed should try again soon rather than wait out TCP's first second.
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
