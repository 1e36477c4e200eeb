//! Making and unmaking one slot. Blocking; call from a blocking thread in the host's namespace.
//!
//! The steps of [`Step::ALL`] run in order, and each leaves something that [`raze`] and
//! [`super::sweep`] find by the slot's names alone. Rules come before links: there is no instant at
//! which a guest could speak unheard.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;

use super::cidr::Cidr;
use super::error::NetError;
use super::link::{self, VethEnd};
use super::netlink::Conversation;
use super::slot::{
    GATEWAY_ADDR, GATEWAY_MAC, GUEST_ADDR, GUEST_MAC, GUEST_PREFIX, Slot, TAP, UPLINK, VETH_PREFIX,
};
use super::{netns, rules, tap};

/// One step of making a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// An empty file takes the namespace's name.
    TakeName,
    /// A new namespace is mounted on it.
    CreateNamespace,
    /// IPv6 off, forwarding on, before there is any link.
    SetSwitches,
    /// The namespace's rules.
    InstallRules,
    /// The tap, down.
    CreateTap,
    /// The veth, both ends down.
    CreateVeth,
    /// Addresses, neighbour and route inside; both inner links up.
    ConfigureInside,
    /// Address on the host's end; up.
    ConfigureHost,
}

impl Step {
    /// All steps, in order.
    pub const ALL: [Self; 8] = [
        Self::TakeName,
        Self::CreateNamespace,
        Self::SetSwitches,
        Self::InstallRules,
        Self::CreateTap,
        Self::CreateVeth,
        Self::ConfigureInside,
        Self::ConfigureHost,
    ];

    fn doing(self) -> &'static str {
        match self {
            Self::TakeName => "take the namespace name for slot",
            Self::CreateNamespace => "create the namespace of slot",
            Self::SetSwitches => "set the network switches of slot",
            Self::InstallRules => "install the rules of slot",
            Self::CreateTap => "create the tap of slot",
            Self::CreateVeth => "create the veth of slot",
            Self::ConfigureInside => "configure the inside of slot",
            Self::ConfigureHost => "configure the host's end of slot",
        }
    }
}

/// Makes `slot`, guests of which may reach `allow` beyond the public internet.
///
/// # Errors
/// [`NetError::Kernel`] names the step that failed; nothing is left of the slot then, or the
/// next sweep takes it.
pub fn raise(slot: &Slot, allow: &[Cidr]) -> Result<(), NetError> {
    raise_by(slot, allow, &Step::ALL).inspect_err(|_| {
        // The first error is the one to tell; what is left now is left to the sweep.
        let _second = raze(slot);
    })
}

/// Carries out some steps of making `slot`, and leaves what they made if one fails: how tests
/// stop half way.
///
/// # Errors
/// [`NetError::Kernel`] names the step that failed.
pub fn raise_by(slot: &Slot, allow: &[Cidr], steps: &[Step]) -> Result<(), NetError> {
    for step in steps {
        perform(*step, slot, allow).map_err(NetError::kernel(step.doing(), slot.serial))?;
    }
    Ok(())
}

fn perform(step: Step, slot: &Slot, allow: &[Cidr]) -> io::Result<()> {
    let path = &slot.netns_path;
    match step {
        Step::TakeName => netns::reserve(path),
        Step::CreateNamespace => netns::create(path),
        Step::SetSwitches => netns::enter(path, set_switches),
        Step::InstallRules => netns::enter(path, || rules::install_in_namespace(slot, allow)),
        Step::CreateTap => netns::enter(path, || tap::create(TAP)),
        Step::CreateVeth => create_veth(slot),
        Step::ConfigureInside => netns::enter(path, || configure_inside(slot)),
        Step::ConfigureHost => configure_host(slot),
    }
}

/// Puts the rules of an existing slot in force anew, without a gap.
pub(super) fn renew_rules(slot: &Slot, allow: &[Cidr]) -> io::Result<()> {
    netns::enter(&slot.netns_path, || rules::renew_in_namespace(slot, allow))
}

fn set_switches() -> io::Result<()> {
    // A kernel without IPv6 has nothing to switch off.
    for scope in ["all", "default"] {
        write_switch_if_there(&format!("net/ipv6/conf/{scope}/disable_ipv6"), "1")?;
    }
    write_switch("net/ipv4/ip_forward", "1")
}

fn create_veth(slot: &Slot) -> io::Result<()> {
    let namespace = File::open(&slot.netns_path)?;
    let [.., a, b, c, d] = slot.serial.0.to_be_bytes();
    let here = VethEnd {
        name: &slot.veth,
        mac: [0x02, 0x77, a, b, c, d],
    };
    let peer = VethEnd {
        name: UPLINK,
        mac: [0x06, 0x77, a, b, c, d],
    };
    link::create_veth(
        &mut Conversation::about_routes()?,
        &here,
        &peer,
        namespace.as_fd(),
    )
}

fn configure_inside(slot: &Slot) -> io::Result<()> {
    let kernel = &mut Conversation::about_routes()?;
    let tap = link::index_of(TAP)?;
    link::add_address(kernel, tap, GATEWAY_ADDR, GUEST_PREFIX)?;
    link::set_up(kernel, tap, Some(GATEWAY_MAC))?;
    link::add_neighbour(kernel, tap, GUEST_ADDR, GUEST_MAC)?;
    let uplink = link::index_of(UPLINK)?;
    link::add_address(kernel, uplink, slot.guest_addr, VETH_PREFIX)?;
    link::set_up(kernel, uplink, None)?;
    link::add_default_route(kernel, uplink, slot.host_addr)
}

fn configure_host(slot: &Slot) -> io::Result<()> {
    let kernel = &mut Conversation::about_routes()?;
    write_switch_if_there(&format!("net/ipv6/conf/{}/disable_ipv6", slot.veth), "1")?;
    let veth = link::index_of(&slot.veth)?;
    link::add_address(kernel, veth, slot.host_addr, VETH_PREFIX)?;
    link::set_up(kernel, veth, None)
}

/// Unmakes `slot`, however much of it there is. Done again, it does nothing.
///
/// The veth goes first and is waited for, so that the index is free when this returns; the
/// namespace itself ends in the background, with its last process.
///
/// # Errors
/// [`NetError::Kernel`] if the kernel refuses; call it again.
pub fn raze(slot: &Slot) -> Result<(), NetError> {
    raze_link(&slot.veth)?;
    netns::release(&slot.netns_path).map_err(NetError::kernel("let go of namespace", &slot.netns))
}

/// Removes a veth by the name of its host end.
pub(super) fn raze_link(name: &str) -> Result<(), NetError> {
    Conversation::about_routes()
        .and_then(|mut kernel| link::delete(&mut kernel, name))
        .map_err(NetError::kernel("remove link", name))
}

/// Writes a switch of the calling thread's namespace, a path below `/proc/sys`.
pub(super) fn write_switch(name: &str, value: &str) -> io::Result<()> {
    fs::write(format!("/proc/sys/{name}"), value)
}

fn write_switch_if_there(name: &str, value: &str) -> io::Result<()> {
    match write_switch(name, value) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
