//! What the API adds to a command's round trip.
//!
//! The same Start RPC is sent through the API and directly to the guest's agent, in turns, over
//! one kept-alive connection each; both end with the answer that the process has ended. A pair's
//! difference is what Wrenn adds: HTTP and JSON, the key's check, finding the guest, relaying. The
//! process itself costs the same on both ways. `GET /healthz` beside them is the least an
//! answer of the daemon can take.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use buffa::Message as _;
use proto::envd::process as pb;
use proto::envd::process::__buffa::oneof::process_event::Event;
use serde_json::{Value, json};
use wrenn_cluster_tests::world::World;

use crate::create::{connect, destroy};
use crate::figures::{Samples, at_most, ms};
use crate::http::Connection;
use crate::{Outcome, Run};

/// The goal for what the API adds, at the median.
const OVERHEAD_GOAL_MS: f64 = 2.0;
/// Pairs for each run asked for: a pair takes a small part of a second.
const PAIRS_PER_RUN: usize = 20;
/// Pairs that are not counted: connections, caches and the guest's own page cache settle.
const WARM_UP: usize = 5;
/// The port of the guest's agent.
const AGENT_PORT: u16 = 49983;
/// What is run: it exists everywhere and does nothing.
const COMMAND: &str = "true";
/// Bytes before each message of a stream: flags, and the message's length.
const ENVELOPE_BYTES: usize = 5;
/// The flag of the last envelope, which holds no message.
const LAST: u8 = 2;

/// Measures pairs of calls.
pub(crate) fn run(run: &Run) -> Outcome {
    let world = World::new();
    let id = world.capsule();
    let mut api = connect(&world)?;
    let mut agent = dial_agent(&world, &id)?;
    let path = format!("/v1/capsules/{id}/exec");
    let (mut through, mut direct, mut added) = Default::default();
    let mut health = Samples::default();
    let pairs = run.runs * PAIRS_PER_RUN;
    for number in 0..WARM_UP + pairs {
        run.go_on()?;
        // Whoever goes second finds the guest warmer: in turns.
        let (api_ms, agent_ms) = if number % 2 == 0 {
            let first = through_api(&mut api, &path)?;
            (first, to_agent(&mut agent)?)
        } else {
            let first = to_agent(&mut agent)?;
            (through_api(&mut api, &path)?, first)
        };
        let health_ms = check_health(&mut api)?;
        if number >= WARM_UP {
            Samples::add_ms(&mut through, api_ms);
            Samples::add_ms(&mut direct, agent_ms);
            Samples::add(&mut added, ms(api_ms) - ms(agent_ms));
            health.add_ms(health_ms);
        }
        if number % (2 * PAIRS_PER_RUN) == 0 {
            run.note(&format!("pair {number} of {}", WARM_UP + pairs));
        }
    }
    destroy(&mut api, &id)?;
    through.print("exec_api", "ms");
    direct.print("exec_direct", "ms");
    added.print("exec_overhead", "ms");
    health.print("healthz", "ms");
    at_most("exec_overhead_p50", added.p50(), OVERHEAD_GOAL_MS);
    Ok(())
}

fn through_api(api: &mut Connection, path: &str) -> Outcome<Duration> {
    let request = json!({ "cmd": COMMAND }).to_string();
    let start = Instant::now();
    let answer = api.call("POST", path, request.as_bytes())?;
    let took = start.elapsed();
    let ran = answer.expect(200)?.json()?;
    if ran["exit_code"] != 0 {
        return Err(ran.to_string().into());
    }
    Ok(took)
}

fn to_agent(agent: &mut Connection) -> Outcome<Duration> {
    let request = start_request();
    let start = Instant::now();
    let answer = agent.call("POST", "/process.Process/Start", &request)?;
    let took = start.elapsed();
    if exit_code(&answer.expect(200)?.body)? != Some(0) {
        return Err("the command called directly did not succeed".into());
    }
    Ok(took)
}

fn check_health(api: &mut Connection) -> Outcome<Duration> {
    let start = Instant::now();
    let answer = api.call("GET", "/healthz", b"")?;
    let took = start.elapsed();
    answer.expect(200)?;
    Ok(took)
}

/// A connection to the agent of a capsule, with the headers that the node itself sends.
fn dial_agent(world: &World, id: &str) -> Outcome<Connection> {
    let record = world.data().join("sandboxes").join(id).join("sandbox.json");
    let record: Value = serde_json::from_slice(&std::fs::read(record)?)?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let address = text(&record["slot"]["guest_addr"]).ok_or("the capsule has no address")?;
    let token = text(&record["token"]).ok_or("the capsule has no token")?;
    let headers = vec![
        ("x-access-token", token),
        ("content-type", "application/connect+proto".to_owned()),
        ("connect-protocol-version", "1".to_owned()),
    ];
    let address = SocketAddr::new(address.parse()?, AGENT_PORT);
    Ok(Connection::open(address, headers)?)
}

/// The request that the node makes of the same command.
fn start_request() -> Vec<u8> {
    let message = pb::StartRequest {
        process: pb::ProcessConfig {
            cmd: COMMAND.to_owned(),
            ..Default::default()
        }
        .into(),
        stdin: Some(false),
        ..Default::default()
    };
    let message = message.encode_to_vec();
    // A command is far below 4 GiB.
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    [&[0], &length.to_be_bytes()[..], &message].concat()
}

/// The exit code in a stream of events; `None` where the process did not end.
fn exit_code(mut stream: &[u8]) -> io::Result<Option<i32>> {
    let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut code = None;
    while let Some((envelope, rest)) = stream.split_first_chunk::<ENVELOPE_BYTES>() {
        let [flags, length @ ..] = *envelope;
        let length = u32::from_be_bytes(length) as usize;
        let cut = rest.split_at_checked(length);
        let (message, rest) = cut.ok_or_else(|| bad("a message is cut off".into()))?;
        stream = rest;
        if flags & LAST != 0 {
            continue;
        }
        let response = pb::StartResponse::decode_from_slice(message);
        let response = response.map_err(|err| bad(err.to_string()))?;
        let event = response.event.into_option().and_then(|it| it.event);
        if let Some(Event::End(end)) = event {
            code = Some(end.exit_code);
        }
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_found_among_the_events() {
        // {event: {end: {exit_code: 3 (zigzag 6), exited: true}}}, then the end of the stream.
        let end = [0, 0, 0, 0, 8, 0x0a, 6, 0x1a, 4, 0x08, 6, 0x10, 1];
        let last = [2, 0, 0, 0, 2, b'{', b'}'];
        let stream = [&end[..], &last].concat();
        assert_eq!(exit_code(&stream).unwrap(), Some(3));
        assert_eq!(exit_code(&last).unwrap(), None);
        assert!(exit_code(&end[..9]).is_err());
    }

    #[test]
    fn a_request_is_one_envelope() {
        let request = start_request();
        assert_eq!(request[..5], [0, 0, 0, 0, 10]);
        assert_eq!(request[5..], *b"\x0a\x06\x0a\x04true\x20\x00");
    }
}
