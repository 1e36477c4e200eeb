//! What a client made through another node a moment ago, of which this node has not heard yet: it is not told that
//! there is no such thing.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures::{FutureExt as _, SinkExt as _, StreamExt as _};
use http::Method;
use proto::ids::{
    BuildId, ChannelId, HostId, KeyId, NodeKey, SandboxId, SnapshotId, TeamId, TokenId, UserId,
};
use proto::units::{Mib, Stamp};
use raft::command::{BuildChange, CheckpointSandbox, Command};
use raft::state::{
    Build, BuildSpec, Channel, Checkpoint, Key, Member, Node, Purpose, Role, SandboxSpec,
    SnapshotKind, Team, Template, Token,
};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpStream;
use tokio::time::{self, Instant};
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::Message;

use crate::world::{ADMIN_KEY, Answer, HERE, KEY, PATIENCE, World, full, propose};

/// The team of [`KEY`].
const TEAM: TeamId = TeamId([1; 16]);
/// A team that is made elsewhere.
const NEW_TEAM: TeamId = TeamId([3; 16]);
/// A key that is made elsewhere.
const NEW_KEY: &str = "wrn_00000000000000000000000000000003";

/// A port at which nothing listens.
const CLOSED: u16 = 1;

/// Has this node hear of `made` once it catches up with the cluster.
fn made_elsewhere(world: &World, made: Command) {
    let proposer = world.proposer.clone();
    let happens = async move { propose(&proposer, made).await };
    *world.cluster.unheard.lock().unwrap() = Some(happens.boxed());
}

/// Whether this node has asked the cluster for news since [`made_elsewhere`].
fn has_asked(world: &World) -> bool {
    world.cluster.unheard.lock().unwrap().is_none()
}

async fn get_at_once(world: &World, made: Command, path: &str) -> Answer {
    made_elsewhere(world, made);
    let answer = world.ask(Method::GET, path, KEY, "").await;
    assert!(has_asked(world), "{path} was known before");
    answer
}

fn template(name: &str) -> Command {
    Command::PutTemplate(Template {
        name: name.into(),
        digest: [1; 32],
        disk: Mib(5120),
        size_bytes: 300 << 20,
        created_at: Stamp(0),
    })
}

fn sandbox(id: SandboxId) -> Command {
    let spec = SandboxSpec {
        template: "minimal".into(),
        vcpus: 1,
        memory: Mib(512),
        disk: Mib(5120),
        ..SandboxSpec::default()
    };
    Command::CreateSandbox {
        id,
        team: TEAM,
        spec,
        hints: Vec::new(),
    }
}

fn build(id: BuildId) -> Command {
    let Command::CreateSandbox { spec, .. } = sandbox(SandboxId([9; 16])) else {
        unreachable!("it makes a sandbox");
    };
    let build = Build {
        id,
        team: TEAM,
        spec: BuildSpec {
            name: "mine".into(),
            sandbox: spec,
            recipe: vec!["RUN true".into()],
            skip_pre_post: true,
            total_steps: 1,
            ..BuildSpec::default()
        },
        owner: HERE,
        ..Build::default()
    };
    Command::Build(BuildChange::Start(Box::new(build)))
}

fn channel(id: ChannelId) -> Command {
    Command::PutChannel(Channel {
        id,
        team: TEAM,
        name: "mine".into(),
        url: "https://example.com/".into(),
        secret: "a secret of some length".into(),
        enabled: true,
        ..Channel::default()
    })
}

fn new_key() -> Command {
    Command::PutKey(Key {
        id: KeyId([3; 16]),
        team: TEAM,
        name: "new".into(),
        hash: Sha256::digest(NEW_KEY).into(),
        shown: NEW_KEY[..10].into(),
        ..Key::default()
    })
}

fn new_team() -> Command {
    Command::PutTeam(Team {
        id: NEW_TEAM,
        name: "new".into(),
        ..Team::default()
    })
}

fn token(number: u8) -> Token {
    Token {
        id: TokenId([number; 16]),
        public_key: [number; 32],
        team: None,
        expires_at: Stamp(u64::MAX),
        uses_left: 1,
        created_at: Stamp(0),
        created_by: String::new(),
        revoked: false,
        redeemed: Vec::new(),
    }
}

#[tokio::test]
async fn what_was_made_through_another_node_is_shown_at_once() {
    let world = World::new().await;
    for (number, of_it) in [(1, ""), (2, "?consistency=local")] {
        let id = SandboxId([number; 16]);
        let path = format!("/v1/capsules/{id}{of_it}");
        let shown = get_at_once(&world, sandbox(id), &path).await;
        assert_eq!(shown.is(200).json()["id"], id.to_string());
    }
    for (number, of_it) in [(3, ""), (4, "/logs"), (5, "/stream")] {
        let id = BuildId([number; 16]);
        let path = format!("/v1/builds/{id}{of_it}");
        get_at_once(&world, build(id), &path).await.is(200);
    }
    let id = ChannelId([6; 16]);
    let path = format!("/v1/channels/{id}");
    get_at_once(&world, channel(id), &path).await.is(200);
    for (number, kind) in [(17, "nodes"), (18, "hosts")] {
        let (name, token) = (format!("new{number}"), token(number));
        let path = format!("/v1/{kind}/{name}");
        let joins = Command::RedeemToken {
            token: token.id,
            node: Node {
                name,
                key: NodeKey([number; 32]),
                cluster_address: format!("10.0.0.{number}:7321"),
                ..Node::default()
            },
        };
        propose(&world.proposer, Command::PutToken(token)).await;
        get_at_once(&world, joins, &path).await.is(200);
    }
    let id = SandboxId([7; 16]);
    let path = format!("/v1/capsules/{id}/metrics");
    get_at_once(&world, sandbox(id), &path).await.is(200);
    made_elsewhere(&world, new_team());
    let path = format!("/v1/teams/{NEW_TEAM}");
    world.ask(Method::GET, &path, ADMIN_KEY, "").await.is(200);
    let token = token(4);
    let path = format!("/v1/hosts/{}", HostId::from(token.id));
    made_elsewhere(&world, Command::PutToken(token));
    let host = world.ask(Method::GET, &path, ADMIN_KEY, "").await;
    assert_eq!(host.is(200).json()["status"], "pending");
}

#[tokio::test]
async fn what_was_made_through_another_node_is_used_and_changed_at_once() {
    let world = World::new().await;
    let mut node = world.proposer.view().state().node(HERE).unwrap().clone();
    node.templates.insert("other".into(), [1; 32]);
    propose(&world.proposer, Command::AdmitNode(node)).await;
    made_elsewhere(&world, template("other"));
    let made = world.post("/v1/capsules", json!({"template": "other"}));
    let id: SandboxId = made.await.is(201).json()["id"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    made_elsewhere(&world, template("third"));
    let asked = json!({"name": "built", "base_template": "third", "recipe": ["RUN true"]});
    world.post("/v1/builds", asked).await.is(201);

    let called_off = BuildId([3; 16]);
    made_elsewhere(&world, build(called_off));
    let path = format!("/v1/builds/{called_off}/cancel");
    world.post(&path, json!({})).await.is(204);

    let quiet = ChannelId([6; 16]);
    made_elsewhere(&world, channel(quiet));
    let path = format!("/v1/channels/{quiet}");
    let changed = world.ask(Method::PATCH, &path, KEY, r#"{"enabled":false}"#);
    assert_eq!(changed.await.is(200).json()["enabled"], false);

    let proposer = world.proposer.clone();
    let named = async move {
        let epoch = proposer.view().state().sandbox(id).unwrap().epoch;
        let purpose = Purpose::Name {
            name: "kept".into(),
            kind: SnapshotKind::Snapshot,
            overwrite: false,
            metadata: [].into(),
        };
        let ask = SnapshotId([7; 16]);
        let command = CheckpointSandbox {
            id,
            epoch,
            checkpoint: Checkpoint { ask, purpose },
            hints: Vec::new(),
        };
        propose(&proposer, Command::CheckpointSandbox(command)).await;
        let deadline = Instant::now() + PATIENCE;
        let is_named = |state: &raft::state::State| state.named(TEAM, "kept").map(drop);
        proposer.view().wait_for(deadline, is_named).await.unwrap();
    };
    *world.cluster.unheard.lock().unwrap() = Some(named.boxed());
    world.delete("/v1/snapshots/kept").await.is(204);
}

#[tokio::test]
async fn teams_and_members_of_another_nodes_making_are_worked_with_at_once() {
    let world = World::new().await;
    made_elsewhere(&world, new_team());
    let asked = json!({"team_id": NEW_TEAM.to_string()});
    world
        .admin(Method::POST, "/v1/api-keys", asked)
        .await
        .is(201);
    let user = UserId([5; 16]);
    let member = Member {
        team: NEW_TEAM,
        user,
        email: "ann@example.com".into(),
        name: "Ann".into(),
        role: Role::Member,
        joined_at: Stamp(0),
    };
    made_elsewhere(&world, Command::PutMember(member));
    let path = format!("/v1/teams/{NEW_TEAM}/members/{user}");
    let changed = world.admin(Method::PATCH, &path, json!({"role": "owner"}));
    changed.await.is(204);
}

#[tokio::test]
async fn a_key_that_was_made_through_another_node_opens_at_once() {
    let world = World::new().await;
    made_elsewhere(&world, new_key());
    let me = world.ask(Method::GET, "/v1/me", NEW_KEY, "").await;
    assert_eq!(me.is(200).json()["team"]["id"], TEAM.to_string());
}

/// Visits a port at which nothing listens: 502 for those who may come in.
async fn visit(world: &World, id: &str, headers: &[(&str, &str)]) -> Answer {
    let host = format!("{CLOSED}-{id}.localhost");
    let mut request = world.request(Method::GET, "/").header("host", host);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    world.send(request.body(full("")).unwrap()).await
}

/// A link of [`NEW_KEY`] as the node makes it that knows the key: `api/preview/pass.rs` has the words.
fn link(id: SandboxId) -> String {
    let end = u64::MAX.to_be_bytes();
    let mut word = [&[3; 16][..], &CLOSED.to_be_bytes(), &end].concat();
    let key: [u8; 32] = Sha256::digest(NEW_KEY).into();
    let mut signer = blake3::Hasher::new_keyed(&key);
    signer.update(b"wrenn preview link 1");
    signer.update(&id.0).update(&word);
    word.extend_from_slice(signer.finalize().as_bytes());
    URL_SAFE_NO_PAD.encode(word)
}

#[tokio::test]
async fn a_port_is_visited_at_once_by_key_and_link_of_another_nodes_making() {
    for by_link in [false, true] {
        let world = World::new().await;
        let id = world.capsule().await;
        let word = link(id.parse().unwrap());
        let pass = if by_link {
            ("wrenn-link", &*word)
        } else {
            ("x-api-key", NEW_KEY)
        };
        visit(&world, &id, &[pass]).await.is(401);
        made_elsewhere(&world, new_key());
        visit(&world, &id, &[pass]).await.is(502);
        assert!(has_asked(&world));
        made_elsewhere(&world, new_team());
        visit(&world, &id, &[pass]).await.is(502);
        assert!(!has_asked(&world), "what is known costs no question");
    }
}

#[tokio::test]
async fn a_port_that_was_opened_and_a_capsule_that_was_made_through_another_node_are_visited_at_once()
 {
    let world = World::new().await;
    let id = world.capsule().await;
    let opened = Command::ChangeSandbox {
        id: id.parse().unwrap(),
        ports_open: Some(true),
        wakes: None,
    };
    made_elsewhere(&world, opened);
    visit(&world, &id, &[]).await.is(502);

    let new = SandboxId([1; 16]);
    made_elsewhere(&world, sandbox(new));
    let seen = visit(&world, &new.to_string(), &[("x-api-key", KEY)]).await;
    assert!(matches!(seen.status, 409 | 502), "{}", seen.status);
}

#[tokio::test]
async fn a_key_that_was_made_through_another_node_opens_a_websocket_in_its_first_frame() {
    let world = World::new().await;
    let id = world.capsule().await;
    let url = format!("ws://{}/v1/capsules/{id}/exec/stream", world.address);
    let stream = TcpStream::connect(world.address).await.unwrap();
    let (mut socket, _) = client_async(url, stream).await.unwrap();
    made_elsewhere(&world, new_key());
    for said in [
        json!({"type": "auth", "token": NEW_KEY}),
        json!({"type": "start", "cmd": "/bin/true", "args": []}),
    ] {
        socket.send(Message::text(said.to_string())).await.unwrap();
    }
    let told = time::timeout(PATIENCE, socket.next()).await.unwrap();
    let told: Value = serde_json::from_str(told.unwrap().unwrap().to_text().unwrap()).unwrap();
    assert_eq!(told["type"], "start", "{told}");
    assert!(has_asked(&world));
}

#[tokio::test]
async fn what_is_no_key_makes_no_cluster_work() {
    let world = World::new().await;
    made_elsewhere(&world, new_key());
    for bad in ["", "wrn_", &NEW_KEY[..35], "e2b_0123456789abcdef"] {
        let answer = world.ask(Method::GET, "/v1/me", bad, "").await;
        answer.refused(401, "unauthorized");
    }
    let bare = world.request(Method::GET, "/v1/me").body(full(""));
    let answer = world.send(bare.unwrap()).await;
    answer.refused(401, "unauthorized");
    assert!(!has_asked(&world));
}

#[tokio::test]
async fn what_this_node_knows_and_what_it_lists_costs_no_question() {
    let world = World::new().await;
    let id = world.capsule().await;
    made_elsewhere(&world, new_key());
    for path in ["", "/logs"] {
        *world.guests.console.lock().unwrap() = Some(b"line\n".to_vec());
        let path = format!("/v1/capsules/{id}{path}");
        world.get(&path).await.is(200);
    }
    for list in ["capsules", "snapshots", "builds", "channels", "api-keys"] {
        world.get(&format!("/v1/{list}")).await.is(200);
    }
    world
        .get(&format!("/v1/teams/{TEAM}/members"))
        .await
        .is(200);
    assert!(!has_asked(&world));
}

#[tokio::test]
async fn without_a_quorum_what_this_node_knows_counts() {
    use std::sync::atomic::Ordering;

    let world = World::new().await;
    let id = world.capsule().await;
    world.cluster.quorum.store(false, Ordering::Relaxed);
    world.get(&format!("/v1/capsules/{id}")).await.is(200);
    let unknown = SandboxId([1; 16]);
    let answer = world.get(&format!("/v1/capsules/{unknown}")).await;
    answer.refused(404, "not_found");
    let answer = world.ask(Method::GET, "/v1/me", NEW_KEY, "").await;
    answer.refused(401, "unauthorized");
}
