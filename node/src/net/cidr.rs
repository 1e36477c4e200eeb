//! IPv4 networks, and sets of them as the kernel wants them: disjoint and in order.

use std::fmt;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::net::error::NetError;

/// Bits of an IPv4 address.
const ADDRESS_BITS: u8 = 32;

/// An IPv4 network, all host bits zero. Written `10.1.0.0/16`; a bare address means `/32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    network: Ipv4Addr,
    prefix: u8,
}

impl Cidr {
    /// The network of the given prefix length, for constants.
    ///
    /// # Panics
    /// At compile time when used in a constant: if `prefix` exceeds 32 or a host bit is set.
    #[must_use]
    pub const fn new(network: [u8; 4], prefix: u8) -> Self {
        assert!(prefix <= ADDRESS_BITS, "prefix is at most 32");
        let bits = u32::from_be_bytes(network);
        assert!(bits & !mask_bits(prefix) == 0, "host bits are zero");
        Self {
            network: Ipv4Addr::from_bits(bits),
            prefix,
        }
    }

    /// Its lowest address.
    #[must_use]
    pub const fn network(self) -> Ipv4Addr {
        self.network
    }

    /// Its netmask as an address.
    #[must_use]
    pub const fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(mask_bits(self.prefix))
    }

    /// Whether `address` lies in it.
    #[must_use]
    pub const fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask_bits(self.prefix) == self.network.to_bits()
    }

    /// First and last address, as numbers.
    const fn bounds(self) -> (u32, u32) {
        let first = self.network.to_bits();
        (first, first | !mask_bits(self.prefix))
    }
}

const fn mask_bits(prefix: u8) -> u32 {
    match prefix {
        0 => 0,
        _ => u32::MAX << (ADDRESS_BITS - prefix),
    }
}

/// The same addresses as disjoint, ascending ranges that do not touch.
///
/// The kernel refuses overlapping intervals in one set.
#[must_use]
pub fn merged(nets: &[Cidr]) -> Vec<RangeInclusive<u32>> {
    let mut bounds: Vec<_> = nets.iter().map(|net| net.bounds()).collect();
    bounds.sort_unstable();
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for (first, last) in bounds {
        match ranges.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => ranges.push((first, last)),
        }
    }
    ranges
        .into_iter()
        .map(|(first, last)| first..=last)
        .collect()
}

impl FromStr for Cidr {
    type Err = NetError;

    fn from_str(text: &str) -> Result<Self, NetError> {
        parse(text).ok_or_else(|| NetError::BadNet(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Cidr> {
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, prefix.parse().ok()?),
        None => (text, ADDRESS_BITS),
    };
    let network: Ipv4Addr = address.parse().ok()?;
    let fits = prefix <= ADDRESS_BITS && network.to_bits() & !mask_bits(prefix) == 0;
    fits.then_some(Cidr { network, prefix })
}

impl fmt::Display for Cidr {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.network, self.prefix)
    }
}

impl TryFrom<String> for Cidr {
    type Error = NetError;

    fn try_from(text: String) -> Result<Self, NetError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(net: Cidr) -> Self {
        net.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_cidr() -> impl Strategy<Value = Cidr> {
        (any::<u32>(), 0..=ADDRESS_BITS).prop_map(|(bits, prefix)| Cidr {
            network: Ipv4Addr::from_bits(bits & mask_bits(prefix)),
            prefix,
        })
    }

    proptest! {
        #[test]
        fn a_network_reads_back_as_written(net in any_cidr()) {
            prop_assert_eq!(net.to_string().parse::<Cidr>().unwrap(), net);
        }

        #[test]
        fn merged_ranges_hold_the_same_addresses(
            nets in prop::collection::vec(any_cidr(), 0..6),
            probe in any::<u32>(),
        ) {
            let ranges = merged(&nets);
            let edges = nets.iter().flat_map(|net| [net.bounds().0, net.bounds().1]);
            for bits in edges.flat_map(|e| [e, e.wrapping_sub(1), e.wrapping_add(1)]).chain([probe]) {
                let wanted = nets.iter().any(|net| net.contains(Ipv4Addr::from_bits(bits)));
                prop_assert_eq!(ranges.iter().any(|range| range.contains(&bits)), wanted);
            }
        }

        #[test]
        fn merged_ranges_ascend_and_never_touch(nets in prop::collection::vec(any_cidr(), 0..6)) {
            for pair in merged(&nets).windows(2) {
                prop_assert!(u64::from(*pair[0].end()) + 1 < u64::from(*pair[1].start()));
            }
        }
    }

    #[test]
    fn a_bare_address_is_a_network_of_one() {
        assert_eq!(
            "203.0.113.7".parse::<Cidr>().unwrap().to_string(),
            "203.0.113.7/32"
        );
    }

    #[test]
    fn host_bits_and_nonsense_are_refused() {
        for text in [
            "10.0.0.1/8",
            "10.0.0.0/33",
            "10.0.0/8",
            "::/0",
            "",
            "10.0.0.0/",
            "/8",
            "1.2.3.4/-1",
        ] {
            assert!(
                matches!(text.parse::<Cidr>(), Err(NetError::BadNet(_))),
                "{text}"
            );
        }
    }
}
