//! What a crash leaves, and how it is taken away or taken up again.

use std::collections::BTreeSet;

use wrenn_node::net::build::{Step, raise_by, raze};
use wrenn_node::net::{NetError, Serial, Slot, SlotIndex, SlotPool, SlotTag, sweep};

use crate::guest::Guest;
use crate::world::{
    NOBODY, OUTSIDE, PRIVATE, await_traces, call, call_from_host, on_a_host, reachable, traces,
};

fn tag() -> SlotTag {
    "t".parse().unwrap()
}

#[test]
fn a_sweep_leaves_nothing_of_a_slot_that_stopped_at_any_step() {
    on_a_host(|host| {
        let before = traces();
        for count in 0..=Step::ALL.len() {
            let slot = Slot::new(&tag(), Serial(count as u64), SlotIndex(0));
            raise_by(&slot, &[], &Step::ALL[..count]).unwrap();
            assert_eq!(traces() == before, count == 0, "after {count} steps");

            let swept = host.wait(sweep::sweep(&tag(), &BTreeSet::new())).unwrap();
            assert_eq!(traces(), before, "after {count} steps");
            assert_eq!(swept.slots.len(), usize::from(count > 0));
        }
    });
}

#[test]
fn a_slot_half_unmade_is_swept_too() {
    on_a_host(|host| {
        let before = traces();
        let slot = Slot::new(&tag(), Serial(5), SlotIndex(0));
        raise_by(&slot, &[], &Step::ALL).unwrap();
        crate::world::shell(&format!("ip link del {}", slot.veth));
        host.wait(sweep::sweep(&tag(), &BTreeSet::new())).unwrap();
        await_traces(&before);
        raise_by(&Slot::new(&tag(), Serial(6), SlotIndex(0)), &[], &Step::ALL).unwrap();
        crate::world::shell("umount /run/netns/wrenn-t-6; rm /run/netns/wrenn-t-6");
        host.wait(sweep::sweep(&tag(), &BTreeSet::new())).unwrap();
        await_traces(&before);
    });
}

#[test]
fn unmaking_a_slot_twice_is_as_good_as_once() {
    on_a_host(|_| {
        let before = traces();
        let slot = Slot::new(&tag(), Serial(1), SlotIndex(3));
        raise_by(&slot, &[], &Step::ALL).unwrap();
        raze(&slot).unwrap();
        raze(&slot).unwrap();
        await_traces(&before);
    });
}

#[test]
fn a_failed_step_is_named_and_undone() {
    on_a_host(|_| {
        let before = traces();
        let slot = Slot::new(&tag(), Serial(1), SlotIndex(3));
        crate::world::shell(&format!(
            "ip link add {} type veth peer name other",
            slot.veth
        ));
        let with_squatter = traces();
        let err = wrenn_node::net::build::raise(&slot, &[]).unwrap_err();

        assert_eq!(err.to_string(), "create the veth of slot 1");
        assert_ne!(
            traces(),
            with_squatter,
            "the name is of our tag: it is ours to take"
        );
        await_traces(&before);
    });
}

#[test]
fn a_sweep_keeps_what_it_is_told_and_what_is_not_of_its_tag() {
    on_a_host(|host| {
        let slot = |tag: &str, serial, index| {
            let slot = Slot::new(&tag.parse().unwrap(), Serial(serial), SlotIndex(index));
            raise_by(&slot, &[], &Step::ALL).unwrap();
            slot
        };
        let kept = slot("t", 1, 0);
        let foreign = [slot("tt", 2, 1), slot("x", 3, 2)];
        let with_kept = traces();
        slot("t", 4, 3);
        let keep = BTreeSet::from([kept.serial]);
        for expected in [vec![Serial(4)], vec![]] {
            let swept = host.wait(sweep::sweep(&tag(), &keep)).unwrap();
            assert_eq!(swept.slots, expected.into_iter().collect());
            await_traces(&with_kept);
        }
        drop(foreign);
    });
}

#[test]
fn a_daemon_that_died_finds_its_slots_again_and_its_guests_never_noticed() {
    on_a_host(|host| {
        // A runtime of its own, dropped as it stands: no task gets to clean up.
        let first = tokio::runtime::Runtime::new().unwrap();
        let tasks = wrenn_node::base::stop::Tasks::new();
        let pool = first
            .block_on(SlotPool::start(host.config(), &tasks))
            .unwrap();
        let slot = first.block_on(pool.take()).unwrap();
        let lost = first.block_on(pool.take()).unwrap();
        let guest = Guest::new(&slot);
        first.shutdown_timeout(std::time::Duration::from_secs(5));

        let recorded: Slot = serde_json::from_str(&serde_json::to_string(&slot).unwrap()).unwrap();
        let keep = BTreeSet::from([recorded.serial]);
        let swept = host.wait(sweep::sweep(&tag(), &keep)).unwrap();
        assert!(swept.slots.contains(&lost.serial));
        assert!(!swept.slots.contains(&slot.serial));
        let node = host.node(|_| {});
        let (serial, index) = (recorded.serial, recorded.index);
        assert_eq!(host.wait(node.pool.adopt(serial, index)).unwrap(), slot);

        assert_eq!(call_from_host(slot.guest_addr), Some(slot.host_addr));
        assert!(call(&guest.path, OUTSIDE).is_some());
        assert_eq!(reachable(&guest.path, &PRIVATE), NOBODY);
        let fresh = host.wait(node.pool.take()).unwrap();
        assert!(fresh.serial > lost.serial, "serials are never used again");
        assert_ne!(fresh.index, slot.index);
        drop(guest);
        host.wait(node.pool.release(slot)).unwrap();
    });
}

#[test]
fn a_slot_that_is_not_there_cannot_be_adopted() {
    on_a_host(|host| {
        let slot = Slot::new(&tag(), Serial(3), SlotIndex(1));
        raise_by(&slot, &[], &Step::ALL).unwrap();
        let node = host.node(|_| {});
        for (serial, index) in [(Serial(9), SlotIndex(1)), (slot.serial, SlotIndex(2))] {
            let refusal = host.wait(node.pool.adopt(serial, index));
            assert!(matches!(refusal, Err(NetError::Gone { .. })), "{refusal:?}");
        }
        host.wait(node.pool.adopt(slot.serial, slot.index)).unwrap();
        let again = host.wait(node.pool.adopt(slot.serial, slot.index));
        assert!(matches!(again, Err(NetError::Gone { .. })));
    });
}
