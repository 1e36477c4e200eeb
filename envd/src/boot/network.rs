//! Brings up the loopback and the one network card, without any program of the image.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::cmdline::Options;
use super::{BootError, name};
use crate::sys::Interface;

/// The card's name: there is one card, and nobody in the guest renames it.
const CARD: &str = "eth0";
/// How long the card may take to appear.
const CARD_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is looked for.
const CARD_POLL: Duration = Duration::from_millis(2);
/// Whose hardware address the kernel knows.
const NEIGHBOURS: &str = "/proc/net/arp";

/// Sets addresses, the default route and the name servers.
///
/// # Errors
/// [`BootError`] names the interface or file.
pub fn bring_up(options: &Options) -> Result<(), BootError> {
    let loopback = Interface::new("lo").map_err(BootError::file("open interface", "lo"))?;
    loopback
        .bring_up()
        .map_err(BootError::file("bring up interface", "lo"))?;
    wait_for_card()?;
    let card = Interface::new(CARD).map_err(BootError::file("open interface", CARD))?;
    card.set_address(options.address, options.mask())
        .map_err(BootError::file("set address of", CARD))?;
    card.bring_up()
        .map_err(BootError::file("bring up interface", CARD))?;
    card.add_default_route(options.gateway)
        .map_err(BootError::file("add route over", CARD))?;
    name::write("/etc/resolv.conf", &resolv_conf(&options.dns))
}

/// Forgets the hardware addresses of everyone on the card's network.
///
/// # Errors
/// What the kernel said.
pub fn forget_neighbours() -> io::Result<()> {
    let card = Interface::new(CARD)?;
    let known = fs::read_to_string(NEIGHBOURS)?;
    neighbours(&known, CARD).try_for_each(|neighbour| card.forget_neighbour(neighbour))
}

/// The addresses in the kernel's table that are reached over `card`. Pure.
fn neighbours<'a>(table: &'a str, card: &'a str) -> impl Iterator<Item = Ipv4Addr> + 'a {
    let lines = table.lines().skip(1);
    let on_card = lines.filter(move |line| line.split_ascii_whitespace().last() == Some(card));
    on_card.filter_map(|line| line.split_ascii_whitespace().next()?.parse().ok())
}

fn wait_for_card() -> Result<(), BootError> {
    let began = Instant::now();
    while !Path::new("/sys/class/net").join(CARD).exists() {
        if began.elapsed() > CARD_TIMEOUT {
            return Err(BootError::NoInterface {
                name: CARD.to_owned(),
                waited: CARD_TIMEOUT,
            });
        }
        thread::sleep(CARD_POLL);
    }
    Ok(())
}

fn resolv_conf(servers: &[Ipv4Addr]) -> String {
    servers
        .iter()
        .map(|server| format!("nameserver {server}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_on_the_card_are_found_and_others_are_not() {
        let table = "IP address       HW type     Flags       HW address            Mask     Device\n\
            169.254.0.22     0x1         0x2         02:00:a9:fe:00:16     *        eth0\n\
            172.17.0.2       0x1         0x2         02:42:ac:11:00:02     *        docker0\n";
        let found: Vec<_> = neighbours(table, CARD).collect();
        assert_eq!(found, [Ipv4Addr::new(169, 254, 0, 22)]);
        assert_eq!(neighbours("", CARD).count(), 0);
    }
}
