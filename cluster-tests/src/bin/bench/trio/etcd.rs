//! Debian's etcd, three members of it, and a gRPC client that knows one call.
//!
//! The client is HTTP/2 by hyper with the two messages of a put written down: a generated client
//! would bring a code generator along and put the same bytes on the wire.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::TcpStream;

use super::{MEMBERS, Store, VALUE_BYTES, free_address};
use crate::Outcome;

/// Longest a group may take to come up or to catch up.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two looks at whether it has.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Three processes.
pub(crate) struct Etcd {
    folder: PathBuf,
    members: Vec<Member>,
}

struct Member {
    process: Option<Child>,
    client: SocketAddr,
    peer: SocketAddr,
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            // Fails where it has ended already, which is as good.
            drop(process.kill());
            drop(process.wait());
        }
    }
}

impl Etcd {
    /// Starts three members in `folder`.
    pub(crate) fn start(folder: &Path) -> Outcome<Self> {
        let mut members = Vec::new();
        for _ in 0..MEMBERS {
            members.push(Member {
                process: None,
                client: free_address()?,
                peer: free_address()?,
            });
        }
        let folder = folder.to_owned();
        let mut etcd = Self { folder, members };
        for at in 0..MEMBERS {
            etcd.restart(at)?;
        }
        for at in 0..MEMBERS {
            etcd.until(|etcd| etcd.metric(at, "etcd_server_has_leader") == Some(1.0))?;
        }
        Ok(etcd)
    }

    /// Starts a member that does not run.
    pub(crate) fn restart(&mut self, at: usize) -> Outcome {
        let peers = self.members.iter().enumerate();
        let peers = peers.map(|(at, member)| format!("m{at}=http://{}", member.peer));
        let peers = peers.collect::<Vec<_>>().join(",");
        let (name, member) = (format!("m{at}"), &mut self.members[at]);
        let (client, peer) = (
            format!("http://{}", member.client),
            format!("http://{}", member.peer),
        );
        let process = Command::new("etcd")
            .args(["--name", &name, "--initial-cluster", &peers])
            .args(["--initial-cluster-token", "wrenn-bench"])
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--logger", "zap", "--log-level", "error", "--data-dir"])
            .arg(self.folder.join(name))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|err| format!("start etcd (Debian has it in etcd-server): {err}"))?;
        member.process = Some(process);
        Ok(())
    }

    /// Kills a member as a power cut would.
    pub(crate) fn kill(&mut self, at: usize) -> Outcome {
        if let Some(mut process) = self.members[at].process.take() {
            process.kill()?;
            process.wait()?;
        }
        Ok(())
    }

    /// Which member leads.
    pub(crate) fn leader(&self) -> Outcome<usize> {
        let leads = |at: &usize| self.metric(*at, "etcd_server_is_leader") == Some(1.0);
        self.until(|_| (0..MEMBERS).any(|at| leads(&at)))?;
        Ok((0..MEMBERS).find(leads).ok_or("its leader changes")?)
    }

    /// Syncs of all members so far: of the log, and of the database.
    pub(crate) fn syncs(&self) -> f64 {
        let counts = [
            "etcd_disk_wal_fsync_duration_seconds_count",
            "etcd_disk_backend_commit_duration_seconds_count",
        ];
        let of_member = |at| counts.iter().filter_map(move |name| self.metric(at, name));
        (0..MEMBERS).flat_map(of_member).sum()
    }

    /// Waits until all members run and have a leader.
    pub(crate) fn settle(&self) -> Outcome {
        let is_led = |at| self.metric(at, "etcd_server_has_leader") == Some(1.0);
        self.until(|_| (0..MEMBERS).all(is_led))
    }

    /// A connection to a member.
    pub(crate) async fn door(&self, at: usize) -> Outcome<Door> {
        Door::open(self.members[at].client).await
    }

    fn metric(&self, at: usize, name: &str) -> Option<f64> {
        let address = format!("http://{}/metrics", self.members[at].client);
        let text = ureq::get(address).call().ok()?;
        let text = text.into_body().read_to_string().ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse().ok()
    }

    fn until(&self, holds: impl Fn(&Self) -> bool) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if holds(self) {
                return Ok(());
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Err("etcd did not come up".into())
    }
}

/// `etcdserverpb.PutRequest`, as far as it is used.
#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

/// A connection to one member.
#[derive(Clone)]
pub(crate) struct Door {
    requests: SendRequest<Full<Bytes>>,
    put: String,
}

impl Door {
    async fn open(address: SocketAddr) -> Outcome<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let io = TokioIo::new(stream);
        let (requests, connection) = handshake(TokioExecutor::new(), io).await?;
        // Ends with the connection; what went wrong is the requests' to tell.
        tokio::spawn(async { drop(connection.await) });
        let put = format!("http://{address}/etcdserverpb.KV/Put");
        Ok(Self { requests, put })
    }

    async fn call(&self, message: &impl Message) -> Outcome {
        let request = Request::post(&self.put)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(frame(message)))?;
        let response = self.requests.clone().send_request(request).await?;
        let head = response.headers().clone();
        let body = response.into_body().collect().await?;
        let status = body.trailers().unwrap_or(&head).get("grpc-status");
        match status {
            Some(status) if status == "0" => Ok(()),
            other => Err(format!("etcd answers {other:?}").into()),
        }
    }
}

impl Store for Door {
    async fn put(&self, client: u8) -> Result<(), String> {
        let request = PutRequest {
            key: format!("client {client}").into(),
            value: vec![b'v'; VALUE_BYTES].into(),
        };
        self.call(&request).await.map_err(|err| err.to_string())
    }
}

/// A message as gRPC sends it: not compressed, its length, its bytes.
fn frame(message: &impl Message) -> Bytes {
    let bytes = message.encode_to_vec();
    let mut frame = BytesMut::with_capacity(5 + bytes.len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
    frame.put_slice(&bytes);
    frame.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_put_is_framed_as_grpc_has_it() {
        let request = PutRequest {
            key: "k".into(),
            value: "v".into(),
        };
        let bytes = [0, 0, 0, 0, 6, 0x0a, 1, b'k', 0x12, 1, b'v'];
        assert_eq!(frame(&request).as_ref(), bytes);
    }
}
