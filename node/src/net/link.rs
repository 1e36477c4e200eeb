//! Links, addresses, routes and neighbours, by netlink. Messages are built with rtnetlink's
//! types and sent over our own blocking socket (`docs/decisions/002-netlink.md`).

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::{if_nameindex, if_nametoindex};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{
    AddressMessageBuilder, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
};

use super::netlink::Conversation;

/// What is new must not exist yet.
const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;

/// One end of a veth to be.
pub(super) struct VethEnd<'a> {
    pub(super) name: &'a str,
    /// Given, not drawn: where it is drawn, udev may replace it later.
    pub(super) mac: [u8; 6],
}

/// Makes a veth whose `peer` end is born in the namespace `netns`; moving it there later would
/// take ten times as long. Both ends are down: a pair cannot be created up.
pub(super) fn create_veth(
    kernel: &mut Conversation,
    here: &VethEnd<'_>,
    peer: &VethEnd<'_>,
    netns: BorrowedFd<'_>,
) -> io::Result<()> {
    let far = LinkMessageBuilder::<LinkUnspec>::new()
        .name(peer.name)
        .address(peer.mac.to_vec())
        .setns_by_fd(netns.as_raw_fd())
        .build();
    let pair = LinkVeth::new(here.name, peer.name)
        .address(here.mac.to_vec())
        .set_info_data(InfoData::Veth(InfoVeth::Peer(far)))
        .build();
    kernel.request(RouteNetlinkMessage::NewLink(pair), NEW)
}

/// Brings a link up, giving it a hardware address first if told to.
pub(super) fn set_up(
    kernel: &mut Conversation,
    index: u32,
    mac: Option<[u8; 6]>,
) -> io::Result<()> {
    let mut link = LinkUnspec::new_with_index(index).up();
    if let Some(mac) = mac {
        link = link.address(mac.to_vec());
    }
    kernel.request(RouteNetlinkMessage::SetLink(link.build()), 0)
}

/// Removes a link by name, and with a veth its other end. Not there is as good as removed.
pub(super) fn delete(kernel: &mut Conversation, name: &str) -> io::Result<()> {
    let link: LinkMessage = LinkUnspec::new_with_name(name).build();
    match kernel.request(RouteNetlinkMessage::DelLink(link), 0) {
        Err(err) if err.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        done => done,
    }
}

/// Gives the link an address.
pub(super) fn add_address(
    kernel: &mut Conversation,
    index: u32,
    address: Ipv4Addr,
    prefix: u8,
) -> io::Result<()> {
    let message = AddressMessageBuilder::<Ipv4Addr>::new()
        .index(index)
        .address(address, prefix)
        .build();
    kernel.request(RouteNetlinkMessage::NewAddress(message), NEW)
}

/// Sends everything not routed otherwise to `gateway`.
pub(super) fn add_default_route(
    kernel: &mut Conversation,
    index: u32,
    gateway: Ipv4Addr,
) -> io::Result<()> {
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(gateway)
        .output_interface(index)
        .build();
    kernel.request(RouteNetlinkMessage::NewRoute(route), NEW)
}

/// Fixes who has `address` behind the link, so that nobody has to ask, and nobody can lie.
pub(super) fn add_neighbour(
    kernel: &mut Conversation,
    index: u32,
    address: Ipv4Addr,
    mac: [u8; 6],
) -> io::Result<()> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
        NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
    ];
    kernel.request(
        RouteNetlinkMessage::NewNeighbour(message),
        NLM_F_CREATE | NLM_F_REPLACE,
    )
}

/// The number of a link in the calling thread's namespace.
pub(super) fn index_of(name: &str) -> io::Result<u32> {
    Ok(if_nametoindex(name)?)
}

/// The names of all links in the calling thread's namespace.
pub(super) fn names() -> io::Result<Vec<String>> {
    let interfaces = if_nameindex()?;
    Ok(interfaces
        .iter()
        .map(|interface| interface.name().to_string_lossy().into_owned())
        .collect())
}

/// All IPv4 addresses in the calling thread's namespace, with the name of their link.
pub(super) fn addresses() -> Result<Vec<(String, Ipv4Addr)>, Errno> {
    let with_address = |entry: nix::ifaddrs::InterfaceAddress| {
        let address = entry.address?.as_sockaddr_in()?.ip();
        Some((entry.interface_name, address))
    };
    Ok(getifaddrs()?.filter_map(with_address).collect())
}
