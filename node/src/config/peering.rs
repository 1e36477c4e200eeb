//! How a node and its peers find each other: addresses, the join token, tags.
//!
//! What a node listens on is not always what others can dial. An address of one interface is both;
//! all addresses (`0.0.0.0`) need one that is told to peers, by default the one on the way out.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use super::checked::{fixed_port, value};
use super::error::ConfigError;
use super::file::Written;
use super::machine::Machine;
use super::values::{BadText, JoinToken, Tag};
use super::{MEMBER_FILE, defaults};

/// Most tags of one node: they are replicated to every other.
const MAX_TAGS: usize = 32;

/// The addresses of a node among its peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Peering {
    pub(super) listen: SocketAddr,
    pub(super) bulk_listen: SocketAddr,
    pub(super) advertise: SocketAddr,
    pub(super) advertise_bulk: SocketAddr,
}

/// The addresses that `written` means on `machine`.
pub(super) fn check(written: &Written, machine: &Machine) -> Result<Peering, ConfigError> {
    let listen = written.cluster_listen.unwrap_or_else(|| default(machine));
    let listen = fixed_port("cluster_listen", listen)?;
    let bulk_listen = match written.bulk_listen {
        Some(given) => fixed_port("bulk_listen", given)?,
        None => next_port("cluster_listen", listen)?,
    };
    if bulk_listen == listen {
        return Err(ConfigError::Relation {
            first: ("cluster_listen", listen.to_string()),
            second: ("bulk_listen", bulk_listen.to_string()),
            why: "bulk transfers need a port of their own",
        });
    }
    let advertise = advertise(written.advertise, listen, machine)?;
    let advertise_bulk = match written.bulk_listen {
        Some(given) => SocketAddr::new(advertise.ip(), given.port()),
        None => next_port("advertise", advertise)?,
    };
    Ok(Peering {
        listen,
        bulk_listen,
        advertise,
        advertise_bulk,
    })
}

/// Where to listen where nobody says.
fn default(machine: &Machine) -> SocketAddr {
    if dialled(machine).is_some() {
        defaults::CLUSTER_LISTEN
    } else {
        defaults::CLUSTER_LISTEN_ALONE
    }
}

fn next_port(setting: &'static str, address: SocketAddr) -> Result<SocketAddr, ConfigError> {
    let why = "the port after it must exist: it carries bulk transfers";
    let port = address.port().checked_add(1);
    let port = port.ok_or_else(|| value(setting, address, why))?;
    Ok(SocketAddr::new(address.ip(), port))
}

fn advertise(
    given: Option<SocketAddr>,
    listen: SocketAddr,
    machine: &Machine,
) -> Result<SocketAddr, ConfigError> {
    if let Some(given) = given {
        if given.ip().is_unspecified() {
            let why = "peers cannot dial this; expected the address of one interface";
            return Err(value("advertise", given, why));
        }
        return fixed_port("advertise", given);
    }
    let ip = if listen.ip().is_unspecified() {
        dialled(machine).ok_or_else(|| {
            let why = "no default route tells which address peers can dial; set `advertise`";
            value("cluster_listen", listen, why)
        })?
    } else {
        listen.ip()
    };
    Ok(SocketAddr::new(ip, listen.port()))
}

fn dialled(machine: &Machine) -> Option<IpAddr> {
    machine.address.filter(|address| !address.is_loopback())
}

/// The token itself where a file holds it. A member has joined already: the file may be gone by
/// then, and a missing one is no reason not to start.
pub(super) fn token(
    given: Option<JoinToken>,
    data_dir: &Path,
) -> Result<Option<JoinToken>, ConfigError> {
    let Some(file) = given.as_deref().and_then(|text| text.strip_prefix('@')) else {
        return Ok(given);
    };
    if data_dir.join(MEMBER_FILE).exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(file).map_err(|source| ConfigError::Token {
        path: file.into(),
        source,
    })?;
    // The value itself is a secret, so the file is named instead.
    let token = text
        .parse()
        .map_err(|err| value("join", format!("@{file}"), err))?;
    Ok(Some(token))
}

/// The tags, each of which fits.
pub(super) fn tags(
    written: Option<BTreeMap<String, String>>,
) -> Result<BTreeMap<String, String>, ConfigError> {
    let tags = written.unwrap_or_default();
    if tags.len() > MAX_TAGS {
        let why = format!("a node may have {MAX_TAGS} tags at most");
        return Err(value("tags", tags.len(), why));
    }
    for (key, text) in &tags {
        Tag::new(key, text).map_err(|err: BadText| value("tags", format!("{key}={text}"), err))?;
    }
    Ok(tags)
}

#[cfg(test)]
mod tests {
    use proto::units::Mib;

    use super::*;

    fn machine(address: Option<&str>) -> Machine {
        Machine {
            hostname: "box".into(),
            address: address.map(|it| it.parse().expect("an address")),
            cores: 1,
            memory: Mib(1024),
            disk_free: Mib(1024),
        }
    }

    fn checked(toml: &str, address: Option<&str>) -> Result<Peering, String> {
        let written: Written = toml::from_str(toml).expect("a configuration");
        check(&written, &machine(address)).map_err(|err| err.to_string())
    }

    fn shown(toml: &str, address: Option<&str>) -> (String, String) {
        let peering = checked(toml, address).expect("addresses");
        (
            peering.advertise.to_string(),
            peering.advertise_bulk.to_string(),
        )
    }

    #[test]
    fn an_address_of_one_interface_is_told_to_peers_as_it_is() {
        let toml = "cluster_listen = \"10.1.1.1:9\"\nbulk_listen = \"10.1.1.1:7\"";
        let (control, bulk) = shown(toml, Some("10.0.0.7"));
        assert_eq!(
            (control.as_str(), bulk.as_str()),
            ("10.1.1.1:9", "10.1.1.1:7")
        );
    }

    #[test]
    fn other_hosts_reach_a_node_that_was_told_nothing() {
        let (control, bulk) = shown("", Some("10.0.0.7"));
        assert_eq!(control, "10.0.0.7:7321");
        assert_eq!(bulk, "10.0.0.7:7322");
    }

    #[test]
    fn without_a_way_out_a_node_that_was_told_nothing_listens_to_this_machine() {
        for address in [None, Some("127.0.0.1")] {
            let (control, bulk) = shown("", address);
            assert_eq!(control, "127.0.0.1:7321");
            assert_eq!(bulk, "127.0.0.1:7322");
        }
    }

    #[test]
    fn listening_on_all_addresses_tells_peers_the_one_on_the_way_out() {
        let toml = "cluster_listen = \"0.0.0.0:7321\"";
        let (control, bulk) = shown(toml, Some("10.0.0.7"));
        assert_eq!(control, "10.0.0.7:7321");
        assert_eq!(bulk, "10.0.0.7:7322");
        let err = checked(toml, None).expect_err("it was accepted");
        assert!(err.contains("advertise"), "{err}");
    }

    #[test]
    fn a_forwarded_address_wins_and_must_be_one_that_can_be_dialled() {
        let toml = "cluster_listen = \"0.0.0.0:7321\"\nadvertise = \"192.0.2.9:4000\"";
        let (control, bulk) = shown(toml, None);
        assert_eq!(
            (control.as_str(), bulk.as_str()),
            ("192.0.2.9:4000", "192.0.2.9:4001")
        );
        for bad in ["0.0.0.0:1", "1.2.3.4:0", "1.2.3.4:65535"] {
            let err = checked(&format!("advertise = {bad:?}"), None).expect_err("accepted");
            assert!(err.contains("advertise"), "{err}");
        }
    }

    #[test]
    fn control_and_bulk_on_one_port_are_refused() {
        let toml = "cluster_listen = \"127.0.0.1:9\"\nbulk_listen = \"127.0.0.1:9\"";
        let err = checked(toml, None).expect_err("it was accepted");
        assert!(
            err.contains("cluster_listen") && err.contains("bulk_listen"),
            "{err}"
        );
    }

    #[test]
    fn a_token_in_a_file_is_read_unless_the_node_is_a_member_already() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("token");
        let given = || Some(format!("@{}", file.display()).parse().expect("a token"));
        let missing = token(given(), dir.path()).expect_err("it was accepted");
        assert!(missing.to_string().contains("token"), "{missing}");
        fs::write(&file, "two words").expect("a file");
        let damaged = token(given(), dir.path()).expect_err("it was accepted");
        assert!(!damaged.to_string().contains("two words"), "{damaged}");
        fs::write(&file, "wj1.abc\n").expect("a file");
        let read = token(given(), dir.path()).expect("a token");
        assert_eq!(read.as_deref(), Some("wj1.abc"));

        fs::remove_file(&file).expect("removed");
        fs::write(dir.path().join(MEMBER_FILE), "{}").expect("a file");
        assert_eq!(token(given(), dir.path()).expect("no need"), None);
    }

    #[test]
    fn tags_that_do_not_fit_are_named() {
        let one = |key: &str, text: &str| Some([(key.to_owned(), text.to_owned())].into());
        assert_eq!(tags(one("zone", "a")).expect("a tag").len(), 1);
        assert!(tags(None).expect("none").is_empty());
        let err = tags(one("zo ne", "a")).expect_err("accepted").to_string();
        assert!(err.contains("zo ne"), "{err}");
        let many = (0..33).map(|at| (at.to_string(), "v".to_owned())).collect();
        assert!(tags(Some(many)).is_err());
    }
}
