//! Brings up the loopback and the one network card, without any program of the image.

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
