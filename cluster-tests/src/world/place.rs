//! Where worlds may be on this machine: ports and network slots, a few of each at a time.

use crate::places::{self, Places};

/// Network slots that one place has.
pub(super) const SLOTS: u16 = 16;
/// Worlds at once. Emulated guests want a core each, and some worlds mostly wait.
const AT_ONCE: usize = 3;

/// Those of this process.
pub(super) static PLACES: Places<AT_ONCE> = Places::new();

/// The right to use certain ports and network slots.
pub(super) type Place = places::Place<AT_ONCE>;

/// What a daemon has for itself on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    /// What it is called.
    pub(crate) name: String,
    /// Of its API (TCP).
    pub(crate) port: u16,
    /// Of its cluster (UDP); the one after it is for bulk transfers.
    pub(crate) cluster_port: u16,
    /// Index of its first network slot.
    pub(crate) slot_base: u16,
}

/// Ports below those that the kernel gives to clients, and slots above what a quickstart on the same
/// machine uses. Other test programs on this machine are avoided by taking the process id into
/// account.
pub(super) fn site(place: &Place) -> Site {
    let process = std::process::id();
    let row = |rows: u32| u16::try_from(process % rows).expect("few rows");
    let port = 20_000 + row(1500) * 8 + place.number() * 2;
    Site {
        name: "test".into(),
        port,
        cluster_port: port,
        slot_base: 8192 + row(512) * 64 + place.number() * SLOTS,
    }
}
