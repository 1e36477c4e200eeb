//! A link with a delay and losses, made here and not by the kernel, which has no netem everywhere.
//!
//! A tap in this process's own network namespace, whose address is [`HERE`]. What is sent to [`THERE`] comes out of
//! the tap, is thrown away once in a while, waits, and goes back in with sender and receiver exchanged (which changes no
//! checksum): so whoever dials `THERE` reaches what listens on `HERE`, at the end of a slow link, over real TCP and UDP.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::Outcome;

/// Where to listen.
pub(crate) const HERE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 1));
/// What to dial.
pub(crate) const THERE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 2));
/// In each direction: 20 ms there and back.
const DELAY: Duration = Duration::from_millis(10);
/// One packet in so many is lost.
const LOST: u32 = 100;
/// What the losses begin with, so that every run has the same.
const SEED: u64 = 20;
/// Packets that may be on their way at once; past it the kernel throws them away, as a router would.
const QUEUE: usize = 100_000;
/// The tap, and the address behind which the other end seems to be.
const TAP: &str = "slow0";
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// Largest frame: the usual MTU and an Ethernet header.
const FRAME_BYTES: usize = 1514;
/// An IPv4 packet in an Ethernet frame: where its two addresses lie.
const IPV4: [u8; 2] = [8, 0];
const ADDRESSES: std::ops::Range<usize> = 26..34;

/// Makes the link. It lasts as long as this process and its namespace.
pub(crate) fn open() -> Outcome {
    let other = OTHER_MAC.map(|byte| format!("{byte:02x}")).join(":");
    let set_up = format!(
        "ip link set lo up
         ip tuntap add dev {TAP} mode tap
         ip link set {TAP} txqueuelen {QUEUE} up
         ip addr add {HERE}/24 dev {TAP}
         ip neigh add {THERE} lladdr {other} dev {TAP} nud permanent"
    );
    if !Command::new("sh")
        .args(["-ec", &set_up])
        .status()?
        .success()
    {
        return Err("the slow link could not be set up".into());
    }
    let tap = node::net::tap::open(TAP)?;
    let into = tap.try_clone()?;
    let (sent, waiting) = mpsc::sync_channel(QUEUE);
    // Both last as long as the process: the tap has no end.
    thread::spawn(move || carry(tap, &sent));
    thread::spawn(move || deliver(into, &waiting));
    Ok(())
}

/// Takes what is sent, and loses some of it.
fn carry(mut tap: File, sent: &mpsc::SyncSender<(Instant, Vec<u8>)>) {
    let mut chance = StdRng::seed_from_u64(SEED);
    let mut frame = [0; FRAME_BYTES];
    loop {
        let count = match tap.read(&mut frame) {
            Ok(count) => count,
            Err(err) if err.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let Some(back) = reflected(&frame[..count]) else {
            continue;
        };
        if chance.random_range(0..LOST) != 0 && sent.send((Instant::now() + DELAY, back)).is_err() {
            return;
        }
    }
}

/// Hands over what has waited long enough, in order.
fn deliver(mut tap: File, waiting: &mpsc::Receiver<(Instant, Vec<u8>)>) {
    for (due, frame) in waiting {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if tap.write_all(&frame).is_err() {
            return;
        }
    }
}

/// The frame on its way back: from whom it was for, to whom it came from. `None` for what is not IPv4.
fn reflected(frame: &[u8]) -> Option<Vec<u8>> {
    if frame.get(12..14)? != IPV4 || frame.len() < ADDRESSES.end {
        return None;
    }
    let mut back = frame.to_vec();
    let (to, from) = back.split_at_mut(6);
    to.swap_with_slice(&mut from[..6]);
    back[ADDRESSES].rotate_left(4);
    Some(back)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_from_whom_it_was_for() {
        let mut frame = vec![0; 40];
        frame[..6].copy_from_slice(&[1; 6]);
        frame[6..12].copy_from_slice(&[2; 6]);
        frame[12..14].copy_from_slice(&IPV4);
        frame[26..30].copy_from_slice(&[10, 99, 0, 1]);
        frame[30..34].copy_from_slice(&[10, 99, 0, 2]);
        let back = reflected(&frame).expect("IPv4");
        assert_eq!(back[..6], [2; 6]);
        assert_eq!(back[6..12], [1; 6]);
        assert_eq!(back[26..34], [10, 99, 0, 2, 10, 99, 0, 1]);
        assert_eq!(reflected(&back), Some(frame));
        assert_eq!(reflected(&[0; 40]), None);
        assert_eq!(reflected(&[]), None);
    }
}
