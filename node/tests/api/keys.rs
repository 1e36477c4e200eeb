//! API keys, scopes, teams, members, the audit log and rate limits, from outside.

use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _};
use http::{Method, Request};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use crate::world::{
    ADMIN_KEY, Answer, KEY, OTHER_KEY, PATIENCE, World, eventually, full, is_success,
};

/// Nobody is called that.
const NOBODY: &str = "usr-0000000000000000000000001";

/// Makes a key as `by`; its id and its secret.
async fn key(world: &World, by: &str, terms: Value) -> (String, String) {
    let made = world
        .ask(Method::POST, "/v1/api-keys", by, &terms.to_string())
        .await;
    let made = made.is(201).json();
    let text = |name: &str| made[name].as_str().unwrap().to_owned();
    (text("id"), text("key"))
}

async fn scoped(world: &World, scope: &str) -> String {
    key(world, KEY, json!({"scope": scope})).await.1
}

async fn team_of(world: &World, key: &str) -> String {
    let me = world.ask(Method::GET, "/v1/me", key, "").await;
    me.is(200).json()["team"]["id"].as_str().unwrap().to_owned()
}

/// Method and path of every route of the description.
fn routes() -> Vec<(Method, String)> {
    let description: Value = serde_json::from_str(&wrenn_node::api::openapi()).unwrap();
    let paths = description["paths"].as_object().unwrap().clone();
    let all = paths
        .into_iter()
        .filter(|(path, _)| path.starts_with("/v1/"));
    let all = all.flat_map(|(path, item)| {
        let methods = item.as_object().unwrap().clone().into_iter();
        methods.map(move |(method, _)| (method.to_uppercase().parse().unwrap(), path.clone()))
    });
    all.collect()
}

/// A path of the description with something in its places.
fn filled(path: &str, id: &str) -> String {
    let parts = path.split('/').map(|part| match part {
        "{id}" => id,
        "{node}" => "here",
        "{name}" => "kept",
        "{user}" => NOBODY,
        "{selector}" => "1",
        "{tag}" => "a",
        part => part,
    });
    parts.collect::<Vec<_>>().join("/")
}

/// A body that each route takes.
fn body_for(path: &str, id: &str) -> String {
    let body = match path.rsplit('/').next().unwrap() {
        "exec" => json!({"cmd": "true"}),
        "links" => json!({"port": 80}),
        "migrate" => json!({"node": "here"}),
        "fork" => json!({"count": 1}),
        "snapshots" => json!({"sandbox_id": id, "name": "theirs"}),
        "read" | "list" | "mkdir" | "remove" => json!({"path": "/tmp/x"}),
        _ => json!({}),
    };
    body.to_string()
}

#[tokio::test]
async fn no_route_answers_without_a_key_and_none_that_changes_something_to_one_that_may_look() {
    let world = World::new().await;
    let id = world.capsule().await;
    let (read, run) = (scoped(&world, "read").await, scoped(&world, "run").await);
    for (method, path) in routes() {
        let (at, body) = (filled(&path, &id), body_for(&path, &id));
        let bare = world.request(method.clone(), &at);
        let bare = world.send(bare.body(full(body.clone())).unwrap()).await;
        let is_socket =
            path.ends_with("/pty") || path.ends_with("/stream") && path.contains("/capsules/");
        let speaks_http = !path.contains("/files/stream");
        if is_socket && speaks_http && method == Method::GET {
            // Who it is may come in the first frame; this is no WebSocket at all.
            bare.refused(400, "invalid_request");
        } else {
            bare.refused(401, "unauthorized");
        }
        let looks = method == Method::GET || path == "/v1/teams/{id}/leave";
        if !looks {
            let asked = world.ask(method.clone(), &at, &read, &body).await;
            asked.refused(403, "forbidden");
            assert!(
                asked.json()["error"]["message"].is_string(),
                "{method} {path}"
            );
        }
        let governs = [
            "/v1/api-keys",
            "/v1/audit-logs",
            "/v1/admin",
            "/v1/tokens",
            "/v1/channels",
        ];
        if governs.iter().any(|area| path.starts_with(area)) {
            let asked = world.ask(method, &at, &run, &body).await;
            asked.refused(403, "forbidden");
        }
    }
    assert_eq!(
        world.get(&format!("/v1/capsules/{id}")).await.json()["status"],
        "running"
    );
}

/// A body by which each route of teams would change something.
fn change_for(method: &Method, path: &str, id: &str) -> String {
    match (path, method.as_str()) {
        ("/v1/teams/{id}", "PATCH") => json!({"name": "x"}).to_string(),
        ("/v1/teams/{id}/members", "POST") => json!({"email": "a@b.c"}).to_string(),
        ("/v1/teams/{id}/members/{user}", "PATCH") => json!({"role": "owner"}).to_string(),
        _ => body_for(path, id),
    }
}

/// Asks for something of the first team's with the other one's key.
async fn intrude(world: &World, method: &Method, path: &str, (of, id): (&str, &str)) -> Answer {
    let at = filled(path, of);
    if !path.ends_with("/write") {
        let body = change_for(method, path, id);
        return world.ask(method.clone(), &at, OTHER_KEY, &body).await;
    }
    let form = world.request(method.clone(), &at);
    let form = form
        .header("x-api-key", OTHER_KEY)
        .header("content-type", "multipart/form-data; boundary=xyz");
    let fields: [(&str, &[u8]); 2] = [("path", b"/tmp/x"), ("file", b"x")];
    let form = form.body(full(crate::world::encode_form(&fields))).unwrap();
    world.send(form).await
}

#[tokio::test]
async fn another_teams_objects_do_not_exist_on_any_route() {
    let world = World::new().await;
    let id = world.capsule().await;
    let (theirs, _) = key(&world, KEY, json!({})).await;
    let team = team_of(&world, KEY).await;
    let mut asked = 0;
    for (method, path) in routes() {
        let of = match path.split('/').nth(2).unwrap() {
            "capsules" => id.as_str(),
            "api-keys" => theirs.as_str(),
            "teams" => team.as_str(),
            _ => continue,
        };
        let is_stream = path.ends_with("/stream") || path.ends_with("/pty");
        let is_socket = method == Method::GET && is_stream;
        if !path.contains("{id}") || path.ends_with("/metrics") || is_socket {
            continue;
        }
        let answer = intrude(&world, &method, &path, (of, &id)).await;
        // Nobody but an administrator of the cluster may even try.
        let governs = path == "/v1/teams/{id}" && method == Method::DELETE;
        let expected = if governs { 403 } else { 404 };
        let said = String::from_utf8_lossy(&answer.body);
        assert_eq!(answer.status, expected, "{method} {path}: {said}");
        asked += 1;
    }
    assert!(asked > 25, "only {asked} routes were tried");
    let mine = world.get(&format!("/v1/capsules/{id}")).await;
    assert_eq!(mine.json()["status"], "running");
    world.get("/v1/api-keys").await.is(200);
}

#[tokio::test]
async fn lists_and_names_are_a_teams_own() {
    let world = World::new().await;
    let id = world.capsule().await;
    let kept = json!({"sandbox_id": id, "name": "kept"});
    world.post("/v1/snapshots", kept).await.is(201);
    let team = team_of(&world, KEY).await;
    assert_ne!(team, team_of(&world, OTHER_KEY).await);
    let other =
        async |method, path: &str, body: &str| world.ask(method, path, OTHER_KEY, body).await;
    let snapshot = other(
        Method::POST,
        "/v1/snapshots",
        &body_for("/v1/snapshots", &id),
    )
    .await;
    snapshot.refused(404, "not_found");
    let unnamed = other(Method::DELETE, "/v1/snapshots/kept", "").await;
    unnamed.refused(404, "not_found");
    for list in ["/v1/capsules", "/v1/audit-logs"] {
        let shown = other(Method::GET, list, "").await;
        assert!(
            !String::from_utf8_lossy(&shown.body).contains("cl-"),
            "{list}"
        );
    }
    for list in ["/v1/api-keys", "/v1/teams"] {
        let shown = other(Method::GET, list, "").await.is(200).json();
        assert_eq!(shown.as_array().unwrap().len(), 1, "{list}");
    }
    let asked = format!("/v1/api-keys?team_id={team}");
    other(Method::GET, &asked, "")
        .await
        .refused(404, "not_found");
}

#[tokio::test]
async fn a_key_is_told_once_and_listed_without_its_secret() {
    let world = World::new().await;
    let made = world
        .post("/v1/api-keys", json!({"name": "ci", "scope": "read"}))
        .await;
    let made = made.is(201).json();
    let secret = made["key"].as_str().unwrap();
    assert_eq!(secret.len(), 36);
    assert_eq!(made["key_prefix"], secret[..10]);
    assert_eq!(
        (&made["name"], &made["scope"]),
        (&json!("ci"), &json!("read"))
    );
    let listed = world.get("/v1/api-keys").await;
    assert!(!String::from_utf8_lossy(&listed.body).contains(&secret[10..]));
    assert_eq!(listed.json()[0]["id"], made["id"]);
    assert_eq!(listed.json()[0]["last_used"], Value::Null);
    world
        .ask(Method::GET, "/v1/capsules", secret, "")
        .await
        .is(200);
    let used = world.get("/v1/api-keys").await.json()[0]["last_used"].clone();
    assert_eq!(used, "2023-11-14T22:13:20Z");
    for bad in [
        json!({"scope": "root"}),
        json!({"name": ""}),
        json!({"name": "a\nb"}),
        json!({"scopes": "read"}),
        json!({"expires_in_sec": 0}),
        json!({"user_id": "ann"}),
    ] {
        world
            .post("/v1/api-keys", bad)
            .await
            .refused(400, "invalid_request");
    }
    let nobodys = json!({"user_id": NOBODY});
    world
        .post("/v1/api-keys", nobodys)
        .await
        .refused(404, "not_found");
    world
        .delete("/v1/api-keys/key-1")
        .await
        .refused(400, "invalid_request");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_opens_nothing_on_any_node_and_ends_what_went_on_under_it() {
    let world = World::new().await;
    let there = world.another_node().await;
    let id = world.capsule().await;
    let (name, secret) = key(&world, KEY, json!({})).await;
    let mut stream = exec_stream(&world, &id, &secret).await;
    let body = json!({"cmd": "/bin/sleep", "args": ["60"], "background": false}).to_string();
    let path = format!("/v1/capsules/{id}/exec");
    let asked = world.ask(Method::POST, &path, &secret, &body);
    let revoked = async {
        eventually(async || {
            let seen = world
                .get(&format!("/v1/capsules/{id}/processes"))
                .await
                .json();
            (seen["processes"].as_array()?.len() == 2).then_some(())
        })
        .await;
        world.delete(&format!("/v1/api-keys/{name}")).await.is(204);
    };
    let (answer, ()) = tokio::join!(asked, revoked);
    answer.refused(401, "unauthorized");
    let closed = tokio::time::timeout(PATIENCE, async {
        while let Some(Ok(message)) = stream.next().await {
            if let Message::Close(Some(frame)) = message {
                return u16::from(frame.code);
            }
        }
        0
    });
    assert_eq!(closed.await.expect("in time"), 1008);
    for address in [world.address, there] {
        let request = Request::get(format!("http://{address}/v1/capsules"));
        let request = request.header("x-api-key", &secret);
        let refused = world.send(request.body(full("")).unwrap()).await;
        refused.refused(401, "unauthorized");
    }
    // Again is no news.
    world.delete(&format!("/v1/api-keys/{name}")).await.is(204);
    let listed = world.get("/v1/api-keys").await.json();
    assert!(
        listed
            .as_array()
            .unwrap()
            .iter()
            .all(|key| key["id"] != name.as_str())
    );
}

async fn exec_stream(
    world: &World,
    id: &str,
    key: &str,
) -> tokio_tungstenite::WebSocketStream<TcpStream> {
    let url = format!("ws://{}/v1/capsules/{id}/exec/stream", world.address);
    let mut request = url.into_client_request().unwrap();
    request
        .headers_mut()
        .insert("x-api-key", key.parse().unwrap());
    let stream = TcpStream::connect(world.address).await.unwrap();
    let mut socket = client_async(request, stream).await.unwrap().0;
    let start = json!({"type": "start", "cmd": "/bin/sleep", "args": ["60"]});
    socket.send(Message::text(start.to_string())).await.unwrap();
    socket.next().await.unwrap().unwrap();
    socket
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_opened_with_a_key_that_may_only_look_is_refused() {
    let world = World::new().await;
    let id = world.capsule().await;
    let read = scoped(&world, "read").await;
    let url = format!("ws://{}/v1/capsules/{id}/pty", world.address);
    let mut request = url.clone().into_client_request().unwrap();
    request
        .headers_mut()
        .insert("x-api-key", read.parse().unwrap());
    let stream = TcpStream::connect(world.address).await.unwrap();
    let refused = client_async(request, stream).await.unwrap_err();
    assert!(refused.to_string().contains("403"), "{refused}");
    // The same by the first frame, as a browser does it.
    let stream = TcpStream::connect(world.address).await.unwrap();
    let mut socket = client_async(url, stream).await.unwrap().0;
    let auth = json!({"type": "auth", "token": read}).to_string();
    socket.send(Message::text(auth)).await.unwrap();
    let told = socket.next().await.unwrap().unwrap().into_text().unwrap();
    assert!(told.contains("error") && told.contains("scope"), "{told}");
}

#[tokio::test]
async fn a_key_ends_by_itself_and_is_shown_so() {
    let world = World::new().await;
    let (id, secret) = key(&world, KEY, json!({"expires_in_sec": 60})).await;
    let list = "/v1/capsules";
    world.ask(Method::GET, list, &secret, "").await.is(200);
    world.clock.advance(Duration::from_secs(59));
    world.ask(Method::GET, list, &secret, "").await.is(200);
    world.clock.advance(Duration::from_secs(1));
    let refused = world.ask(Method::GET, list, &secret, "").await;
    refused.refused(401, "unauthorized");
    let listed = world.get("/v1/api-keys").await.json();
    assert_eq!(
        (&listed[0]["id"], &listed[0]["expired"]),
        (&json!(id), &json!(true))
    );
}

#[tokio::test]
async fn the_last_key_that_could_make_others_is_not_revoked() {
    let world = World::new().await;
    let mine = world.admin(Method::GET, "/v1/api-keys", Value::Null).await;
    let id = mine.is(200).json()[0]["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/api-keys/{id}");
    let refused = world.admin(Method::DELETE, &path, Value::Null).await;
    refused.refused(409, "invalid_state");
    // One that ends, or may do less, does not replace it.
    key(
        &world,
        ADMIN_KEY,
        json!({"scope": "admin", "expires_in_sec": 60}),
    )
    .await;
    key(&world, ADMIN_KEY, json!({"scope": "run"})).await;
    let refused = world.admin(Method::DELETE, &path, Value::Null).await;
    refused.refused(409, "invalid_state");
    key(&world, ADMIN_KEY, json!({"scope": "admin"})).await;
    // The request is answered although its own key is over by then.
    world
        .admin(Method::DELETE, &path, Value::Null)
        .await
        .is(204);
    let gone = world.admin(Method::GET, "/v1/api-keys", Value::Null).await;
    gone.refused(401, "unauthorized");
}

/// A team with its owner Ann and its member Bob, who each hold a key.
struct Acme {
    world: World,
    team: String,
    ann: String,
    bob: String,
    anns: String,
    bobs: String,
}

impl Acme {
    async fn new() -> Self {
        let world = World::new().await;
        let made = world.admin(Method::POST, "/v1/teams", json!({"name": " Acme "}));
        let made = made.await.is(201).json();
        assert_eq!(
            (&made["name"], &made["is_byoc"]),
            (&json!("Acme"), &json!(false))
        );
        assert_eq!(made["slug"].as_str().unwrap().len(), 13);
        let team = made["id"].as_str().unwrap().to_owned();
        let ann = json!({"email": "Ann@Example.com", "name": "Ann"});
        let ann = add(&world, &team, ADMIN_KEY, ann).await.is(201).json();
        let told = (&ann["email"], &ann["role"]);
        assert_eq!(told, (&json!("ann@example.com"), &json!("owner")));
        let ann = ann["user_id"].as_str().unwrap().to_owned();
        let anns = json!({"scope": "admin", "team_id": team, "user_id": ann});
        let (_, anns) = key(&world, ADMIN_KEY, anns).await;
        let bob = add(&world, &team, &anns, json!({"email": "bob@example.com"})).await;
        let bob = bob.is(201).json()["user_id"].as_str().unwrap().to_owned();
        let bobs = json!({"scope": "admin", "user_id": bob});
        let (_, bobs) = key(&world, &anns, bobs).await;
        Self {
            world,
            team,
            ann,
            bob,
            anns,
            bobs,
        }
    }

    /// Asks for something below the team.
    async fn ask(&self, method: Method, below: &str, key: &str, body: Value) -> Answer {
        let path = format!("/v1/teams/{}{below}", self.team);
        self.world.ask(method, &path, key, &body.to_string()).await
    }

    async fn get(&self, path: &str, key: &str) -> Answer {
        self.world.ask(Method::GET, path, key, "").await
    }
}

async fn add(world: &World, team: &str, key: &str, member: Value) -> Answer {
    let path = format!("/v1/teams/{team}/members");
    world
        .ask(Method::POST, &path, key, &member.to_string())
        .await
}

#[tokio::test]
async fn a_members_role_limits_the_keys_held_at_once() {
    let acme = Acme::new().await;
    let me = acme.get("/v1/me", &acme.bobs).await.is(200).json();
    assert_eq!(
        (&me["email"], &me["role"]),
        (&json!("bob@example.com"), &json!("member"))
    );
    assert_eq!(me["scope"], "run", "the role limits it");
    acme.get("/v1/api-keys", &acme.bobs)
        .await
        .refused(403, "forbidden");
    let bob = format!("/members/{}", acme.bob);
    let role = json!({"role": "admin"});
    acme.ask(Method::PATCH, &bob, &acme.anns, role)
        .await
        .is(204);
    acme.get("/v1/api-keys", &acme.bobs).await.is(200);
    let ann = format!("/members/{}", acme.ann);
    let last_owner = acme
        .ask(Method::DELETE, &ann, &acme.bobs, Value::Null)
        .await;
    last_owner.refused(409, "invalid_state");
}

#[tokio::test]
async fn who_leaves_a_team_takes_the_keys_along() {
    let acme = Acme::new().await;
    for (member, status, code) in [
        (json!({"email": "BOB@example.com"}), 409, "conflict"),
        (json!({"email": "bob"}), 400, "invalid_request"),
    ] {
        let refused = add(&acme.world, &acme.team, &acme.anns, member).await;
        refused.refused(status, code);
    }
    let found = acme.get("/v1/users/search?email=bob", &acme.anns).await;
    let bob = json!([{"user_id": acme.bob, "email": "bob@example.com"}]);
    assert_eq!(found.is(200).json(), bob);
    acme.ask(Method::POST, "/leave", &acme.bobs, Value::Null)
        .await
        .is(204);
    acme.get("/v1/me", &acme.bobs)
        .await
        .refused(401, "unauthorized");
    let left = acme.ask(Method::GET, "", &acme.anns, Value::Null).await;
    assert_eq!(left.is(200).json()["members"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_team_is_made_and_removed_by_administrators_of_the_cluster_once_it_is_empty() {
    let acme = Acme::new().await;
    let made = acme.world.post("/v1/teams", json!({"name": "x"})).await;
    made.refused(403, "forbidden");
    let name = json!({"name": "Emca"});
    acme.ask(Method::PATCH, "", &acme.anns, name).await.is(204);
    let listed = acme.get("/v1/teams", &acme.anns).await.json();
    assert_eq!(listed[0]["name"], "Emca");
    let capsule = acme
        .world
        .ask(Method::POST, "/v1/capsules", &acme.anns, "{}")
        .await;
    let capsule = capsule.is(201).json()["id"].as_str().unwrap().to_owned();
    let remove = async || acme.ask(Method::DELETE, "", ADMIN_KEY, Value::Null).await;
    remove().await.refused(409, "invalid_state");
    let gone = format!("/v1/capsules/{capsule}");
    acme.world
        .ask(Method::DELETE, &gone, &acme.anns, "")
        .await
        .is(204);
    remove().await.is(204);
    acme.get("/v1/me", &acme.anns)
        .await
        .refused(401, "unauthorized");
    let looked = acme.ask(Method::GET, "", ADMIN_KEY, Value::Null).await;
    looked.refused(404, "not_found");
}

/// What a capsule's life leaves in the log, the newest first.
const LIFE: [&str; 7] = [
    "capsule.destroy",
    "capsule.resume",
    "capsule.pause",
    "capsule.update",
    "capsule.link",
    "api_key.create",
    "capsule.create",
];

/// A world with such a life in its log: the capsule, and the key by which most was asked.
async fn lived() -> (World, String, String) {
    let world = World::new().await;
    let id = world.capsule().await;
    let (name, secret) = key(&world, KEY, json!({"name": "robot"})).await;
    let at = format!("/v1/capsules/{id}");
    let link = json!({"port": 8080, "expires_in_sec": 60}).to_string();
    let links = format!("{at}/links");
    world
        .ask(Method::POST, &links, &secret, &link)
        .await
        .is(201);
    let asked = json!({"ports": "public"}).to_string();
    world.ask(Method::PATCH, &at, &secret, &asked).await.is(200);
    for verb in ["pause", "resume"] {
        let path = format!("{at}/{verb}");
        world.ask(Method::POST, &path, &secret, "").await.is(200);
    }
    world.ask(Method::DELETE, &at, &secret, "").await.is(204);
    // Looking, and what was done already, is no change.
    world.get(&at).await.is(200);
    world.ask(Method::DELETE, &at, &secret, "").await.is(204);
    (world, id, name)
}

fn items(answer: &Answer) -> Vec<Value> {
    answer.is(200).json()["items"].as_array().unwrap().clone()
}

fn words(answer: &Answer) -> Vec<String> {
    let word = |it: &Value| {
        let text = |name: &str| it[name].as_str().unwrap();
        format!("{}.{}", text("resource_type"), text("action"))
    };
    items(answer).iter().map(word).collect()
}

#[tokio::test]
async fn every_change_is_in_its_teams_log_with_who_and_from_where() {
    let (world, id, name) = lived().await;
    let answer = world.get("/v1/audit-logs").await;
    assert_eq!(words(&answer), LIFE);
    let all = items(&answer);
    let last = &all[0];
    for (field, expected) in [
        ("actor_type", "api_key"),
        ("actor_name", "robot"),
        ("actor_id", name.as_str()),
        ("source_ip", "127.0.0.1"),
        ("resource_id", id.as_str()),
        ("status", "success"),
        ("created_at", "2023-11-14T22:13:20Z"),
    ] {
        assert_eq!(last[field], expected, "{field}");
    }
    assert_eq!(all[4]["metadata"]["port"], "8080");
    // A minute after the instant at which all of this happens.
    let end = "1700000060000";
    assert_eq!(all[4]["metadata"]["expires_at_unix_ms"], end);
    assert_eq!(all[5]["metadata"]["scope"], "run");
    let other = world
        .ask(Method::GET, "/v1/audit-logs", OTHER_KEY, "")
        .await;
    assert_eq!(items(&other).len(), 0);
    let everything = world
        .admin(Method::GET, "/v1/admin/audit-logs", Value::Null)
        .await;
    assert_eq!(words(&everything), LIFE);
    let platforms = world
        .admin(Method::GET, "/v1/audit-logs", Value::Null)
        .await;
    assert_eq!(
        items(&platforms).len(),
        0,
        "nothing of the platform's was changed"
    );
    world
        .get("/v1/admin/audit-logs")
        .await
        .refused(403, "forbidden");
}

#[tokio::test]
async fn the_log_is_read_in_pages_and_by_what_is_wanted_of_it() {
    let (world, id, _) = lived().await;
    let page = world.get("/v1/audit-logs?limit=5").await;
    assert_eq!(words(&page), LIFE[..5]);
    let next = page.json()["next_before_id"].as_str().unwrap().to_owned();
    let rest = world.get(&format!("/v1/audit-logs?before_id={next}")).await;
    assert_eq!(rest.json()["next_before_id"], Value::Null);
    assert_eq!(words(&rest), LIFE[5..]);
    let filtered = format!("/v1/audit-logs?resource_id={id}&action=pause,resume");
    assert_eq!(words(&world.get(&filtered).await), LIFE[1..3]);
    world
        .get("/v1/audit-logs?limit=none")
        .await
        .refused(400, "invalid_request");
}

#[tokio::test]
async fn a_key_that_asks_too_often_is_told_to_wait_and_no_other_is() {
    let world = World::new().await;
    let limits = json!({"key_rate": 1, "key_burst": 3});
    world
        .admin(Method::PATCH, "/v1/cluster", limits)
        .await
        .is(200);
    for _ in 0..3 {
        world.get("/v1/capsules").await.is(200);
    }
    let refused = world.get("/v1/capsules").await;
    refused.refused(429, "rate_limited");
    assert_eq!(refused.headers["retry-after"], "1");
    world
        .ask(Method::GET, "/v1/capsules", OTHER_KEY, "")
        .await
        .is(200);
    // A base path and another method are the same key.
    world
        .delete("/api/v1/capsules/x")
        .await
        .refused(429, "rate_limited");
    world.boot_clock.advance(Duration::from_secs(1));
    world.get("/v1/capsules").await.is(200);
    world.get("/v1/capsules").await.refused(429, "rate_limited");
    let settings = |body| world.admin(Method::PATCH, "/v1/cluster", body);
    let odd = settings(json!({"key_rate": 0, "key_burst": 3})).await;
    odd.refused(400, "invalid_request");
    let shown = settings(json!({"key_rate": 0})).await.is(200).json();
    assert_eq!(shown["settings"]["key_burst"], 0);
    for _ in 0..10 {
        assert!(is_success(world.get("/v1/capsules").await.status));
    }
}

#[tokio::test]
async fn routes_of_accounts_say_what_takes_their_place() {
    let world = World::new().await;
    for path in ["/v1/auth/login", "/v1/auth/signup", "/v1/me/password"] {
        let answer = world.ask(Method::POST, path, KEY, "{}").await;
        answer.refused(501, "not_implemented");
        assert!(
            String::from_utf8_lossy(&answer.body).contains("/v1/api-keys"),
            "{path}"
        );
    }
}
