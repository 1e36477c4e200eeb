//! What guests reach, and what they do not.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use wrenn_node::net::slot::{GATEWAY_MAC, GUEST_MAC};
use wrenn_node::net::{netns, sweep};

use crate::guest::{FORGED_PORT, Guest, udp_frame};
use crate::world::{
    HOST, HOST_TOO, NOBODY, OUTSIDE, PRIVATE, RESOLVER, call, call_from_host, call_port, call_udp,
    call_udp_from_host, is_closed, nets, on_a_host, outside, reachable, shell, wait_until,
};

#[test]
fn a_guest_reaches_the_internet_and_looks_like_the_host() {
    on_a_host(|host| {
        let node = host.node(|_| {});
        let guest = Guest::new(&host.wait(node.pool.take()).unwrap());

        assert_eq!(call(&guest.path, OUTSIDE), Some(HOST));
        assert_eq!(call_udp(&guest.path, OUTSIDE), Some(HOST));
        assert_eq!(call_udp(&guest.path, RESOLVER), Some(HOST));
    });
}

#[test]
fn a_guest_reaches_no_private_or_special_range_though_the_host_does() {
    on_a_host(|host| {
        let node = host.node(|_| {});
        let guest = Guest::new(&host.wait(node.pool.take()).unwrap());

        for address in PRIVATE {
            assert!(call_from_host(address).is_some(), "{address} answers");
            assert!(call_udp_from_host(address).is_some(), "{address} answers");
        }
        assert_eq!(reachable(&guest.path, &PRIVATE), NOBODY);
        assert!(call(&guest.path, OUTSIDE).is_some(), "the guest is well");
    });
}

#[test]
fn a_guest_reaches_no_address_of_the_host() {
    on_a_host(|host| {
        let node = host.node(|_| {});
        let slot = host.wait(node.pool.take()).unwrap();
        let guest = Guest::new(&slot);
        let own = [
            HOST,
            HOST_TOO,
            slot.host_addr,
            slot.guest_addr,
            Ipv4Addr::new(169, 254, 0, 22),
        ];

        assert!(call_from_host(HOST).is_some(), "the host listens");
        assert_eq!(reachable(&guest.path, &own), NOBODY);
        assert!(call(&guest.path, OUTSIDE).is_some(), "the guest is well");
    });
}

#[test]
fn a_guest_reaches_no_other_slot_of_any_node_whatever_is_allowed() {
    on_a_host(|host| {
        let all = nets(&["0.0.0.0/0", "198.18.0.0/15"]);
        let node = host.node(|config| config.egress_allow.clone_from(&all));
        let other_node = host.node(|config| {
            config.tag = "tx".parse().unwrap();
            config.index_base = 100;
            config.serial_file.set_extension("other");
            config.egress_allow = all;
        });
        let one = host.wait(node.pool.take()).unwrap();
        let two = host.wait(node.pool.take()).unwrap();
        let three = host.wait(other_node.pool.take()).unwrap();
        let guests = [&one, &two, &three].map(Guest::new);
        for slot in [&one, &two, &three] {
            assert!(
                call_from_host(slot.guest_addr).is_some(),
                "all guests answer"
            );
        }

        let slots = [&one, &two, &three].map(|slot| [slot.host_addr, slot.guest_addr]);
        for guest in guests {
            assert_eq!(reachable(&guest.path, slots.as_flattened()), NOBODY);
        }
    });
}

#[test]
fn packets_with_a_source_that_is_not_the_guests_go_nowhere() {
    on_a_host(|host| {
        let node = host.node(|config| config.egress_allow = nets(&["203.0.113.2/32"]));
        let slot = host.wait(node.pool.take()).unwrap();
        let other = host.wait(node.pool.take()).unwrap();
        let guest = Guest::new(&slot);
        let listener =
            netns::enter(&outside(), || UdpSocket::bind((RESOLVER, FORGED_PORT))).unwrap();
        listener
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();

        let lies = [
            slot.guest_addr,
            slot.host_addr,
            other.guest_addr,
            HOST,
            Ipv4Addr::new(169, 254, 0, 22),
            Ipv4Addr::new(10, 0, 0, 5),
            Ipv4Addr::new(1, 2, 3, 4),
        ];
        for source in lies {
            guest.inject(&udp_frame(source, RESOLVER, source.to_string().as_bytes()));
        }
        guest.inject(&udp_frame(
            Ipv4Addr::new(169, 254, 0, 21),
            RESOLVER,
            b"truth",
        ));

        // The wire keeps order: what comes first is the first that was let through.
        let mut buffer = [0; 64];
        let (length, from) = listener.recv_from(&mut buffer).unwrap();
        assert_eq!(String::from_utf8_lossy(&buffer[..length]), "truth");
        assert_eq!(from.ip(), HOST);
    });
}

#[test]
fn a_guest_has_no_ipv6() {
    on_a_host(|host| {
        let node = host.node(|_| {});
        let slot = host.wait(node.pool.take()).unwrap();
        let guest = Guest::new(&slot);
        let inside = &slot.netns;
        assert_eq!(shell(&format!("ip -6 -n {inside} addr show")), "");
        assert_eq!(shell(&format!("ip -6 addr show dev {}", slot.veth)), "");

        // The rules say no even where the switch is turned.
        let dropped = format!("ip netns exec {inside} nft list chain inet wrenn guard");
        assert!(ipv6_rule(&shell(&dropped)).contains("packets 0"));
        shell(&format!(
            "ip netns exec {inside} sh -c 'echo 0 > /proc/sys/net/ipv6/conf/all/disable_ipv6'"
        ));
        let frame = [
            &GATEWAY_MAC[..],
            &GUEST_MAC,
            &[0x86, 0xdd],
            &ipv6_datagram(),
        ]
        .concat();
        guest.inject(&frame);
        assert!(
            call(&guest.path, OUTSIDE).is_some(),
            "the frame before it has arrived"
        );
        assert!(!ipv6_rule(&shell(&dropped)).contains("packets 0"));
    });
}

fn ipv6_rule(chain: &str) -> &str {
    chain
        .lines()
        .find(|line| line.contains("IPv4 only"))
        .unwrap()
}

/// From one made-up address to another, empty.
fn ipv6_datagram() -> Vec<u8> {
    let to = |last| [&[0xfd; 15][..], &[last]].concat();
    [&[0x60, 0, 0, 0, 0, 0, 59, 64][..], &to(2), &to(1)].concat()
}

#[test]
fn the_allow_list_opens_exactly_what_it_says() {
    on_a_host(|host| {
        shell("ip -n out addr add 10.9.9.10/32 dev lo; ip route add 10.9.9.10 via 203.0.113.2");
        let node = host.node(|config| {
            config.egress_allow = nets(&["10.9.9.9", "192.168.0.0/16", "203.0.113.9"])
        });
        let guest = Guest::new(&host.wait(node.pool.take()).unwrap());
        let (opened, beside) = (Ipv4Addr::new(10, 9, 9, 9), Ipv4Addr::new(10, 9, 9, 10));
        assert!(call_from_host(beside).is_some());

        let open = [opened, Ipv4Addr::new(192, 168, 7, 7), HOST_TOO];
        for address in open {
            assert!(call(&guest.path, address).is_some(), "{address} is open");
        }
        let mut closed = [&PRIVATE[..], &[beside, HOST]].concat();
        closed.retain(|address| !open.contains(address));
        assert_eq!(reachable(&guest.path, &closed), NOBODY);
    });
}

#[test]
fn ports_that_the_host_forwards_elsewhere_are_closed_too() {
    on_a_host(|host| {
        shell(
            "nft 'table ip docker { chain pre { type nat hook prerouting priority dstnat
               ip daddr 203.0.113.1 tcp dport 8080 dnat to 203.0.113.2:7000; }; }'",
        );
        let closed = host.node(|_| {});
        let open = host.node(|config| {
            config.tag = "o".parse().unwrap();
            config.index_base = 100;
            config.serial_file.set_extension("other");
            config.egress_allow = nets(&["203.0.113.1"]);
        });
        let outcast = Guest::new(&host.wait(closed.pool.take()).unwrap());
        let friend = Guest::new(&host.wait(open.pool.take()).unwrap());

        assert!(
            call_port(&friend.path, HOST, 8080).is_some(),
            "the port is forwarded"
        );
        assert!(is_closed(&outcast.path, HOST, 8080));
    });
}

#[test]
fn the_denies_hold_without_the_daemon_and_without_the_hosts_rules() {
    on_a_host(|host| {
        let node = host.node(|_| {});
        let slot = host.wait(node.pool.take()).unwrap();
        let other = host.wait(node.pool.take()).unwrap();
        let (guest, _neighbour) = (Guest::new(&slot), Guest::new(&other));
        host.wait(node.tasks.stop_and_join());
        assert!(
            call(&guest.path, OUTSIDE).is_some(),
            "the guest does not notice"
        );
        assert_eq!(reachable(&guest.path, &[HOST, other.guest_addr]), NOBODY);

        shell("nft flush ruleset");
        // As if someone else masqueraded: it is the denies that stop the guest, not the routes.
        shell(
            "nft 'table ip other { chain post { type nat hook postrouting priority srcnat
               oifname up0 masquerade; }; }'",
        );
        assert!(call(&guest.path, OUTSIDE).is_some());
        let never = [&PRIVATE[..], &[other.guest_addr, other.host_addr]].concat();
        assert_eq!(reachable(&guest.path, &never), NOBODY);
    });
}

#[test]
fn a_flushed_host_table_comes_back_while_the_pool_runs() {
    on_a_host(|host| {
        let node = host.node(|_| {});
        let guest = Guest::new(&host.wait(node.pool.take()).unwrap());
        shell("nft flush ruleset");
        wait_until(|| shell("nft list tables").contains("wrenn_t"));

        assert_eq!(call(&guest.path, OUTSIDE), Some(HOST));
        assert_eq!(reachable(&guest.path, &[HOST]), NOBODY);
    });
}

#[test]
fn teardown_removes_the_nodes_table_and_no_other() {
    on_a_host(|host| {
        let before = shell("nft 'add table inet wrenn_tt'; nft list ruleset");
        let node = host.node(|_| {});
        host.wait(node.pool.shutdown());
        let tag = host.config().tag;
        for _again in 0..2 {
            host.wait(sweep::teardown_host(&tag)).unwrap();
            assert_eq!(shell("nft list ruleset"), before);
        }
        let nothing = host.wait(sweep::sweep(&tag, &BTreeSet::new())).unwrap();
        assert_eq!(nothing.slots, BTreeSet::new());
    });
}
