//! One node's API as seen by a client that lives in a thread of its own, outlives the daemon, and
//! tells apart what was never sent from what brought no answer.

use std::io;
use std::time::Duration;

use serde_json::{Value, json};
use wrenn_cluster_tests::client::Answer;
use wrenn_cluster_tests::cluster::ClusterWorld;

/// Longer than a node looks for a quorum, so that it is the node that gives up.
const PATIENCE: Duration = Duration::from_secs(13);

/// What came of a request.
#[derive(Debug)]
pub(crate) enum Told {
    /// An answer.
    Answer(Answer),
    /// Nobody listened there: it was never sent.
    NotSent,
    /// Nobody knows.
    Nothing,
}

/// What became of a change.
#[derive(Debug)]
pub(crate) enum Change {
    /// Made, and this was answered.
    Made(Answer),
    /// Not made, and it never will be.
    Refused(Told),
    /// Nobody knows.
    Unknown,
}

/// The way to one node's API.
#[derive(Clone, Debug)]
pub(crate) struct Door {
    url: String,
    key: String,
    agent: ureq::Agent,
}

impl Door {
    pub(crate) fn of(cluster: &ClusterWorld, number: u16) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            // A connection that a restart has closed must not look like an answer that got lost.
            .max_idle_connections(0)
            .build();
        Self {
            url: cluster.client(number).url(),
            key: cluster.client(number).key(),
            agent: ureq::Agent::new_with_config(config),
        }
    }

    /// One for each node.
    pub(crate) fn all(cluster: &ClusterWorld) -> Vec<Self> {
        let numbers = 1..=cluster.len();
        numbers.map(|number| Self::of(cluster, number)).collect()
    }

    /// Sends a request, with a JSON body where there is one.
    pub(crate) fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Told {
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header("X-API-Key", &self.key)
            .header("Content-Type", "application/json");
        let sent = match body {
            Some(body) => self
                .agent
                .run(request.body(body.to_string()).expect("a request")),
            None => self.agent.run(request.body(()).expect("a request")),
        };
        match sent {
            Ok(mut response) => {
                let status = response.status().as_u16();
                let read = response.body_mut().with_config().limit(u64::MAX);
                let body = read.read_to_vec();
                body.map_or(Told::Nothing, |body| Told::Answer(Answer { status, body }))
            }
            Err(ureq::Error::Io(err)) if err.kind() == io::ErrorKind::ConnectionRefused => {
                Told::NotSent
            }
            Err(_) => Told::Nothing,
        }
    }

    /// Sends a request that changes something.
    ///
    /// A node that found no leader promises that nothing was changed; any other failure promises
    /// nothing.
    pub(crate) fn change(&self, method: &str, path: &str, body: Option<&Value>) -> Change {
        match self.ask(method, path, body) {
            Told::Answer(answer) if answer.status < 300 => Change::Made(answer),
            told @ Told::NotSent => Change::Refused(told),
            Told::Answer(answer) if answer.message().contains("no leader could be reached") => {
                Change::Refused(Told::Answer(answer))
            }
            Told::Answer(answer) if answer.status < 500 => Change::Refused(Told::Answer(answer)),
            Told::Answer(_) | Told::Nothing => Change::Unknown,
        }
    }

    /// Makes a join token: the smallest thing that is kept for ever.
    pub(crate) fn make_token(&self) -> Change {
        self.change("POST", "/v1/tokens", Some(&json!({ "ttl_sec": 3600 })))
    }

    /// A list, as new as anything that was acknowledged before; `None` where it cannot be had.
    pub(crate) fn list(&self, path: &str) -> Option<Value> {
        match self.ask("GET", &format!("{path}?consistency=linearizable"), None) {
            Told::Answer(answer) if answer.status == 200 => Some(answer.json()),
            _ => None,
        }
    }
}
