//! Two layers guard a slot, the namespace's rules and the host's. Each holds without the other.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};

use wrenn_node::net::netns;
use wrenn_node::net::slot::GATEWAY_ADDR;

use crate::guest::Guest;
use crate::world::{
    HOST, HOST_TOO, NOBODY, OUTSIDE, PORT, call, call_from_host, nets, on_a_host, outside,
    reachable, serve, shell,
};

#[test]
fn namespaces_alone_keep_slots_apart_even_when_all_is_allowed() {
    on_a_host(|host| {
        let node = host.node(|config| config.egress_allow = nets(&["0.0.0.0/0"]));
        let slots = [(); 2].map(|()| host.wait(node.pool.take()).unwrap());
        let guests = slots.each_ref().map(Guest::new);
        host.wait(node.tasks.stop_and_join());
        shell("nft flush ruleset");

        assert!(call_from_host(slots[1].guest_addr).is_some());
        let other = [slots[1].guest_addr, slots[1].host_addr, slots[0].host_addr];
        assert_eq!(reachable(&guests[0].path, &other), NOBODY);
        assert!(call(&guests[0].path, HOST).is_some(), "all else is");
    });
}

/// As if a VMM had broken out into its namespace and removed all rules there.
#[test]
fn the_host_alone_keeps_slots_from_it_and_from_each_other() {
    on_a_host(|host| {
        let node = host.node(|_| {});
        let slots = [(); 2].map(|()| host.wait(node.pool.take()).unwrap());
        for slot in &slots {
            shell(&format!("ip netns exec {} nft flush ruleset", slot.netns));
            serve(&slot.netns_path, &[slot.guest_addr]);
            assert!(call_from_host(slot.guest_addr).is_some());
        }

        let inside = &slots[0].netns_path;
        let never = [HOST, HOST_TOO, slots[0].host_addr, slots[1].guest_addr];
        assert_eq!(reachable(inside, &never), NOBODY);
        assert_eq!(reachable(&outside(), &[slots[0].guest_addr]), NOBODY);
        assert_eq!(call(inside, OUTSIDE), Some(HOST), "the way out is open");
    });
}

#[test]
fn the_host_takes_no_address_from_a_slot_but_the_slots() {
    on_a_host(|host| {
        let node = host.node(|_| {});
        let slot = host.wait(node.pool.take()).unwrap();
        let inside = &slot.netns;
        shell(&format!(
            "ip netns exec {inside} nft flush ruleset
             ip -n {inside} addr add 203.0.113.77/32 dev eth0
             ip -n {inside} route replace default via {} src 203.0.113.77
             ip route add 203.0.113.77 dev {}
             ip -n out route add 203.0.113.77 via {HOST}",
            slot.host_addr, slot.veth
        ));
        assert_eq!(reachable(&slot.netns_path, &[OUTSIDE]), NOBODY);
        let guard = shell("nft list chain inet wrenn_t guard");
        let rule = guard
            .lines()
            .find(|line| line.contains("not a slot's address"));
        assert!(!rule.unwrap().contains("packets 0"), "{guard}");
    });
}

#[test]
fn a_namespace_neither_answers_nor_calls() {
    on_a_host(|host| {
        let node = host.node(|_| {});
        let slot = host.wait(node.pool.take()).unwrap();
        let guest = Guest::new(&slot);
        serve(&slot.netns_path, &[GATEWAY_ADDR]);

        assert_eq!(
            reachable(&guest.path, &[GATEWAY_ADDR, slot.guest_addr]),
            NOBODY
        );
        assert_eq!(
            reachable(&slot.netns_path, &[OUTSIDE, slot.host_addr]),
            NOBODY
        );
        assert!(call(&guest.path, OUTSIDE).is_some(), "the guest is well");
        // Not even one way: the kernel tells the sender that a rule dropped it.
        let sent = netns::enter(&slot.netns_path, || {
            UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?.send_to(b"out", (OUTSIDE, PORT))
        });
        assert_eq!(sent.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    });
}
