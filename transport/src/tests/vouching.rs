//! A node whose member list is behind, and the key it does not know yet.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;
use crate::{BoxFuture, DialError};

/// The question a voucher asks: is this key a member's?
const ASK: Method = SERVICE.method(7);

/// Answers for its own member list.
struct Knows(Arc<Transport>);

impl Handler for Knows {
    async fn call(&self, call: Call) -> Result<Bytes, RpcError> {
        let key = NodeKey(call.body[..].try_into().expect("a key"));
        let known = self.0.membership().members.contains(&key);
        Ok(Bytes::copy_from_slice(&[known.into()]))
    }
}

/// Lets `node` ask `peer` about unknown keys, and counts how often it does.
fn asks(node: &Arc<Transport>, peer: NodeKey) -> Arc<AtomicUsize> {
    let asked = Arc::new(AtomicUsize::new(0));
    let (count, weak) = (Arc::clone(&asked), Arc::downgrade(node));
    node.set_voucher(move |key| -> BoxFuture<'static, bool> {
        count.fetch_add(1, Ordering::SeqCst);
        let weak = weak.clone();
        Box::pin(async move {
            let node = weak.upgrade().expect("alive");
            let body = Bytes::copy_from_slice(&key.0);
            let answer = node.call(peer, ASK, body, deadline()).await;
            answer.is_ok_and(|answer| answer == [1][..])
        })
    });
    asked
}

/// A node that is behind and asks the second, which knows the third.
struct Three {
    behind: Arc<Transport>,
    knows: Arc<Transport>,
    new: Transport,
    asked: Arc<AtomicUsize>,
}

async fn three(limits: Limits) -> Three {
    let start = || start(&identity(), limits);
    let (behind, knows, new) = (Arc::new(start()), Arc::new(start()), start());
    behind.set_membership(members(1, &[behind.key(), knows.key()]));
    for node in [&*knows, &new] {
        node.set_membership(members(2, &[behind.key(), knows.key(), new.key()]));
    }
    knows.register(SERVICE, Knows(Arc::clone(&knows)));
    connect(&behind, &knows).await;
    let asked = asks(&behind, knows.key());
    Three {
        behind,
        knows,
        new,
        asked,
    }
}

/// Asks once, as far as a test is concerned.
fn patient() -> Limits {
    Limits {
        redial: Duration::ZERO,
        ..Limits::default()
    }
}

/// Asks again soon.
fn impatient() -> Limits {
    Limits {
        vouched: Duration::from_millis(200),
        ..patient()
    }
}

impl Three {
    async fn dial(&self) -> Result<(), DialError> {
        let lane = Lane::Control;
        let (to, key) = (address(&self.behind, lane), self.behind.key());
        self.new.connect(lane, to, key, deadline()).await
    }

    async fn stop(self) {
        for node in [&*self.behind, &*self.knows, &self.new] {
            soon(node.stop(deadline())).await;
        }
    }
}

#[tokio::test]
async fn an_unknown_key_is_let_in_when_a_known_peer_vouches_for_it() {
    let three = three(patient()).await;
    three.dial().await.expect("vouched for");
    let (behind, new) = (&three.behind, &three.new);
    new.ping(Lane::Control, behind.key(), deadline())
        .await
        .expect("answered");
    // The node that is behind can call back, which is how it catches up.
    behind
        .ping(Lane::Control, new.key(), deadline())
        .await
        .expect("answered");
    // A list that has not caught up yet does not cut it off, and one that has ends the asking.
    behind.set_membership(members(1, &[behind.key(), three.knows.key()]));
    assert!(behind.is_connected(Lane::Control, new.key()));
    behind.set_membership(members(2, &[behind.key(), three.knows.key(), new.key()]));
    assert!(behind.is_connected(Lane::Control, new.key()));
    assert_eq!(three.asked.load(Ordering::SeqCst), 1);
    three.stop().await;
}

/// The second lane comes in on the first one's word, and goes with it.
#[tokio::test]
async fn a_key_that_is_no_longer_vouched_for_loses_both_lanes() {
    let three = three(impatient()).await;
    let (behind, new) = (&three.behind, &three.new);
    let mut connections = Vec::new();
    for lane in [Lane::Control, Lane::Bulk] {
        new.connect(lane, address(behind, lane), behind.key(), deadline())
            .await
            .expect("vouched for");
        connections.push(new.connection(lane, behind.key()).expect("connected"));
    }
    let list = members(3, &[behind.key(), three.knows.key()]);
    three.knows.set_membership(list);
    for connection in &connections {
        assert_eq!(close_code(connection).await, CloseCode::NotMember);
    }
    assert!(!behind.is_connected(Lane::Bulk, new.key()));
    three.stop().await;
}

#[tokio::test]
async fn a_key_that_nobody_vouches_for_stays_out() {
    let three = three(patient()).await;
    let list = members(3, &[three.behind.key(), three.knows.key()]);
    three.knows.set_membership(list);
    let err = three.dial().await.expect_err("nobody knows it");
    assert!(matches!(err, DialError::KeyRefused { .. }), "{err}");
    assert_eq!(three.asked.load(Ordering::SeqCst), 1);
    three.stop().await;
}

/// The peer that is asked may itself be behind: it must not undo a removal.
#[tokio::test]
async fn a_removed_key_is_not_vouched_back_in() {
    let three = three(patient()).await;
    three.dial().await.expect("vouched for");
    let (behind, new) = (&three.behind, &three.new);
    let connection = new
        .connection(Lane::Control, behind.key())
        .expect("connected");
    behind.set_membership(members(2, &[behind.key(), three.knows.key(), new.key()]));
    behind.set_membership(members(3, &[behind.key(), three.knows.key()]));
    assert_eq!(close_code(&connection).await, CloseCode::Removed);
    let err = three.dial().await.expect_err("removed");
    assert!(matches!(err, DialError::KeyRefused { .. }), "{err}");
    assert_eq!(
        three.asked.load(Ordering::SeqCst),
        1,
        "not even asked about"
    );
    three.stop().await;
}

#[tokio::test]
async fn a_key_that_stays_off_the_list_is_asked_about_again_and_closed_on_a_no() {
    let three = three(impatient()).await;
    three.dial().await.expect("vouched for");
    let connection = three
        .new
        .connection(Lane::Control, three.behind.key())
        .expect("connected");
    let list = members(3, &[three.behind.key(), three.knows.key()]);
    three.knows.set_membership(list);
    assert_eq!(close_code(&connection).await, CloseCode::NotMember);
    assert!(!three.behind.is_connected(Lane::Control, three.new.key()));
    assert!(three.asked.load(Ordering::SeqCst) >= 2);
    three.stop().await;
}

/// A question under way, which counts until it is dropped.
struct Held(Arc<AtomicUsize>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Strangers that are held cost a bounded number of questions, and a member gets through.
#[tokio::test]
async fn a_crowd_of_unknown_keys_is_held_in_bounded_number_and_time() {
    let limits = Limits {
        // The whole crowd has to come within it on a busy machine, and is held so long.
        handshake: Duration::from_secs(6),
        ..Limits::default()
    };
    let (node, member) = two(limits);
    let overrun = Arc::new(AtomicBool::new(false));
    let (over, now) = (Arc::clone(&overrun), Arc::new(AtomicUsize::new(0)));
    node.set_voucher(move |_| {
        let count = now.fetch_add(1, Ordering::SeqCst);
        over.fetch_or(count >= crate::limits::MAX_VOUCHING, Ordering::SeqCst);
        let held = Held(Arc::clone(&now));
        Box::pin(async move {
            let _held = held;
            std::future::pending::<bool>().await
        })
    });
    let mut crowd = Vec::new();
    for _ in 0..=crate::limits::MAX_VOUCHING {
        crowd.push(Rough::handshake(&identity(), &node, Lane::Control, Alpn::Mesh).await);
    }
    let last = crowd.pop().expect("one too many");
    assert_eq!(close_code(&last.connection).await, CloseCode::Crowded);
    connect(&member, &node).await;
    for stranger in &crowd {
        assert_eq!(close_code(&stranger.connection).await, CloseCode::NotMember);
    }
    assert!(!overrun.load(Ordering::SeqCst));
    stop([node, member]).await;
}
