//! Calls, deadlines, giving up, stopping.

use std::future::pending;

use tokio::sync::{Notify, mpsc};

use super::*;

/// A handler whose calls say when they begin and end as the test wants.
struct Held {
    begun: mpsc::UnboundedSender<Guard>,
    release: Arc<Notify>,
}

/// Tells when the handler's future is gone.
struct Guard {
    ended: Arc<Notify>,
}

struct OnDrop(Arc<Notify>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl Handler for Held {
    async fn call(&self, call: Call) -> Result<Bytes, RpcError> {
        let ended = Arc::new(Notify::new());
        let _on_drop = OnDrop(Arc::clone(&ended));
        self.begun.send(Guard { ended }).expect("the test listens");
        self.release.notified().await;
        Ok(call.body)
    }
}

fn hold(node: &Transport) -> (mpsc::UnboundedReceiver<Guard>, Arc<Notify>) {
    let (begun, calls) = mpsc::unbounded_channel();
    let release = Arc::new(Notify::new());
    let handler = Held {
        begun,
        release: Arc::clone(&release),
    };
    node.register(SERVICE, handler);
    (calls, release)
}

/// Answers in the ways a handler can fail.
struct Failing;

impl Handler for Failing {
    async fn call(&self, call: Call) -> Result<Bytes, RpcError> {
        match call.method.number {
            1 => Err(RpcError::rejected("not in this state")),
            2 => Err(RpcError::failed("x".repeat(10_000))),
            3 => Ok(vec![0; crate::limits::FRAME_BYTES].into()),
            4 => panic!("a bug in a handler"),
            _ => pending().await,
        }
    }
}

async fn outcome(a: &Transport, b: &Transport, number: u16, deadline: Instant) -> RpcError {
    let method = SERVICE.method(number);
    let called = a.call(b.key(), method, Bytes::new(), deadline).await;
    called.expect_err("this handler always fails")
}

#[tokio::test]
async fn every_failure_of_a_handler_reaches_the_caller_by_name() {
    let (a, b) = two(Limits::default());
    connect(&a, &b).await;
    let err = outcome(&a, &b, 1, deadline()).await;
    assert!(
        matches!(err, RpcError::NotServed { .. }),
        "nothing registered: {err}"
    );
    assert!(!err.may_have_acted());

    b.register(SERVICE, Failing);
    let err = outcome(&a, &b, 1, deadline()).await;
    assert!(matches!(&err, RpcError::Rejected { reason } if reason == "not in this state"));
    let err = outcome(&a, &b, 2, deadline()).await;
    let max = crate::limits::REASON_BYTES;
    assert!(
        matches!(&err, RpcError::Failed { reason } if reason.len() == max),
        "{err}"
    );
    let err = outcome(&a, &b, 3, deadline()).await;
    assert!(
        matches!(err, RpcError::TooLarge) && err.may_have_acted(),
        "{err}"
    );
    let err = outcome(&a, &b, 4, deadline()).await;
    let code = CloseCode::HandlerFailed;
    assert!(
        matches!(err, RpcError::Closed { code: told } if told == code),
        "{err}"
    );
    let err = outcome(&a, &b, 5, Instant::now() + Duration::from_millis(50)).await;
    assert!(
        matches!(err, RpcError::Deadline) && err.may_have_acted(),
        "{err}"
    );

    a.ping(Lane::Control, b.key(), deadline())
        .await
        .expect("the connection lives on");
    stop([a, b]).await;
}

#[tokio::test]
async fn calling_a_node_without_a_connection_fails_at_once() {
    let (a, b) = two(Limits::default());
    let err = outcome(&a, &b, 1, deadline()).await;
    assert!(
        matches!(err, RpcError::NotConnected { peer } if peer == b.key()),
        "{err}"
    );
    stop([a, b]).await;
}

#[tokio::test]
async fn a_request_above_the_limit_is_refused_before_it_is_sent() {
    let (a, b) = two(Limits::default());
    connect(&a, &b).await;
    let body = Bytes::from(vec![0; crate::limits::FRAME_BYTES]);
    let err = a
        .call(b.key(), ECHO, body, deadline())
        .await
        .expect_err("too large");
    assert!(matches!(err, RpcError::TooLarge), "{err}");
    stop([a, b]).await;
}

#[tokio::test]
async fn thousands_of_calls_at_once_are_all_answered() {
    let (a, b) = two(Limits::default());
    b.register(SERVICE, Echo);
    connect(&a, &b).await;
    let a = Arc::new(a);
    let mut calls = tokio::task::JoinSet::new();
    // Twice the streams a connection has.
    for number in 0..2 * crate::limits::CONTROL_STREAMS {
        let (a, to) = (Arc::clone(&a), b.key());
        calls.spawn(async move {
            let body = Bytes::from(number.to_be_bytes().repeat(64));
            let back = a
                .call(to, ECHO, body.clone(), deadline())
                .await
                .expect("answered");
            assert_eq!(back, body);
        });
    }
    while let Some(call) = soon(calls.join_next()).await {
        call.expect("no call failed");
    }
    soon(a.stop(deadline())).await;
    stop([b]).await;
}

#[tokio::test]
async fn a_caller_that_gives_up_ends_the_handler_s_future() {
    let (a, b) = two(Limits::default());
    let (mut calls, _release) = hold(&b);
    connect(&a, &b).await;
    let call = a.call(b.key(), ECHO, Bytes::new(), deadline());
    let guard = tokio::select! {
        _ = call => panic!("the handler holds it"),
        guard = soon(calls.recv()) => guard.expect("begun"),
    };
    // `select!` has dropped the call.
    soon(guard.ended.notified()).await;
    stop([a, b]).await;
}

#[tokio::test]
async fn stopping_lets_a_call_under_way_finish_and_then_says_goodbye_by_name() {
    let (a, b) = two(Limits::default());
    let (mut calls, release) = hold(&b);
    connect(&a, &b).await;
    let connection = a.connection(Lane::Control, b.key()).expect("live");
    let (answer, code, ()) = soon(async {
        let call = a.call(b.key(), ECHO, Bytes::from_static(b"x"), deadline());
        let stopping = async {
            calls.recv().await.expect("begun");
            // Polled once before the release, so stopping has begun when the call ends.
            let stop = b.stop(deadline());
            let release = async { release.notify_one() };
            tokio::join!(biased; stop, release);
        };
        tokio::join!(call, close_code(&connection), stopping)
    })
    .await;
    assert_eq!(answer.expect("finished"), "x");
    assert_eq!(code, CloseCode::Stopping);
    stop([a]).await;
}

#[tokio::test]
async fn stopping_cuts_off_calls_that_outlast_its_deadline() {
    let (a, b) = two(Limits::default());
    let (mut calls, _release) = hold(&b);
    connect(&a, &b).await;
    let call = a.call(b.key(), ECHO, Bytes::new(), deadline());
    let stopping = async {
        let guard = calls.recv().await.expect("begun");
        b.stop(Instant::now() + Duration::from_millis(50)).await;
        guard.ended.notified().await;
    };
    let (outcome, ()) = soon(async { tokio::join!(call, stopping) }).await;
    let err = outcome.expect_err("cut off");
    let code = CloseCode::Stopping;
    assert!(
        matches!(err, RpcError::Closed { code: told } if told == code),
        "{err}"
    );
    assert!(err.may_have_acted());
    stop([a]).await;
}

/// Binds a port that the runtime is about to give up.
async fn start_again(identity: &Identity, at: SocketAddr) -> Transport {
    let again = async {
        loop {
            match Transport::start(identity, Config::at(at, loopback())) {
                Ok(node) => return node,
                Err(_still_bound) => tokio::task::yield_now().await,
            }
        }
    };
    soon(again).await
}

#[tokio::test]
async fn a_restarted_node_is_reached_under_its_key_and_an_impostor_at_its_address_is_not() {
    let me = identity();
    let eager = Limits {
        redial: Duration::ZERO,
        ..Limits::default()
    };
    let (a, b) = (start(&me, eager), start(&identity(), eager));
    let list = members(1, &[a.key(), b.key()]);
    for node in [&a, &b] {
        node.set_membership(list.clone());
    }
    connect(&b, &a).await;
    let at = address(&a, Lane::Control);
    let seen_by_b = b.connection(Lane::Control, me.key()).expect("live");
    stop([a]).await;
    assert_eq!(close_code(&seen_by_b).await, CloseCode::Stopping);

    let impostor = start_again(&identity(), at).await;
    let err = b
        .connect(Lane::Control, at, me.key(), deadline())
        .await
        .expect_err("not a");
    assert!(matches!(err, crate::DialError::WrongKey { .. }), "{err}");
    stop([impostor]).await;

    let a = start_again(&me, at).await;
    a.set_membership(list);
    connect(&b, &a).await;
    b.ping(Lane::Control, me.key(), deadline())
        .await
        .expect("answered");
    stop([a, b]).await;
}

#[tokio::test]
async fn a_second_node_at_a_taken_address_is_refused_by_name() {
    let a = start(&identity(), Limits::default());
    let taken = Config::at(address(&a, Lane::Control), loopback());
    let err = Transport::start(&identity(), taken).err().expect("taken");
    let lane = Lane::Control;
    assert!(matches!(err, crate::StartError::Bind { lane: which, .. } if which == lane));
    stop([a]).await;
}
