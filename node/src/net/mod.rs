//! Network slots: one namespace per sandbox, the same inside all of them.
//!
//! ```text
//!  guest                 namespace wrenn-<tag>-<serial>                host
//!  169.254.0.21          tap0 169.254.0.22     eth0 guest_addr/31      w<tag>-<serial36> host_addr/31
//!  .--------.  frames  .--------------------------------------.  veth  .-----------------------------.
//!  | eth0   |<-------->| tap0   table inet wrenn         eth0 |<------>| table inet wrenn_<tag>      |<--> uplink
//!  '--------'          '--------------------------------------'        '-----------------------------'
//!   out:  raw guard (only .21 over IPv4) > forward: replies, not to      guard (pre-DNAT) and input: only replies
//!         slots, allowed, not denied > snat to guest_addr                and allowed > forward: not to slots > masquerade
//!   in:   dnat guest_addr to .21 > forward: from host_addr only          output of this host's own processes only
//! ```
//!
//! The host dials `guest_addr`; nothing else reaches a guest. What a guest may reach is decided in
//! its own namespace, whose rules live as long as it does, whatever becomes of the daemon or of
//! the host's own firewall; the host's table adds what only the host can know (its own
//! addresses) and the way out. [`rules`] says which rule lives where, and why.
//!
//! Who owns what: [`pool`] has one task that owns every slot of this node; [`build`] makes and
//! unmakes one slot, step by step; [`sweep`] takes away what a crash left, found by name alone.
//! Addresses come from a reusable index, names from a serial that is never used twice, because
//! the kernel frees names late ([`slot`] has both). Everything that talks to the kernel blocks, and so
//! runs on blocking threads; what has to be inside a namespace runs on a fresh thread that
//! enters it and ends ([`netns`]).
//!
//! After a crash of the daemon: namespaces, taps and rules of running sandboxes stay in force.
//! At the next start the caller sweeps all but the slots on record, starts the pool and adopts
//! those. Order on start: [`sweep::sweep`], [`SlotPool::start`], [`SlotPool::adopt`].

pub mod build;
pub mod cidr;
pub mod error;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod ledger;
mod link;
mod netlink;
pub mod netns;
mod nft;
pub mod pool;
pub mod rules;
mod serial;
pub mod slot;
pub mod sweep;
pub mod tap;

pub use cidr::Cidr;
pub use error::NetError;
pub use pool::{NetConfig, SlotPool};
pub use slot::{Serial, Slot, SlotIndex, SlotTag};
