//! The address plan: from an index to addresses, from a serial to names. Pure.
//!
//! Two numbers make a slot. The **index** gives it its addresses and is used again once the slot
//! is gone. The **serial** gives it its names and counts up for ever: the kernel removes a
//! namespace in the background and its names stay taken for up to about a second.
//!
//! A tag says which node of a host a slot belongs to. It contains no `-`, so that the names of
//! one tag are never a prefix of those of another.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::net::cidr::Cidr;
use crate::net::error::NetError;

/// Where the host-side addresses of all slots come from.
///
/// The benchmarking range of RFC 2544: not routed on the internet and, unlike 10/8, 172.16/12,
/// 192.168/16 and the 100.64/10 of carriers and overlay networks, not met in LANs. It holds
/// exactly one /31 for each possible index.
pub const SLOT_NET: Cidr = Cidr::new([198, 18, 0, 0], 15);
/// Addresses a slot takes from [`SLOT_NET`]: the two ends of its veth.
const ADDRESSES_PER_SLOT: u32 = 2;
/// Prefix length of a veth's two addresses.
pub const VETH_PREFIX: u8 = 31;
/// Every index has its place in [`SLOT_NET`].
const _: () = assert!(
    ADDRESSES_PER_SLOT * (u16::MAX as u32 + 1) == !SLOT_NET.mask().to_bits() + 1,
    "the slot range holds exactly one pair per index"
);

/// The address every guest has.
pub const GUEST_ADDR: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
/// The address of every tap: the guest's gateway.
pub const GATEWAY_ADDR: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
/// Prefix length of the network between guest and tap.
pub const GUEST_PREFIX: u8 = 30;
/// The hardware address every guest has.
pub const GUEST_MAC: [u8; 6] = [0x02, 0x00, 0xa9, 0xfe, 0x00, 0x15];
/// The hardware address of every tap: fixed, so that the neighbour table in a guest's snapshot
/// holds in whatever slot it is resumed.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x00, 0xa9, 0xfe, 0x00, 0x16];
/// The tap's name, in its namespace.
pub const TAP: &str = "tap0";
/// The veth's name, in its namespace.
pub const UPLINK: &str = "eth0";
/// Where named namespaces are, for us as for `ip netns`.
pub const NETNS_DIR: &str = "/run/netns";

/// Most characters of a tag.
const TAG_MAX: u32 = 4;
/// Longest interface name the kernel takes.
const IFNAME_MAX: u32 = 15;
/// Digits of a serial in interface names.
const RADIX: u32 = 36;
/// Digits left for a serial after `w`, the longest tag and `-`.
const SERIAL_DIGITS: u32 = IFNAME_MAX - 2 - TAG_MAX;
/// Largest serial: about 10^14, a million slots a second for three years.
pub const SERIAL_MAX: u64 = (RADIX as u64).pow(SERIAL_DIGITS) - 1;

/// Which node of this host a slot belongs to: one to four of a-z and 0-9.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SlotTag(String);

impl SlotTag {
    /// The tag as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What the host-side interface names of this tag, and no others, begin with.
    #[must_use]
    pub fn veth_prefix(&self) -> String {
        format!("w{}-", self.0)
    }

    /// What the namespace names of this tag, and no others, begin with.
    #[must_use]
    pub fn netns_prefix(&self) -> String {
        format!("wrenn-{}-", self.0)
    }

    /// The nftables table of this tag on the host.
    #[must_use]
    pub fn host_table(&self) -> String {
        format!("wrenn_{}", self.0)
    }

    /// The serial in a host-side interface name of this tag.
    #[must_use]
    pub fn serial_of_veth(&self, name: &str) -> Option<Serial> {
        let serial = Serial::from_base36(name.strip_prefix(&self.veth_prefix())?)?;
        // Only the spelling we give: another one is not ours.
        (veth_name(self, serial) == name).then_some(serial)
    }

    /// The serial in a namespace name of this tag.
    #[must_use]
    pub fn serial_of_netns(&self, name: &str) -> Option<Serial> {
        let serial = Serial(name.strip_prefix(&self.netns_prefix())?.parse().ok()?);
        (netns_name(self, serial) == name && serial.0 <= SERIAL_MAX).then_some(serial)
    }
}

impl FromStr for SlotTag {
    type Err = NetError;

    fn from_str(text: &str) -> Result<Self, NetError> {
        let short = (1..=TAG_MAX as usize).contains(&text.len());
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        if short && text.bytes().all(plain) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NetError::BadTag(text.to_owned()))
        }
    }
}

impl TryFrom<String> for SlotTag {
    type Error = NetError;

    fn try_from(text: String) -> Result<Self, NetError> {
        text.parse()
    }
}

impl From<SlotTag> for String {
    fn from(tag: SlotTag) -> Self {
        tag.0
    }
}

impl fmt::Display for SlotTag {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// Names a slot; counts up for ever, at most [`SERIAL_MAX`].
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Serial(pub u64);

impl Serial {
    fn to_base36(self) -> String {
        let mut digits = Vec::new();
        let mut rest = self.0;
        loop {
            let digit = u32::try_from(rest % u64::from(RADIX)).unwrap_or_default();
            digits.extend(char::from_digit(digit, RADIX));
            rest /= u64::from(RADIX);
            if rest == 0 {
                return digits.into_iter().rev().collect();
            }
        }
    }

    fn from_base36(text: &str) -> Option<Self> {
        let serial = u64::from_str_radix(text, RADIX).ok()?;
        (serial <= SERIAL_MAX).then_some(Self(serial))
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

/// Gives a slot its addresses; used again once the slot is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SlotIndex(pub u16);

impl fmt::Display for SlotIndex {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

/// The addresses of one index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotPlan {
    /// The host's end of the veth.
    pub host_addr: Ipv4Addr,
    /// The namespace's end of the veth: what the host dials to reach the guest.
    pub guest_addr: Ipv4Addr,
}

/// The addresses of `index`.
#[must_use]
pub fn plan(index: SlotIndex) -> SlotPlan {
    let first = SLOT_NET.network().to_bits() + ADDRESSES_PER_SLOT * u32::from(index.0);
    SlotPlan {
        host_addr: Ipv4Addr::from_bits(first),
        guest_addr: Ipv4Addr::from_bits(first + 1),
    }
}

/// The index whose addresses include `address`.
#[must_use]
pub fn index_of(address: Ipv4Addr) -> Option<SlotIndex> {
    if !SLOT_NET.contains(address) {
        return None;
    }
    let offset = address.to_bits() - SLOT_NET.network().to_bits();
    u16::try_from(offset / ADDRESSES_PER_SLOT)
        .ok()
        .map(SlotIndex)
}

/// One network slot: everything its users need to know, fit to be written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Names it; never used again.
    pub serial: Serial,
    /// Gave it its addresses.
    pub index: SlotIndex,
    /// The name of its namespace, as `ip netns` shows it.
    pub netns: String,
    /// The file that holds its namespace, also while no process is in it.
    pub netns_path: PathBuf,
    /// The tap a VMM opens, in the namespace.
    pub tap: String,
    /// The host's end of its veth.
    pub veth: String,
    /// The address of that end; what the guest sees as the peer when the host dials it.
    pub host_addr: Ipv4Addr,
    /// What the host dials; arrives at [`GUEST_ADDR`], all ports.
    pub guest_addr: Ipv4Addr,
}

impl Slot {
    /// The slot that these three determine.
    #[must_use]
    pub fn new(tag: &SlotTag, serial: Serial, index: SlotIndex) -> Self {
        let plan = plan(index);
        let netns = netns_name(tag, serial);
        Self {
            serial,
            index,
            netns_path: Path::new(NETNS_DIR).join(&netns),
            netns,
            tap: TAP.to_owned(),
            veth: veth_name(tag, serial),
            host_addr: plan.host_addr,
            guest_addr: plan.guest_addr,
        }
    }
}

fn netns_name(tag: &SlotTag, serial: Serial) -> String {
    format!("{}{serial}", tag.netns_prefix())
}

fn veth_name(tag: &SlotTag, serial: Serial) -> String {
    format!("{}{}", tag.veth_prefix(), serial.to_base36())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_tag() -> impl Strategy<Value = SlotTag> {
        "[a-z0-9]{1,4}".prop_map(SlotTag)
    }

    fn any_serial() -> impl Strategy<Value = Serial> {
        (0..=SERIAL_MAX).prop_map(Serial)
    }

    proptest! {
        #[test]
        fn addresses_lead_back_to_their_index(index in any::<u16>()) {
            let index = SlotIndex(index);
            let plan = plan(index);
            prop_assert_eq!(index_of(plan.host_addr), Some(index));
            prop_assert_eq!(index_of(plan.guest_addr), Some(index));
            prop_assert_ne!(plan.host_addr, plan.guest_addr);
        }

        #[test]
        fn names_fit_an_interface_and_lead_back_to_their_serial(
            tag in any_tag(), serial in any_serial(), index in any::<u16>(),
        ) {
            let slot = Slot::new(&tag, serial, SlotIndex(index));
            prop_assert!(slot.veth.len() <= IFNAME_MAX as usize, "{}", slot.veth);
            prop_assert_eq!(tag.serial_of_veth(&slot.veth), Some(serial));
            prop_assert_eq!(tag.serial_of_netns(&slot.netns), Some(serial));
        }

        #[test]
        fn no_tag_takes_the_names_of_another(
            one in any_tag(), other in any_tag(), serial in any_serial(),
        ) {
            prop_assume!(one != other);
            let slot = Slot::new(&other, serial, SlotIndex(0));
            prop_assert!(!slot.veth.starts_with(&one.veth_prefix()));
            prop_assert!(!slot.netns.starts_with(&one.netns_prefix()));
        }

        #[test]
        fn a_slot_reads_back_as_written(tag in any_tag(), serial in any_serial(), index in any::<u16>()) {
            let slot = Slot::new(&tag, serial, SlotIndex(index));
            let text = serde_json::to_string(&slot).unwrap();
            prop_assert_eq!(serde_json::from_str::<Slot>(&text).unwrap(), slot);
        }
    }

    #[test]
    fn the_first_and_last_slot_lie_at_the_ends_of_the_range() {
        assert_eq!(plan(SlotIndex(0)).host_addr, Ipv4Addr::new(198, 18, 0, 0));
        assert_eq!(
            plan(SlotIndex(u16::MAX)).guest_addr,
            Ipv4Addr::new(198, 19, 255, 255)
        );
        assert_eq!(index_of(Ipv4Addr::new(198, 20, 0, 0)), None);
    }

    #[test]
    fn names_with_another_spelling_are_not_ours() {
        let tag: SlotTag = "a".parse().unwrap();
        for name in [
            "wa-",
            "wa-01",
            "wa-A",
            "wa--1",
            "wa-+1",
            "wab-1",
            "wa-zzzzzzzzzz",
            "eth0",
        ] {
            assert_eq!(tag.serial_of_veth(name), None, "{name}");
        }
        for name in [
            "wrenn-a-",
            "wrenn-a-01",
            "wrenn-a-+1",
            "wrenn-ab-1",
            "wrenn-a-x",
        ] {
            assert_eq!(tag.serial_of_netns(name), None, "{name}");
        }
    }

    #[test]
    fn tags_that_do_not_fit_a_name_are_refused() {
        for text in ["", "abcde", "A", "a-b", "a b", "ä", "a/", "."] {
            assert!(
                matches!(text.parse::<SlotTag>(), Err(NetError::BadTag(_))),
                "{text:?}"
            );
        }
    }
}
