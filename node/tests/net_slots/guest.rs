//! A guest without a VM: a namespace with the address every guest has, joined to a slot's tap
//! frame by frame, as a VMM would.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use wrenn_node::net::slot::{GATEWAY_MAC, GUEST_ADDR, GUEST_MAC};
use wrenn_node::net::{Slot, netns, tap};

use crate::world::{serve, shell, wait_until};

/// Where datagrams made by hand go.
pub(crate) const FORGED_PORT: u16 = 7001;
/// Longest frame: no offloads are on.
const FRAME_BYTES: usize = 2048;

/// A guest in a slot.
pub(crate) struct Guest {
    /// Its namespace.
    pub(crate) path: PathBuf,
    name: String,
    wire: File,
    stop: Option<UnixStream>,
    pump: Option<JoinHandle<()>>,
}

impl Guest {
    /// Puts a guest into `slot`; it answers on the usual port.
    pub(crate) fn new(slot: &Slot) -> Self {
        let name = format!("guest-{}", slot.netns);
        let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
        shell(&format!(
            "ip netns add {name}
             ip -n {name} tuntap add dev eth0 mode tap
             ip -n {name} link set eth0 address {mac} up
             ip -n {name} addr add 169.254.0.21/30 dev eth0
             ip -n {name} route add default via 169.254.0.22"
        ));
        let path = PathBuf::from("/run/netns").join(&name);
        let card = netns::enter(&path, || tap::open("eth0")).unwrap();
        let wire = tap::open_in(slot).unwrap();
        serve(&path, &[GUEST_ADDR]);
        let (stop, stopped) = UnixStream::pair().unwrap();
        let far = wire.try_clone().unwrap();
        let pump = thread::spawn(move || pump(&card, &far, &stopped));
        // The kernel notices in the background that someone opened a tap, and loses what is
        // sent before; a real guest takes longer to boot than that.
        for (inside, link) in [(&name, "eth0"), (&slot.netns, "tap0")] {
            wait_until(|| shell(&format!("ip -n {inside} -br link show {link}")).contains(" UP "));
        }
        Self {
            path,
            name,
            wire,
            stop: Some(stop),
            pump: Some(pump),
        }
    }

    /// Puts a frame on the wire that the guest's own kernel would never send.
    pub(crate) fn inject(&self, frame: &[u8]) {
        (&self.wire).write_all(frame).unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(pump) = self.pump.take() {
            let _panicked = pump.join();
        }
        shell(&format!("ip netns del {}", self.name));
    }
}

/// Carries frames both ways until the other end of `stopped` closes.
fn pump(card: &File, wire: &File, stopped: &UnixStream) {
    let mut frame = [0; FRAME_BYTES];
    loop {
        let wait = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = [
            wait(card.as_fd()),
            wait(wire.as_fd()),
            wait(stopped.as_fd()),
        ];
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            continue;
        }
        let ready = fds.map(|fd| fd.any().unwrap_or(false));
        if ready[2] {
            return;
        }
        for (ready, mut from, mut to) in [(ready[0], card, wire), (ready[1], wire, card)] {
            if ready {
                // A frame to a link that is down is lost, as on a real wire.
                let _lost = from
                    .read(&mut frame)
                    .and_then(|length| to.write(&frame[..length]));
            }
        }
    }
}

/// An ethernet frame with a UDP datagram from `source`, however untrue.
pub(crate) fn udp_frame(source: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let udp_length = u16::try_from(8 + payload.len()).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_length).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(source.octets());
    ip.extend(to.octets());
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = [&GATEWAY_MAC[..], &GUEST_MAC, &[8, 0]].concat();
    frame.extend(ip);
    frame.extend(4444_u16.to_be_bytes());
    frame.extend(FORGED_PORT.to_be_bytes());
    frame.extend(udp_length.to_be_bytes());
    // No checksum: IPv4 allows it.
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

fn checksum(header: &[u8]) -> u16 {
    let words = header
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap()
}
