//! Bytes as this crate writes them, from which damaged ones are made.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;

use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest, VoteResponse,
};
use prost::Message as _;
use proto::epoch::Epoch;
use proto::fuzzing::scratch;
use proto::ids::{ClusterId, NodeId, NodeKey};
use proto::units::{Mib, Stamp};
use proto::wire::raftlog as pb;

use crate::codec;
use crate::command::{Command, Proposal, Receipt, Refusal};
use crate::derived;
use crate::disk::RealDisk;
use crate::peer::{self, Envelope};
use crate::snapshot::Snapshots;
use crate::state::{Node, Resources, Settings, State, Template};
use crate::types::{DiskId, Entry, LogId, SnapshotMeta, Vote};
use crate::wire;

mod lives;

use lives::{building, channels, copies, fleet, life, people};

/// The last entry of [`founded`].
pub(super) const FOUNDED_AT: u64 = 3;

/// A cluster of one node with one template.
pub(super) fn founded() -> State {
    let mut state = State::default();
    let founding = [found(), Command::AdmitNode(node(1)), template()];
    for (at, command) in founding.into_iter().enumerate() {
        let applied = state.apply(at as u64 + 1, at_noon(command));
        assert!(applied.answer.is_ok(), "{:?}", applied.answer);
    }
    state
}

fn at_noon(command: Command) -> Proposal {
    Proposal {
        at: Stamp(1_700_000_000_000),
        command,
    }
}

fn found() -> Command {
    Command::FoundCluster {
        id: ClusterId([0xc1; 16]),
        settings: Settings::default(),
    }
}

fn template() -> Command {
    Command::PutTemplate(Template {
        name: "minimal".into(),
        digest: [1; 32],
        disk: Mib(512),
        size_bytes: 300 << 20,
        created_at: Stamp(0),
    })
}

fn node(n: u8) -> Node {
    Node {
        id: NodeId(1),
        name: format!("host{n}"),
        key: NodeKey([n; 32]),
        api_url: format!("http://10.0.0.{n}:7320"),
        cluster_address: format!("10.0.0.{n}:7321"),
        bulk_address: format!("10.0.0.{n}:7322"),
        disk: [n; 16],
        capacity: Resources {
            vcpus: 8,
            memory: Mib(4096),
            disk: Mib(40_960),
            sandboxes: 10,
        },
        vmm: "qemu".into(),
        machine: "q35/1".into(),
        cpu: "tcg-1".into(),
        version: "0.1.0".into(),
        incarnation: 1,
        tags: BTreeMap::from([("zone".into(), "a".into())]),
        templates: BTreeMap::from([("minimal".into(), [1; 32])]),
        ..Node::default()
    }
}

pub(super) fn proposals() -> Vec<Vec<u8>> {
    let all = [found(), Command::AdmitNode(node(1)), template()];
    let all = all
        .into_iter()
        .chain(life())
        .chain(fleet())
        .chain(people())
        .chain(channels())
        .chain(copies())
        .chain(building());
    all.map(|command| at_noon(command).encode()).collect()
}

/// Whole histories, each proposal behind its length.
pub(super) fn histories() -> Vec<Vec<u8>> {
    let all = [life(), fleet(), people(), channels(), copies(), building()];
    all.map(history).into()
}

fn history(commands: Vec<Command>) -> Vec<u8> {
    let proposals = commands.into_iter().map(at_noon);
    let framed = proposals.flat_map(|proposal| {
        let bytes = proposal.encode();
        let length = u16::try_from(bytes.len()).expect("a small proposal");
        [length.to_le_bytes().to_vec(), bytes].concat()
    });
    framed.collect()
}

/// States with a row of every kind: half-way through each history.
fn states() -> Vec<State> {
    let halves = [
        (life(), 6),
        (fleet(), 4),
        (people(), 4),
        (channels(), 2),
        (copies(), 13),
        (building(), 3),
    ];
    let states = halves.map(|(commands, many)| {
        let mut state = founded();
        for (at, command) in commands.into_iter().take(many).enumerate() {
            state.apply(FOUNDED_AT + 1 + at as u64, at_noon(command));
        }
        state
    });
    states.into()
}

pub(super) fn answers() -> Vec<Vec<u8>> {
    let answers = [
        Ok(Receipt::Done(3)),
        Ok(Receipt::Admitted(NodeId(9))),
        Ok(Receipt::Placed {
            node: NodeId(1),
            epoch: Epoch(7),
        }),
        Err(Refusal::NoSuchTemplate("minimal".into())),
        Err(Refusal::Fenced { newest: Epoch(8) }),
    ];
    answers.iter().map(wire::encode_answer).collect()
}

pub(super) fn node_rows() -> Vec<Vec<u8>> {
    vec![wire::encode_node(&node(1))]
}

/// CRC-32C as files here end with it.
pub(super) fn checksum(body: &[u8]) -> [u8; 4] {
    crc32c::crc32c(body).to_le_bytes()
}

fn log_id(index: u64) -> LogId {
    codec::log_id_from_wire(&pb::LogId {
        term: 2,
        leader: 1,
        index,
    })
}

fn vote() -> Vote {
    codec::vote_from_wire(&pb::Vote {
        term: 2,
        node: 1,
        committed: true,
    })
}

fn membership() -> pb::Membership {
    pb::Membership {
        configs: vec![pb::Voters { ids: vec![1] }],
        members: vec![pb::Member {
            id: 1,
            node: Some(pb::Node {
                address: "10.0.0.1:7321".into(),
                key: vec![1; 32],
                disk: vec![2; 16],
            }),
        }],
    }
}

fn meta() -> SnapshotMeta {
    let head = pb::SnapshotHead {
        last_applied: Some(codec::log_id_to_wire(&log_id(13))),
        membership: Some(pb::StoredMembership {
            log_id: Some(codec::log_id_to_wire(&log_id(1))),
            membership: Some(membership()),
        }),
    };
    crate::snapshot::meta(head).expect("a sound head")
}

pub(super) fn snapshot_files() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let opened = Snapshots::open(dir.path(), Arc::new(RealDisk));
    let (snapshots, _) = opened.expect("an empty directory");
    let files = states().into_iter().map(|state| {
        let written = snapshots.write(&meta(), state.rows()).expect("written");
        fs::read(written.path).expect("just written")
    });
    files.collect()
}

pub(super) fn derived_parts() -> Vec<Vec<u8>> {
    let rows: BTreeSet<_> = states().iter().flat_map(State::rows).collect();
    let sound = rows.into_iter().map(|(key, value)| {
        let short = &key[..key.len().min(8)];
        let crc = derived::checksum(b'r', short, &value).to_be_bytes();
        let count = u16::try_from((value.len() + 6).div_ceil(40)).unwrap_or(0);
        [short, &count.to_be_bytes(), &crc, &value].concat()
    });
    sound.collect()
}

fn to() -> Envelope {
    Envelope {
        sender: 1,
        target_disk: DiskId([2; 16]),
    }
}

fn entries() -> Vec<Entry> {
    use pb::entry::Payload;
    let payloads = [
        Payload::Blank(pb::Blank {}),
        Payload::Proposal(at_noon(template()).encode()),
        Payload::Membership(membership()),
    ];
    let entries = payloads.into_iter().zip(1..).map(|(payload, index)| {
        let entry = pb::Entry {
            log_id: Some(codec::log_id_to_wire(&log_id(index))),
            payload: Some(payload),
        };
        codec::entry_from_wire(entry).expect("a sound entry")
    });
    entries.collect()
}

pub(super) fn peer_requests() -> Vec<Vec<u8>> {
    let entries = entries();
    let wires = entries.iter().map(codec::entry_to_wire);
    let mut all: Vec<_> = wires.map(|wire| wire.encode_to_vec()).collect();
    let append = AppendEntriesRequest {
        vote: vote(),
        prev_log_id: Some(log_id(3)),
        entries,
        leader_commit: Some(log_id(2)),
    };
    all.extend([
        peer::append_request(to(), &append),
        peer::vote_request(to(), &VoteRequest::new(vote(), Some(log_id(3))), false),
        peer::transfer_request(
            to(),
            &TransferLeaderRequest::new(vote(), 2, Some(log_id(3))),
        ),
        peer::snapshot_offer(to(), &vote(), &meta()),
    ]);
    all
}

pub(super) fn peer_answers() -> Vec<Vec<u8>> {
    vec![
        peer::answer_append(&AppendEntriesResponse::PartialSuccess(Some(log_id(3)))),
        peer::answer_append(&AppendEntriesResponse::HigherVote(vote())),
        peer::answer_vote(&VoteResponse::new(vote(), Some(log_id(3)), true)),
        peer::answer_transfer(&Ok(())),
        peer::answer_snapshot(&vote()),
        peer::answer_stopped("why".into()),
        peer::answer_other_disk(DiskId([9; 16])),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::RowKey;

    /// A target that never sees a kind of row proves nothing of it.
    #[test]
    fn the_samples_have_rows_of_every_kind_and_a_resume_that_failed_once() {
        let states = states();
        let rows = states.iter().flat_map(State::rows);
        let keys = rows.map(|(key, _)| RowKey::decode(&key).expect("an own row"));
        let kinds: BTreeSet<String> = keys
            .map(|key| {
                let text = format!("{key:?}");
                let end = text.find(['(', ' ']).unwrap_or(text.len());
                text[..end].to_owned()
            })
            .collect();
        let wanted = "Audit, Build, BuildLog, Channel, Cluster, Event, Key, Member, Named, Node, Sandbox, \
                      Snapshot, Team, Template, Token, Usage";
        for kind in wanted.split(", ") {
            assert!(kinds.contains(kind), "no {kind} among {kinds:?}");
        }
        let mut sandboxes = states.iter().flat_map(State::sandboxes);
        assert!(sandboxes.any(|it| !it.failed_on.is_empty()));
    }
}
