//! Taking and giving back.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use wrenn_node::net::{NetError, SlotIndex};

use crate::world::{await_traces, on_a_host, shell, traces};

#[test]
fn an_exhausted_range_refuses_at_once_until_a_slot_comes_back() {
    on_a_host(|host| {
        let node = host.node(|config| config.index_count = 3);
        let mut slots: Vec<_> = (0..3)
            .map(|_| host.wait(node.pool.take()).unwrap())
            .collect();
        let indexes: BTreeSet<_> = slots.iter().map(|slot| slot.index).collect();
        assert_eq!(indexes.len(), 3);
        let refusal = host.wait(node.pool.take()).unwrap_err();
        assert!(
            matches!(refusal, NetError::Exhausted { count: 3 }),
            "{refusal}"
        );

        let back = slots.pop().unwrap();
        let index = back.index;
        host.wait(node.pool.release(back)).unwrap();
        assert_eq!(host.wait(node.pool.take()).unwrap().index, index);
    });
}

#[test]
fn a_used_slot_is_gone_for_good_and_cannot_be_released_twice() {
    on_a_host(|host| {
        let node = host.node(|config| config.pool_target = 0);
        let before = traces();
        let slot = host.wait(node.pool.take()).unwrap();
        host.wait(node.pool.release(slot.clone())).unwrap();
        await_traces(&before);
        let again = host.wait(node.pool.release(slot.clone()));
        assert!(matches!(again, Err(NetError::NotHeld(serial)) if serial == slot.serial));
        assert_ne!(host.wait(node.pool.take()).unwrap().serial, slot.serial);
    });
}

#[test]
fn a_caller_who_gives_up_loses_no_slot() {
    on_a_host(|host| {
        let node = host.node(|config| (config.index_count, config.pool_target) = (1, 1));
        for _time in 0..20 {
            host.wait(async {
                let mut taking = pin!(node.pool.take());
                let mut idle = Context::from_waker(Waker::noop());
                for _poll in 0..3 {
                    // Given up at whatever point it has got to by then.
                    if let Poll::Ready(taken) = taking.as_mut().poll(&mut idle) {
                        node.pool.release(taken.unwrap()).await.unwrap();
                        return;
                    }
                    tokio::task::yield_now().await;
                }
            });
        }
        // The pool may still be learning of the last one.
        let slot = host.wait(async {
            loop {
                match node.pool.take().await {
                    Err(NetError::Exhausted { .. }) => tokio::task::yield_now().await,
                    taken => return taken.unwrap(),
                }
            }
        });
        assert_eq!(slot.index, SlotIndex(0));
    });
}

#[test]
fn callers_in_a_crowd_all_get_slots_of_their_own() {
    on_a_host(|host| {
        let node = host.node(|_| {});
        let slots: BTreeSet<_> = host.wait(async {
            let crowd: Vec<_> = (0..16)
                .map(|_| {
                    tokio::spawn({
                        let pool = node.pool.clone();
                        async move { pool.take().await.unwrap().index }
                    })
                })
                .collect();
            futures::future::join_all(crowd)
                .await
                .into_iter()
                .map(Result::unwrap)
                .collect()
        });
        assert_eq!(slots.len(), 16);
    });
}

#[test]
fn a_stop_unmakes_what_nobody_uses_and_leaves_the_rest() {
    on_a_host(|host| {
        let node = host.node(|_| {});
        let slot = host.wait(node.pool.take()).unwrap();
        host.wait(node.tasks.stop_and_join());
        let links = shell("ip -o link | grep -c ' wt-'");
        assert_eq!(links.trim(), "1");
        assert!(slot.netns_path.exists());
        assert!(matches!(
            host.wait(node.pool.take()),
            Err(NetError::Stopped)
        ));
        host.wait(node.pool.shutdown());
    });
}

#[test]
fn addresses_already_on_the_host_are_not_given_out() {
    on_a_host(|host| {
        shell("ip addr add 198.18.0.1/31 dev lo");
        let node = host.node(|config| config.index_count = 2);
        assert_eq!(host.wait(node.pool.take()).unwrap().index, SlotIndex(1));
        assert!(matches!(
            host.wait(node.pool.take()),
            Err(NetError::Exhausted { count: 1 })
        ));
    });
}

#[test]
fn a_range_past_the_last_index_is_refused() {
    on_a_host(|host| {
        let mut config = host.config();
        (config.index_base, config.index_count) = (65_535, 2);
        let tasks = wrenn_node::base::stop::Tasks::new();
        let refusal = host.wait(wrenn_node::net::SlotPool::start(config, &tasks));
        assert!(matches!(
            refusal,
            Err(NetError::BadRange {
                base: 65_535,
                count: 2
            })
        ));
    });
}
