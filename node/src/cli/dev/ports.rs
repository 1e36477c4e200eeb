//! Which ports are free, and who has those that are not: read from `/proc`, so that a refusal can
//! say whom to blame.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::Path;

use super::super::error::CliError;

/// What a port is a port of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// The API.
    Tcp,
    /// The cluster.
    Udp,
}

/// Makes sure that nobody has this port of loopback.
pub(super) fn check_free(protocol: Protocol, port: u16) -> Result<(), CliError> {
    let address = (Ipv4Addr::LOCALHOST, port);
    let bound: io::Result<()> = match protocol {
        Protocol::Tcp => TcpListener::bind(address).map(drop),
        Protocol::Udp => UdpSocket::bind(address).map(drop),
    };
    let Err(err) = bound else {
        return Ok(());
    };
    let message = if err.kind() == ErrorKind::AddrInUse {
        format!("port {port} is taken by {}", holder(protocol, port))
    } else {
        format!("listen on port {port}: {err}")
    };
    Err(CliError::new(message).hint("end that process, or choose --port-base"))
}

/// The process that listens on a port, in words.
fn holder(protocol: Protocol, port: u16) -> String {
    let tables = match protocol {
        Protocol::Tcp => ["/proc/net/tcp", "/proc/net/tcp6"],
        Protocol::Udp => ["/proc/net/udp", "/proc/net/udp6"],
    };
    let inode = tables
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .find_map(|table| listening_inode(protocol, &table, port));
    let pid = inode.and_then(|inode| owner(&format!("socket:[{inode}]")));
    let Some(pid) = pid else {
        return "a process that cannot be seen from here".into();
    };
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("process {pid} ({})", name.trim())
}

/// The inode of the socket that listens on `port`, in a table of the kernel's.
fn listening_inode(protocol: Protocol, table: &str, port: u16) -> Option<u64> {
    // The kernel's numbers for a listening socket and for one that is not connected.
    let state = match protocol {
        Protocol::Tcp => "0A",
        Protocol::Udp => "07",
    };
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (_, local_port) = fields.get(1)?.rsplit_once(':')?;
        let matches = u16::from_str_radix(local_port, 16) == Ok(port) && *fields.get(3)? == state;
        matches.then(|| fields.get(9)?.parse().ok()).flatten()
    })
}

/// The process that has `link` among its descriptors.
fn owner(link: &str) -> Option<u32> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .find(|pid| has_descriptor(*pid, link))
}

fn has_descriptor(pid: u32, link: &str) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    descriptors
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|target| target == Path::new(link))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_holder_of_a_port_is_named_with_its_process() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let ours = format!("process {}", std::process::id());
        for (protocol, address) in [
            (Protocol::Tcp, listener.local_addr()),
            (Protocol::Udp, socket.local_addr()),
        ] {
            let port = address.expect("an address").port();
            let err = check_free(protocol, port).expect_err("it was free");
            assert!(err.message.contains(&ours), "{err:?}");
        }
    }

    #[test]
    fn a_line_of_the_kernel_table_is_read_in_its_own_base() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
             0: 0100007F:1C98 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1\n";
        assert_eq!(listening_inode(Protocol::Tcp, table, 7320), Some(4242));
        assert_eq!(listening_inode(Protocol::Tcp, table, 7321), None);
        assert_eq!(listening_inode(Protocol::Udp, table, 7320), None);
        assert_eq!(listening_inode(Protocol::Tcp, "", 7320), None);
    }
}
