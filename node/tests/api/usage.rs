//! How busy capsules are and what they took, through the interface.

use std::time::Duration;

use http::Method;
use proto::ids::SandboxId;
use proto::units::Stamp;
use serde_json::{Value, json};
use wrenn_node::base::sample::{Inside, Sample};

use crate::world::{HERE, OTHER_KEY, World};

const HOUR: Duration = Duration::from_secs(3600);

fn today(world: &World, usage: &Value) -> Value {
    let points = usage["points"].as_array().unwrap();
    assert_eq!(points.len(), 30, "{usage}");
    // The clock of the world stands on this day.
    let today = points.last().unwrap().clone();
    assert_eq!(today["date"], "2023-11-14", "{}", world.address);
    today
}

#[tokio::test]
async fn what_a_team_took_is_told_by_the_day_while_it_still_runs() {
    let world = World::new().await;
    let id = world
        .post("/v1/capsules", json!({"vcpus": 2, "memory_mb": 1024}))
        .await
        .is(201)
        .json()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    world.clock.advance(HOUR);
    let usage = world.get("/v1/capsules/usage").await.is(200).json();
    let point = today(&world, &usage);
    assert_eq!(
        (
            &point["cpu_minutes"],
            &point["ram_mb_minutes"],
            &point["created"]
        ),
        (&json!(120.0), &json!(61440.0), &json!(1))
    );
    world.delete(&format!("/v1/capsules/{id}")).await.is(204);
    world.clock.advance(Duration::from_secs(60));
    let later = world.get("/v1/capsules/usage").await.is(200).json();
    assert_eq!(today(&world, &later), point);
    let other = world
        .ask(Method::GET, "/v1/capsules/usage", OTHER_KEY, "")
        .await;
    assert_eq!(today(&world, &other.is(200).json())["cpu_minutes"], 0.0);
}

#[tokio::test]
async fn days_that_make_no_range_are_refused() {
    let world = World::new().await;
    for query in [
        "from=2023-01-01&to=2023-06-01",
        "from=2023-02-01&to=2023-01-01",
        "from=tomorrow",
        "to=2023-13-01",
    ] {
        let path = format!("/v1/capsules/usage?{query}");
        world.get(&path).await.refused(400, "invalid_request");
    }
    let path = "/v1/capsules/usage?from=2023-11-01&to=2023-11-02";
    let usage = world.get(path).await.is(200).json();
    assert_eq!(
        (&usage["from"], &usage["to"]),
        (&json!("2023-11-01"), &json!("2023-11-02"))
    );
    assert_eq!(usage["points"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn what_runs_now_and_what_ran_are_told() {
    let world = World::new().await;
    let id = world.capsule().await;
    world.clock.advance(Duration::from_secs(1800));
    world.capsule().await;
    world.clock.advance(Duration::from_secs(600));
    world.delete(&format!("/v1/capsules/{id}")).await.is(204);
    let stats = world.get("/v1/capsules/stats").await.is(200).json();
    assert_eq!(
        stats["current"],
        json!({"running_count": 1, "vcpus_reserved": 1, "memory_mb_reserved": 512})
    );
    assert_eq!(
        stats["peaks"],
        json!({"running_count": 2, "vcpus": 2, "memory_mb": 1024})
    );
    let series = &stats["series"];
    let running: Vec<u64> = series["running"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it.as_u64().unwrap())
        .collect();
    assert_eq!(running.len(), 60);
    assert_eq!((running[0], running[59]), (0, 1));
    assert_eq!(
        running.iter().filter(|it| **it == 2).count(),
        10,
        "{running:?}"
    );
    for list in ["labels", "vcpus", "memory_mb"] {
        assert_eq!(series[list].as_array().unwrap().len(), 60, "{list}");
    }
    world
        .get("/v1/capsules/stats?range=2h")
        .await
        .refused(400, "invalid_request");
    for range in ["5m", "6h", "24h", "30d"] {
        let path = format!("/v1/capsules/stats?range={range}");
        assert_eq!(world.get(&path).await.is(200).json()["range"], range);
    }
}

fn sample(at: Stamp, busy_cores: f32) -> Sample {
    Sample {
        at,
        busy_cores,
        resident_kib: 2048,
        disk_kib: 100,
        sent_bytes: 7,
        received_bytes: 8,
        inside: Inside::default(),
    }
}

#[tokio::test]
async fn any_node_tells_how_busy_a_capsule_is() {
    let here = World::new().await;
    let (there, peers) = World::elsewhere().await;
    for world in [&here, &there] {
        let id = world.capsule().await;
        let known: SandboxId = id.parse().unwrap();
        let inside = Inside {
            mem_used_kib: 10,
            mem_total_kib: 20,
            ..Inside::default()
        };
        let samples = vec![
            sample(Stamp(1_700_000_001_500), 0.25),
            Sample {
                inside,
                ..sample(Stamp(1_700_000_002_500), f32::NAN)
            },
        ];
        world.guests.samples.lock().unwrap().insert(known, samples);
        let path = format!("/v1/capsules/{id}/metrics");
        let told = world.get(&path).await.is(200).json();
        assert_eq!(
            (&told["sandbox_id"], &told["range"]),
            (&json!(id), &json!("10m"))
        );
        let first = json!({
            "timestamp_unix": 1_700_000_001, "timestamp_unix_ms": 1_700_000_001_500_u64, "cpu_pct": 25.0, "mem_bytes": 2 << 20,
            "disk_bytes": 102_400, "net_tx_bytes": 7, "net_rx_bytes": 8,
        });
        assert_eq!(told["points"][0], first);
        assert_eq!(told["points"][1]["guest"]["mem_used_bytes"], 10_240);
        assert_eq!(told["points"][1]["cpu_pct"], 0.0);
        let bad = world.get(&format!("{path}?range=3m")).await;
        bad.refused(400, "invalid_request");
        let other = world.ask(Method::GET, &path, OTHER_KEY, "").await;
        other.refused(404, "not_found");
    }
    let id = there.capsule().await;
    peers.cut(HERE);
    let lost = there.get(&format!("/v1/capsules/{id}/metrics")).await;
    lost.refused(503, "host_unavailable");
}

#[tokio::test]
async fn any_node_tells_ten_minutes_by_half_seconds() {
    let (there, _peers) = World::elsewhere().await;
    let id = there.capsule().await;
    let known: SandboxId = id.parse().unwrap();
    // One more than there are periods: the one that goes on.
    let at = |half: u64| 1_700_000_000_250 + half * 500;
    let samples = (0..=1200).map(|half| sample(Stamp(at(half)), 0.25));
    let samples = samples.collect();
    there.guests.samples.lock().unwrap().insert(known, samples);
    let told = there.get(&format!("/v1/capsules/{id}/metrics")).await;
    let told = told.is(200).json();
    let points = told["points"].as_array().unwrap();
    let stamps = points.iter().map(|it| it["timestamp_unix_ms"].as_u64());
    assert!(stamps.eq((0..=1200).map(|half| Some(at(half)))));
}

#[tokio::test]
async fn nothing_is_told_of_how_busy_an_ended_capsule_was() {
    let world = World::new().await;
    let id = world.capsule().await;
    world.delete(&format!("/v1/capsules/{id}")).await.is(204);
    let gone = world.get(&format!("/v1/capsules/{id}/metrics")).await;
    gone.refused(404, "not_found");
}
