//! The plain endpoints, the token rules, and what every answer carries.

mod common;

use common::{Codec, Envd, full, shell};
use http::Request;
use serde_json::{Value, json};

const TOKEN: &str = "x-access-token";

async fn get_as(envd: &Envd, path: &str, token: &str) -> u16 {
    let request = Request::get(path)
        .header(TOKEN, token)
        .body(full(""))
        .expect("a request");
    envd.fetch(request).await.status
}

async fn init(envd: &Envd, body: Value) -> u16 {
    envd.post("/init", body.to_string()).await.status
}

#[tokio::test]
async fn health_reports_the_version_and_is_not_stored() {
    let envd = Envd::start();
    let answer = envd.get("/health").await;
    assert_eq!(
        (answer.status, answer.json()),
        (200, json!({ "version": proto::version::ENVD }))
    );
    assert_eq!(answer.header("cache-control"), Some("no-store"));
}

#[tokio::test]
async fn metrics_have_every_field() {
    let envd = Envd::start();
    let metrics = envd.get("/metrics").await.json();
    for field in [
        "ts",
        "cpu_count",
        "cpu_used_pct",
        "mem_total_mib",
        "mem_used_mib",
        "mem_total",
        "mem_used",
        "mem_cache",
        "disk_used",
        "disk_total",
    ] {
        assert!(metrics[field].is_number(), "{field} in {metrics}");
    }
    assert!(metrics["cpu_count"].as_u64() >= Some(1));
    assert!(metrics["disk_total"].as_u64() > metrics["disk_used"].as_u64());
}

#[tokio::test]
async fn token_guards_everything_but_health() {
    let envd = Envd::start();
    assert_eq!(
        envd.get("/envs").await.status,
        200,
        "open before a token is set"
    );
    assert_eq!(init(&envd, json!({"accessToken": "secret"})).await, 204);

    for path in ["/envs", "/metrics", "/nowhere"] {
        let answer = envd.get(path).await;
        assert_eq!(
            (answer.status, &answer.json()["code"]),
            (401, &json!(401)),
            "{path}"
        );
        assert_eq!(get_as(&envd, path, "wrong").await, 401);
    }
    assert_eq!(get_as(&envd, "/envs", "secret").await, 200);
    assert_eq!(envd.post("/poweroff", "").await.status, 401);
    assert_eq!(envd.post("/snapshot/prepare", "").await.status, 401);
    assert_eq!(envd.post("/snapshot/reclaim", "").await.status, 401);
    assert_eq!(envd.get("/health").await.status, 200);
    let list = Request::post("/process.Process/List")
        .header("content-type", "application/json")
        .body(full("{}"))
        .expect("a request");
    let answer = envd.fetch(list).await;
    assert_eq!((answer.status, &answer.json()["code"]), (401, &json!(401)));
    let headers = [(TOKEN, "secret")];
    let ran = envd
        .start_process(Codec::Json, shell("echo in"), &headers)
        .await
        .run()
        .await;
    assert_eq!(ran.expect("admitted").out(), "in\n");
}

#[tokio::test]
async fn init_follows_the_token_table() {
    let envd = Envd::start();
    assert_eq!(
        envd.post("/init", "").await.status,
        204,
        "nothing set, nothing given"
    );
    assert_eq!(
        init(&envd, json!({"accessToken": "a"})).await,
        204,
        "first-time setup"
    );
    assert_eq!(
        init(&envd, json!({"access_token": "a"})).await,
        204,
        "the same again"
    );
    assert_eq!(init(&envd, json!({"accessToken": "b"})).await, 401);
    assert_eq!(init(&envd, json!({"accessToken": ""})).await, 401);
    assert_eq!(envd.post("/init", "").await.status, 401);
    assert_eq!(
        envd.post("/init", "{").await.status,
        400,
        "malformed before refused"
    );
    assert_eq!(envd.post("/init", "[1]").await.status, 400);
    let answer = envd.post("/init", r#"{"accessToken":"a"}"#).await;
    assert_eq!(answer.header("cache-control"), Some("no-store"));
}

#[tokio::test]
async fn environment_is_replaced_and_builtins_stay() {
    let envd = Envd::start();
    init(
        &envd,
        json!({"envVars": {"A": "1"}, "sandbox_id": "s", "template_id": "t"}),
    )
    .await;
    init(&envd, json!({"env_vars": {"B": "2"}})).await;
    let expected = json!({
        "B": "2",
        "WRENN_SANDBOX": "false", "WRENN_SANDBOX_ID": "s", "WRENN_TEMPLATE_ID": "t",
        "E2B_SANDBOX": "false", "E2B_SANDBOX_ID": "s", "E2B_TEMPLATE_ID": "t",
    });
    assert_eq!(envd.get("/envs").await.json(), expected);
}

#[tokio::test]
async fn older_init_is_ignored_but_answered() {
    let envd = Envd::start();
    let at = |time: &str, value: &str| json!({"timestamp": time, "envVars": {"A": value}});
    assert_eq!(init(&envd, at("2026-01-02T00:00:00Z", "new")).await, 204);
    assert_eq!(
        init(&envd, at("2026-01-01T23:59:59.5+00:00", "old")).await,
        204
    );
    assert_eq!(envd.get("/envs").await.json()["A"], "new");
    assert_eq!(
        init(&envd, at("2026-01-02T01:00:00.000001+01:00", "newer")).await,
        204
    );
    assert_eq!(envd.get("/envs").await.json()["A"], "newer");
    assert_eq!(init(&envd, json!({"timestamp": "soon"})).await, 400);
}

#[tokio::test]
async fn default_user_of_init_runs_commands() {
    let envd = Envd::start();
    init(
        &envd,
        json!({"defaultUser": "nobody", "defaultWorkdir": "/tmp"}),
    )
    .await;
    assert_eq!(envd.shell("id -un; pwd").await.out(), "nobody\n/tmp\n");
}

#[tokio::test]
async fn entropy_and_names_are_checked_outside_a_guest_too() {
    let envd = Envd::start();
    assert_eq!(
        init(&envd, json!({"entropy": "AAAA", "hostname": "a-b.c"})).await,
        204
    );
    assert_eq!(init(&envd, json!({"entropy": "?"})).await, 400);
    assert_eq!(init(&envd, json!({"hostname": "a b"})).await, 400);
}

#[tokio::test]
async fn oversized_init_is_refused() {
    let envd = Envd::start();
    let body = json!({"envVars": {"A": "x".repeat(5 << 20)}});
    assert_eq!(init(&envd, body).await, 413);
}

#[tokio::test]
async fn only_the_first_process_powers_off() {
    let envd = Envd::start();
    let answer = envd.post("/poweroff", "").await;
    assert_eq!((answer.status, &answer.json()["code"]), (501, &json!(501)));
    assert_eq!(envd.post("/snapshot/prepare", "").await.status, 204);
    let answer = envd.post("/snapshot/reclaim", "").await;
    assert!(answer.status == 200 && answer.json()["reclaimed"].is_boolean());
}

#[tokio::test]
async fn unknown_paths_and_methods_answer_in_the_common_shape() {
    let envd = Envd::start();
    let answer = envd.get("/nowhere").await;
    assert_eq!((answer.status, &answer.json()["code"]), (404, &json!(404)));
    let answer = envd.post("/health", "").await;
    assert_eq!((answer.status, &answer.json()["code"]), (405, &json!(405)));
    let request = Request::post("/process.Process/Nothing")
        .header("content-type", "application/json")
        .body(full("{}"))
        .expect("a request");
    assert_eq!(envd.fetch(request).await.json()["code"], "unimplemented");
}

#[tokio::test]
async fn browsers_may_call_from_anywhere() {
    let envd = Envd::start();
    init(&envd, json!({"accessToken": "secret"})).await;
    let request = Request::options("/process.Process/Start")
        .header("origin", "https://example.org")
        .header("access-control-request-method", "POST")
        .header(
            "access-control-request-headers",
            "authorization,connect-timeout-ms",
        )
        .body(full(""))
        .expect("a request");
    let answer = envd.fetch(request).await;
    assert_eq!(answer.status, 204);
    assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
    assert_eq!(answer.header("access-control-max-age"), Some("7200"));
    let allowed = answer.header("access-control-allow-headers");
    assert_eq!(allowed, Some("authorization,connect-timeout-ms"));
    assert!(
        answer
            .header("access-control-allow-methods")
            .is_some_and(|m| m.contains("PATCH"))
    );
    let refused = envd.get("/envs").await;
    assert_eq!(refused.header("access-control-allow-origin"), Some("*"));
}

#[tokio::test]
async fn http2_without_tls_is_served_on_the_same_port() {
    let envd = Envd::start();
    let client: hyper_util::client::legacy::Client<_, common::Body> =
        hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
            .http2_only(true)
            .build_http();
    let request = Request::get(format!("http://{}/health", envd.address)).body(full(""));
    let answer = common::soon(client.request(request.expect("a request")))
        .await
        .expect("h2c");
    assert_eq!(
        (answer.status().as_u16(), answer.version()),
        (200, http::Version::HTTP_2)
    );
}

#[tokio::test]
async fn init_tells_its_version_and_where_the_hosts_events_are() {
    let envd = Envd::start();
    let answer = envd
        .post("/init", json!({"hyperloopIP": "10.1.2.3"}).to_string())
        .await;
    assert_eq!(answer.status, 204);
    assert_eq!(answer.header("x-envd-version"), Some(proto::version::ENVD));
    let envs = envd.get("/envs").await.json();
    assert_eq!(envs["E2B_EVENTS_ADDRESS"], "http://10.1.2.3");
    let volumes = json!({"volumeMounts": [{"nfs_target": "h:/p", "path": "/p"}]});
    assert_eq!(envd.post("/init", volumes.to_string()).await.status, 501);
}
