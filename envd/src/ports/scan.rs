//! Which ports are listened on from the loopback only. Pure but for [`listening`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The kernel's lists. Sockets that listen come first in each.
const LISTS: [&str; 2] = ["/proc/net/tcp6", "/proc/net/tcp"];
/// How the kernel writes that a socket listens.
const LISTENS: &str = "0A";
/// Ports that are followed at most; a program that opens more wants something else.
const MAX_PORTS: usize = 256;

/// The ports, and where each leads.
#[must_use]
pub fn listening() -> BTreeMap<u16, SocketAddr> {
    let mut ports = BTreeMap::new();
    for list in LISTS {
        // A kernel without IPv6 has but one list.
        let Ok(file) = File::open(list) else { continue };
        // IPv4 comes last and wins: that is what `localhost` means to most programs.
        ports.extend(parse(BufReader::new(file)).map(|address| (address.port(), address)));
    }
    while ports.len() > MAX_PORTS {
        ports.pop_last();
    }
    ports
}

/// The loopback addresses that are listened on according to one of the kernel's lists.
///
/// The list is read no further than to the first socket that does not listen: there may be very many
/// of those.
pub fn parse(list: impl BufRead) -> impl Iterator<Item = SocketAddr> {
    let lines = list.lines().skip(1).map_while(Result::ok);
    let listening = lines.map_while(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let address = words.next()?.to_owned();
        (words.nth(1)? == LISTENS).then_some(address)
    });
    listening.filter_map(|address| on_loopback(&address))
}

/// The address to reach it by, if the kernel's word for it is one of the loopback.
fn on_loopback(word: &str) -> Option<SocketAddr> {
    let (address, port) = word.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let address = match address.len() {
        8 => IpAddr::V4(four_bytes(address)?.into()),
        32 => {
            let mut bytes = [0; 16];
            for (number, place) in bytes.chunks_exact_mut(4).enumerate() {
                place.copy_from_slice(&four_bytes(address.get(8 * number..8 * (number + 1))?)?);
            }
            Ipv6Addr::from(bytes).to_canonical()
        }
        _ => return None,
    };
    let reachable = [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ];
    reachable
        .contains(&address)
        .then(|| SocketAddr::new(address, port))
}

/// The kernel prints addresses as numbers of 32 bits in its own order of bytes.
fn four_bytes(digits: &str) -> Option<[u8; 4]> {
    Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEAD: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when\n";

    fn ports(lines: &[&str]) -> Vec<String> {
        let list = format!("{HEAD}{}\n", lines.join("\n"));
        parse(list.as_bytes()).map(|it| it.to_string()).collect()
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn loopback_listeners_are_found_and_others_are_not() {
        let found = ports(&[
            "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1",
            "   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1",
            "   2: 3500007F:0035 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1",
            "   3: 00000000000000000000000001000000:1F91 00000000000000000000000000000000:0000 0A 0",
            "   4: 0000000000000000FFFF00000100007F:1F92 00000000000000000000000000000000:0000 0A 0",
            "   5: 0100007F:1F93 0100007F:9999 01 00000000:00000000 00:00000000 00000000 0 0 1",
            "   6: 0100007F:1F94 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1",
        ]);
        assert_eq!(found, ["127.0.0.1:8080", "[::1]:8081", "127.0.0.1:8082"]);
    }

    #[test]
    fn a_real_listener_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        assert_eq!(listening().get(&address.port()), Some(&address));
    }

    proptest! {
        #[test]
        fn no_list_breaks_the_parser(list in "(.|\n){0,300}") {
            parse(list.as_bytes()).count();
            on_loopback(&list);
        }
    }
}
