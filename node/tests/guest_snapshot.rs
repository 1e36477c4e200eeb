//! The node's half of pause and resume against the real agent, and against agents that do what the
//! real one would not.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::post;
use envd::agent::{Agent, Surroundings};
use proto::epoch::Epoch;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use wrenn_node::base::remedy::Remedy;
use wrenn_node::guest::{
    AgentSetup, Fork, Generation, Guest, ProcessCommand, Quiesce, QuiesceError, Restore,
    RestoreError, TcpDial, Workload,
};

const SEALED_TOKEN: &str = "sealed";
const NEW_TOKEN: &str = "new";
const QUIESCE: Quiesce = Quiesce {
    epoch: Epoch(7),
    freeze_disk: false,
    reclaim: false,
    undo_after: Duration::from_secs(60),
};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// The real agent, serving in this process.
struct RealAgent {
    agent: Arc<Agent>,
    address: SocketAddr,
    _stop: DropGuard,
}

impl RealAgent {
    async fn start() -> Self {
        let agent = Arc::new(Agent::new(Surroundings::default()));
        let reaper = agent.processes.reaper().clone();
        tokio::spawn(reaper.listen().expect("signals can be heard"));
        let any = "127.0.0.1:0".parse().expect("an address");
        let listener = envd::serve::listen(any).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let stop = CancellationToken::new();
        let router = envd::http::router(agent.clone());
        let connections = agent.snapshots.connections.clone();
        let serving = envd::serve::run_known(listener, router, connections, stop.clone());
        tokio::spawn(serving);
        let real = Self {
            agent,
            address,
            _stop: stop.drop_guard(),
        };
        let setup = AgentSetup {
            token: SEALED_TOKEN.into(),
            sandbox_id: "cl-1".into(),
            template: "minimal".into(),
            hostname: None,
            default_user: Some("root".into()),
        };
        let told = real.guest(SEALED_TOKEN).set_up(&setup).await;
        told.expect("set up");
        real
    }

    /// A client with connections of its own.
    fn guest(&self, token: &str) -> Guest {
        Guest::new(Arc::new(TcpDial(self.address)), token).expect("a guest")
    }
}

fn restore(epoch: u64) -> Restore {
    Restore {
        epoch: Epoch(epoch),
        generation: Generation::fresh(),
        token: NEW_TOKEN.into(),
        sandbox_id: "cl-2".into(),
        template: "minimal".into(),
        env: None,
        fork: Some(Fork::named("twin")),
    }
}

async fn echo(guest: &Guest) -> Vec<u8> {
    let command = ProcessCommand {
        cmd: "/bin/sh".into(),
        args: vec!["-c".into(), "echo $WRENN_SANDBOX_ID".into()],
        ..ProcessCommand::default()
    };
    guest.run(command, None).await.expect("it ran").stdout
}

#[tokio::test]
async fn an_undone_pause_leaves_the_guest_as_it_was_for_the_same_client() {
    let real = RealAgent::start().await;
    let guest = real.guest(SEALED_TOKEN);
    assert_eq!(echo(&guest).await, b"cl-1\n");
    for _ in 0..3 {
        let done = guest.quiesce(&QUIESCE, soon()).await.expect("quiesced");
        assert_eq!(done.workload, Workload::Free);
        // The stream of the last command may still be ending where the machine is busy.
        assert!(done.streams <= 1, "{done:?}");
        assert!(done.took > Duration::ZERO);
        assert!(guest.undo_quiesce(Epoch(7), soon()).await.expect("undone"));
        assert!(!guest.undo_quiesce(Epoch(7), soon()).await.expect("again"));
        assert_eq!(echo(&guest).await, b"cl-1\n");
    }
}

#[tokio::test]
async fn a_restored_guest_answers_its_first_request_under_its_new_name_and_token() {
    let real = RealAgent::start().await;
    let before = real.guest(SEALED_TOKEN);
    before.quiesce(&QUIESCE, soon()).await.expect("quiesced");
    let after = real.guest(SEALED_TOKEN);
    let done = after.restore(&restore(8), soon()).await.expect("restored");
    assert_eq!((done.attempts, done.warnings.len()), (1, 0));
    assert_eq!(echo(&real.guest(NEW_TOKEN)).await, b"cl-2\n");
    let refused = real.guest(SEALED_TOKEN).processes().await;
    assert!(refused.is_err(), "the sealed token is no longer good");
}

#[tokio::test]
async fn a_restore_told_again_is_confirmed_again() {
    let real = RealAgent::start().await;
    let guest = real.guest(SEALED_TOKEN);
    let restore = restore(8);
    guest.restore(&restore, soon()).await.expect("restored");
    let again = guest.restore(&restore, soon()).await.expect("confirmed");
    assert_eq!(again.cut, 0);
}

#[tokio::test]
async fn an_older_owner_is_refused_in_everything() {
    let real = RealAgent::start().await;
    let guest = real.guest(SEALED_TOKEN);
    guest.restore(&restore(8), soon()).await.expect("restored");
    let guest = real.guest(NEW_TOKEN);
    let err = guest.quiesce(&QUIESCE, soon()).await.expect_err("stale");
    assert!(matches!(err, QuiesceError::Stale { .. }), "{err}");
    assert_eq!(err.remedy(), Remedy::WrongState);
    let err = guest.undo_quiesce(Epoch(7), soon()).await;
    assert!(matches!(err, Err(QuiesceError::Stale { .. })));
    let err = guest.restore(&restore(7), soon()).await.expect_err("stale");
    assert!(matches!(err, RestoreError::Stale { .. }), "{err}");
    assert_eq!(echo(&guest).await, b"cl-2\n");
}

#[tokio::test]
async fn a_wrong_token_is_told_at_once() {
    let real = RealAgent::start().await;
    let stranger = real.guest("wrong");
    let err = stranger.restore(&restore(8), soon()).await;
    assert!(matches!(
        err,
        Err(RestoreError::Refused { status: 401, .. })
    ));
    assert!(stranger.quiesce(&QUIESCE, soon()).await.is_err());
    assert!(!real.agent.snapshots.gate.is_closed());
}

/// An agent that says what the test wants.
async fn played(router: Router) -> Guest {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move { axum::serve(listener, router).await });
    Guest::new(Arc::new(TcpDial(address)), SEALED_TOKEN).expect("a guest")
}

const CONFIRMED: &str = r#"{"applied":true,"held":true,"cut":2,"warnings":["w"],"tookUs":5}"#;

#[tokio::test]
async fn a_restore_is_told_again_until_it_is_confirmed() {
    let told = Arc::new(AtomicUsize::new(0));
    let counter = told.clone();
    let answer = async move |order: String| match counter.fetch_add(1, Ordering::SeqCst) {
        // What is rehearsed names no life, and the agent refuses it.
        0 if order.contains(r#""generation":null"#) => (StatusCode::BAD_REQUEST, "{}"),
        1 => (StatusCode::SERVICE_UNAVAILABLE, "{}"),
        2 => (StatusCode::OK, "nonsense"),
        _ => (StatusCode::OK, CONFIRMED),
    };
    let guest = played(Router::new().route("/snapshot/restore", post(answer))).await;
    let done = guest.restore(&restore(8), soon()).await.expect("restored");
    assert_eq!((done.attempts, done.cut, done.held), (3, 2, true));
    assert_eq!(done.warnings, ["w"]);
    assert_eq!(told.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn a_guest_that_confirms_nothing_is_given_up_at_the_deadline() {
    let silent = async || {
        std::future::pending::<Result<(), Infallible>>()
            .await
            .map(|()| "")
    };
    let guest = played(Router::new().route("/snapshot/restore", post(silent))).await;
    let deadline = Instant::now() + Duration::from_millis(200);
    let err = guest.restore(&restore(8), deadline).await;
    let err = err.expect_err("unconfirmed");
    assert!(matches!(err, RestoreError::Unconfirmed { attempts: 1, .. }));
    assert_eq!(err.remedy(), Remedy::BlameGuest);
    assert!(Instant::now() < deadline + Duration::from_secs(5));
}

#[tokio::test]
async fn a_quiesce_whose_answer_is_lost_is_undone() {
    let undone = Arc::new(AtomicUsize::new(0));
    let counter = undone.clone();
    let undo = async move || {
        counter.fetch_add(1, Ordering::SeqCst);
        r#"{"undone":true}"#
    };
    let silent = async || {
        std::future::pending::<Result<(), Infallible>>()
            .await
            .map(|()| "")
    };
    let router = Router::new()
        .route("/snapshot/prepare", post(silent))
        .route("/snapshot/undo", post(undo));
    let guest = played(router).await;
    let deadline = Instant::now() + Duration::from_millis(200);
    let err = guest
        .quiesce(&QUIESCE, deadline)
        .await
        .expect_err("silence");
    assert_eq!(err.remedy(), Remedy::BlameGuest);
    assert_eq!(undone.load(Ordering::SeqCst), 1);
}
