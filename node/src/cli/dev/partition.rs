//! Cutting the nodes of a development cluster off from each other, with real packets lost.
//!
//! One nftables table of our own drops what one side sends to another, on loopback, where the
//! receiver would take it in: a drop on the way out would be told to the sender, which no lost
//! packet is. Each node dials and listens with one socket per lane, so its packets are known by
//! their source port. The API (TCP) of every node stays reachable from this machine.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _};
use std::process::{Command, Stdio};

use super::super::error::CliError;

/// Where the API, the cluster and bulk transfers lie among a node's ports.
pub(super) const API_PORT: u16 = 0;
/// See [`API_PORT`].
pub(super) const CONTROL_PORT: u16 = 1;
/// See [`API_PORT`].
pub(super) const BULK_PORT: u16 = 2;

/// The sides of a partition: numbers of nodes, every node on exactly one side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sides(Vec<BTreeSet<u16>>);

impl Sides {
    /// Reads `1|2,3`: sides between `|`, nodes between commas. Nodes that are not named form one
    /// more side together, so that `1` alone means node 1 against all others.
    pub(super) fn parse(text: &str, nodes: u16) -> Result<Self, CliError> {
        let mut rest: BTreeSet<u16> = (1..=nodes).collect();
        let mut sides = Vec::new();
        for side in text.split('|') {
            sides.push(side_of(side, &mut rest)?);
        }
        if !rest.is_empty() {
            sides.push(rest);
        }
        if sides.len() < 2 {
            return Err(refused("one side is no partition"));
        }
        Ok(Self(sides))
    }

    /// What drops every packet from one side to another: a rule a side. Replaces an older table.
    fn ruleset(&self, table: &str, first_port: impl Fn(u16) -> u16) -> String {
        let ports = |side: &BTreeSet<u16>| {
            side.iter()
                .map(|node| first_port(*node))
                .flat_map(|port| [port + CONTROL_PORT, port + BULK_PORT])
                .map(|port| port.to_string())
                .collect::<Vec<_>>()
        };
        let mut text = removal(table);
        let _never_fails = writeln!(text, "table inet {table} {{\n  chain cut {{");
        text.push_str("    type filter hook input priority filter; policy accept;\n");
        for (at, side) in self.0.iter().enumerate() {
            let others = self.0.iter().enumerate().filter(|(other, _)| *other != at);
            let others: Vec<String> = others.flat_map(|(_, side)| ports(side)).collect();
            let (from, to) = (ports(side).join(", "), others.join(", "));
            let _never_fails = writeln!(
                text,
                "    iifname \"lo\" udp sport {{ {from} }} udp dport {{ {to} }} counter drop"
            );
        }
        text.push_str("  }\n}\n");
        text
    }
}

impl std::fmt::Display for Sides {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let side = |side: &BTreeSet<u16>| {
            let numbers: Vec<String> = side.iter().map(u16::to_string).collect();
            numbers.join(",")
        };
        let sides: Vec<String> = self.0.iter().map(side).collect();
        f.write_str(&sides.join(" | "))
    }
}

/// One side, whose nodes are taken out of `rest`.
fn side_of(text: &str, rest: &mut BTreeSet<u16>) -> Result<BTreeSet<u16>, CliError> {
    let mut side = BTreeSet::new();
    for number in text.split(',').map(str::trim) {
        let node = number
            .parse()
            .map_err(|_| refused(&format!("{number:?} is not the number of a node")))?;
        if !rest.remove(&node) {
            return Err(refused(&format!(
                "node {node} is named twice or does not exist"
            )));
        }
        side.insert(node);
    }
    Ok(side)
}

fn refused(why: &str) -> CliError {
    CliError::usage(why).hint("write sides between `|`: wrenn dev partition \"1|2,3\"")
}

/// The table of the cluster whose ports begin at `port_base`.
fn table(port_base: u16) -> String {
    format!("wrenn_dev_{port_base}")
}

/// Removes a table; one that is not there is made first, so that removal cannot fail.
fn removal(table: &str) -> String {
    format!("table inet {table}\ndelete table inet {table}\n")
}

/// Lets no packet pass between the sides, from now on.
pub(super) fn cut(
    sides: &Sides,
    port_base: u16,
    first_port: impl Fn(u16) -> u16,
) -> Result<(), CliError> {
    nft(&sides.ruleset(&table(port_base), first_port))
}

/// Lets all packets pass again.
pub(super) fn heal(port_base: u16) -> Result<(), CliError> {
    nft(&removal(&table(port_base)))
}

/// Has `nft` carry out a ruleset: all of it or nothing.
fn nft(ruleset: &str) -> Result<(), CliError> {
    if !nix::unistd::geteuid().is_root() {
        let err = CliError::new("only root can drop packets of this machine");
        return Err(err.hint("run the same command as root, e.g. with sudo"));
    }
    let spawned = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = spawned.map_err(|err| match err.kind() {
        ErrorKind::NotFound => {
            CliError::new("the program nft is not installed").hint("apt-get install nftables")
        }
        _ => CliError::from_error("run nft", &err),
    })?;
    if let Some(mut input) = child.stdin.take() {
        // A program that ends without reading tells why on its error output.
        let _ended = input.write_all(ruleset.as_bytes());
    }
    let ended = child
        .wait_with_output()
        .map_err(|err| CliError::from_error("wait for nft", &err))?;
    if ended.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&ended.stderr);
    let complaint = complaint.lines().next().unwrap_or("it said nothing");
    Err(CliError::new(format!("nft refused: {complaint}")))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::time::Duration;

    use super::*;

    fn sides(text: &str, nodes: u16) -> Result<String, String> {
        let parsed = Sides::parse(text, nodes);
        parsed.map(|it| it.to_string()).map_err(|err| err.message)
    }

    #[test]
    fn nodes_that_are_not_named_form_one_more_side() {
        assert_eq!(sides("1|2,3", 3).as_deref(), Ok("1 | 2,3"));
        assert_eq!(sides("3, 1 | 2", 3).as_deref(), Ok("1,3 | 2"));
        assert_eq!(sides("2", 3).as_deref(), Ok("2 | 1,3"));
        assert_eq!(sides("1|2", 5).as_deref(), Ok("1 | 2 | 3,4,5"));
    }

    #[test]
    fn what_is_no_partition_is_refused() {
        for bad in [
            "", "|", "1,2,3", "1|1", "1,1|2", "1||2", "0|1", "1|4", "a|b", "1|2;3",
        ] {
            assert!(Sides::parse(bad, 3).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn every_side_has_a_rule_against_all_others() {
        let sides = Sides::parse("1|2,3", 3).expect("a partition");
        let text = sides.ruleset("t", |node| 7320 + (node - 1) * 10);
        let first = "udp sport { 7321, 7322 } udp dport { 7331, 7332, 7341, 7342 } counter drop";
        let second = "udp sport { 7331, 7332, 7341, 7342 } udp dport { 7321, 7322 } counter drop";
        assert!(text.contains(first) && text.contains(second), "{text}");
        assert_eq!(text.matches("drop").count(), 2);
    }

    /// Real packets: what is cut does not arrive and the sender is not told; what is healed does.
    #[test]
    fn packets_between_sides_are_lost_until_healed() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: only root can drop packets");
            return;
        }
        let on = |port: u16| UdpSocket::bind(("127.0.0.1", port));
        // Two nodes in a row of free ports, below those that the kernel gives out.
        let process = u16::try_from(std::process::id() % 1000).expect("below 1000");
        let base = 21_000 + process * 10;
        let first_port = |node: u16| base + (node - 1) * 3;
        let (one, two) = (on(base + 1).expect("a port"), on(base + 4).expect("a port"));
        let arrives = |what: u8, wait: Duration| {
            two.set_read_timeout(Some(wait)).expect("a timeout");
            one.send_to(&[what], two.local_addr().expect("an address"))
                .expect("the sender is not told");
            let mut got = [0];
            while two.recv(&mut got).is_ok() {
                if got == [what] {
                    return true;
                }
            }
            false
        };
        // Where it is to come a busy machine has time; on a calm one it takes no millisecond.
        let (comes, never_comes) = (Duration::from_secs(10), Duration::from_millis(100));

        assert!(arrives(1, comes));
        let sides = Sides::parse("1|2", 2).expect("a partition");
        cut(&sides, base, first_port).expect("cut");
        let cut_off = !arrives(2, never_comes);
        heal(base).expect("healed");
        assert!(cut_off);
        assert!(arrives(3, comes));
        heal(base).expect("healing twice is fine");
    }
}
