//! Who reaches guests.

use crate::guest::Guest;
use crate::world::{
    NOBODY, call_from_host, call_udp_from_host, on_a_host, outside, reachable, shell,
};

#[test]
fn the_host_reaches_a_guest_at_its_slots_address() {
    on_a_host(|host| {
        let node = host.node(|_| {});
        for _guest in 0..2 {
            let slot = host.wait(node.pool.take()).unwrap();
            let _guest = Guest::new(&slot);

            assert_eq!(call_from_host(slot.guest_addr), Some(slot.host_addr));
            assert_eq!(call_udp_from_host(slot.guest_addr), Some(slot.host_addr));
        }
    });
}

#[test]
fn nobody_beyond_the_host_reaches_a_guest() {
    on_a_host(|host| {
        let node = host.node(|_| {});
        let slot = host.wait(node.pool.take()).unwrap();
        let _guest = Guest::new(&slot);
        assert!(call_from_host(slot.guest_addr).is_some());

        assert_eq!(reachable(&outside(), &[slot.guest_addr]), NOBODY);
        // The namespace alone says so too.
        shell("nft flush ruleset");
        assert_eq!(reachable(&outside(), &[slot.guest_addr]), NOBODY);
        assert!(call_from_host(slot.guest_addr).is_some());
    });
}
