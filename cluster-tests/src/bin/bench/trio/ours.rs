//! Our three members, seen from their client.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::ids::{KeyId, NodeKey, TeamId};
use proto::units::Stamp;
use raft::command::{Command as Change, Proposal};
use raft::state::Key;
use tokio::time;
use transport::limits::MAX_CALL;
use transport::{Config, Identity, Lane, Membership, Method, Transport};

use super::member::{FETCH, HOLD, LEADS, PROPOSE, SYNCS, TERM, Told, Who, folder_of};
use super::{MEMBERS, Store, VALUE_BYTES, free_address};
use crate::Outcome;

/// Longest anything here may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two looks for a leader.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Three processes and a way to them.
pub(crate) struct Ours {
    folder: PathBuf,
    members: Vec<Member>,
    client: Arc<Transport>,
    all: Vec<Who>,
}

struct Member {
    process: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    address: SocketAddr,
    key: NodeKey,
}

impl Member {
    fn start(id: usize, address: SocketAddr, folder: &Path) -> Outcome<(Self, Who)> {
        let home = folder_of(folder, id);
        std::fs::create_dir_all(&home)?;
        let mut process = Command::new(std::env::current_exe()?)
            .arg("--member")
            .args([id.to_string(), address.to_string()])
            .arg(home)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = process.stdin.take().ok_or("no standard input")?;
        let stdout = process.stdout.take().ok_or("no standard output")?;
        let mut member = Self {
            process,
            stdin,
            stdout: BufReader::new(stdout),
            address,
            key: NodeKey([0; 32]),
        };
        let who: Who = serde_json::from_str(&member.line()?)?;
        member.key = NodeKey(who.1);
        Ok((member, who))
    }

    fn line(&mut self) -> Outcome<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        if line.is_empty() {
            return Err("a member ended by itself".into());
        }
        Ok(line)
    }

    /// Tells it who all are and waits until it serves.
    fn tell(&mut self, told: &Told) -> Outcome {
        writeln!(self.stdin, "{}", serde_json::to_string(told)?)?;
        self.line().map(drop)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Fails where it has ended already, which is as good.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

impl Ours {
    /// Starts three members in `folder` and lets them form a group.
    pub(crate) async fn start(folder: &Path) -> Outcome<Self> {
        let identity = Identity::ephemeral()?;
        let config = Config::at(free_address()?, free_address()?);
        let client = Arc::new(Transport::start(&identity, config)?);
        let (mut members, mut all) = (Vec::new(), Vec::new());
        for id in 1..=MEMBERS {
            let (member, who) = Member::start(id, free_address()?, folder)?;
            members.push(member);
            all.push(who);
        }
        client.set_membership(Membership {
            index: 1,
            members: members.iter().map(|it| it.key).collect(),
            join_open: false,
        });
        // The first forms the group, so the others must serve by then.
        for (at, member) in members.iter_mut().enumerate().rev() {
            member.tell(&(all.clone(), client.key().0, at == 0))?;
        }
        Ok(Self {
            folder: folder.to_owned(),
            members,
            client,
            all,
        })
    }

    /// A connection to each member that answers, none of which needs to lead.
    pub(crate) fn doors(&self) -> Vec<Door> {
        let door = |member: &Member| Door {
            client: Arc::clone(&self.client),
            address: member.address,
            key: member.key,
        };
        self.members.iter().map(door).collect()
    }

    /// Which member leads.
    pub(crate) async fn leader(&self) -> Outcome<usize> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            for (at, door) in self.doors().iter().enumerate() {
                let leads = door.ask(LEADS, Bytes::new(), LOOK_AGAIN * 10).await;
                if leads.is_ok_and(|leads| leads.as_ref() == [1]) {
                    return Ok(at);
                }
            }
            time::sleep(LOOK_AGAIN).await;
        }
        Err("none of ours leads".into())
    }

    /// Syncs of all members so far.
    pub(crate) async fn syncs(&self) -> Outcome<f64> {
        let mut sum = 0;
        for door in self.doors() {
            let syncs = door.ask(SYNCS, Bytes::new(), PATIENCE).await?;
            sum += u64::from_be_bytes(syncs.as_ref().try_into()?);
        }
        Ok(sum as f64)
    }

    /// The newest term of all members: it grows with every election.
    pub(crate) async fn term(&self) -> Outcome<u64> {
        let mut newest = 0;
        for door in self.doors() {
            let term = door.ask(TERM, Bytes::new(), PATIENCE).await?;
            newest = newest.max(u64::from_be_bytes(term.as_ref().try_into()?));
        }
        Ok(newest)
    }

    /// Kills a member as a power cut would.
    pub(crate) fn kill(&mut self, at: usize) -> Outcome {
        self.members[at].process.kill()?;
        self.members[at].process.wait()?;
        Ok(())
    }

    /// Starts a killed member again.
    pub(crate) fn restart(&mut self, at: usize) -> Outcome {
        let address = self.members[at].address;
        let (mut member, who) = Member::start(at + 1, address, &self.folder)?;
        self.all[at] = who;
        member.tell(&(self.all.clone(), self.client.key().0, false))?;
        self.members[at] = member;
        Ok(())
    }
}

/// A way to one of our members.
#[derive(Clone)]
pub(crate) struct Door {
    client: Arc<Transport>,
    address: SocketAddr,
    key: NodeKey,
}

impl Door {
    async fn ask(&self, method: Method, body: Bytes, within: Duration) -> Result<Bytes, String> {
        let deadline = time::Instant::now() + within;
        let connected = self
            .client
            .connect(Lane::Control, self.address, self.key, deadline);
        connected.await.map_err(|err| err.to_string())?;
        let answer = self.client.call(self.key, method, body, deadline).await;
        answer.map_err(|err| err.to_string())
    }

    /// Proposes within a time.
    pub(crate) async fn put_within(&self, client: u8, within: Duration) -> Result<(), String> {
        let body = proposal(client).into();
        self.ask(PROPOSE, body, within).await.map(drop)
    }
}

impl Door {
    /// Has the member seal a snapshot of `mib`; the answer is for [`Self::fetch`].
    pub(crate) async fn hold(&self, mib: u32) -> Result<Bytes, String> {
        let body = serde_json::to_vec(&mib).map_err(|err| err.to_string())?;
        self.ask(HOLD, body.into(), MAX_CALL).await
    }

    /// Has the member fetch all of what another holds.
    pub(crate) async fn fetch(&self, held: &Bytes) -> Result<(), String> {
        self.ask(FETCH, held.clone(), MAX_CALL).await.map(drop)
    }
}

impl Store for Door {
    async fn put(&self, client: u8) -> Result<(), String> {
        self.put_within(client, PATIENCE).await
    }
}

/// A key with a name as long as etcd's value: a command that does not let the state grow.
fn proposal(client: u8) -> Vec<u8> {
    let key = Key {
        id: KeyId([client; 16]),
        team: TeamId::default(),
        name: "v".repeat(VALUE_BYTES),
        hash: [client; 32],
        shown: "wrn_123456".into(),
        ..Key::default()
    };
    let command = Change::PutKey(key);
    Proposal {
        at: Stamp(0),
        command,
    }
    .encode()
}
