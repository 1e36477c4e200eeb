//! What comes from this member's disk and from other members, as fuzz targets. Those of the log's
//! own files are in `log/fuzzing.rs`.

use std::fs;

use prost::Message as _;
use proto::fuzzing::{Target, scratch};
use proto::wire::raftlog as pb;

use crate::command::Proposal;
use crate::derived;
use crate::log::fuzzing as log;
use crate::peer;
use crate::snapshot;
use crate::state::{RowKey, State};
use crate::wire;

mod samples;

/// The targets of this crate.
pub const TARGETS: &[Target] = &[
    Target {
        name: "raft-proposal",
        samples: samples::proposals,
        run: proposal,
    },
    Target {
        name: "raft-apply",
        samples: samples::histories,
        run: apply,
    },
    Target {
        name: "raft-answer",
        samples: samples::answers,
        run: |bytes| drop(wire::decode_answer(bytes)),
    },
    Target {
        name: "raft-node-row",
        samples: samples::node_rows,
        run: node_row,
    },
    Target {
        name: "raft-snapshot-file",
        samples: samples::snapshot_files,
        run: snapshot_file,
    },
    Target {
        name: "raft-derived-part",
        samples: samples::derived_parts,
        run: derived_part,
    },
    Target {
        name: "raft-peer-request",
        samples: samples::peer_requests,
        run: peer_request,
    },
    Target {
        name: "raft-peer-answer",
        samples: samples::peer_answers,
        run: peer_answer,
    },
    log::RECORD,
    log::SEGMENT,
];

/// Reads a proposal; one that is taken is the same after another trip.
fn proposal(bytes: &[u8]) {
    let Ok(read) = Proposal::decode(bytes) else {
        return;
    };
    let again = Proposal::decode(&read.encode());
    assert_eq!(again.as_ref(), Ok(&read), "it changed on its way");
}

/// Applies proposals, each behind its length, as a member applies its log. Whatever can be read must
/// be applied by every member, so none may end here; and what comes of it must survive as rows.
fn apply(bytes: &[u8]) {
    let mut state = samples::founded();
    let mut rest = bytes;
    for index in samples::FOUNDED_AT + 1.. {
        let Some((length, after)) = rest.split_first_chunk::<2>() else {
            break;
        };
        let length = usize::from(u16::from_le_bytes(*length)).min(after.len());
        let (proposal, after) = after.split_at(length);
        rest = after;
        let Ok(proposal) = Proposal::decode(proposal) else {
            continue;
        };
        let before = state.clone();
        let applied = State::apply(&mut state, index, proposal.clone());
        if applied.answer.is_err() {
            let is_record = |key: &RowKey| matches!(key, RowKey::Audit(..));
            assert!(
                state == before || applied.touched.iter().all(is_record),
                "{proposal:?} was refused and changed something"
            );
        }
        let mut copy = before;
        let changes = applied.touched.iter();
        let changes = changes.map(|key| (key.encode(), state.row(key)));
        copy.follow(changes).expect("own rows are readable");
        assert!(copy == state, "{proposal:?} changed more than it told of");
    }
    let again = State::from_rows(state.rows()).expect("own rows are readable");
    assert!(again == state, "the state does not survive as rows");
}

fn node_row(bytes: &[u8]) {
    if let Ok(node) = wire::decode_node(bytes) {
        let again = wire::decode_node(&wire::encode_node(&node));
        assert_eq!(again, Ok(node), "it changed on its way");
    }
}

/// Reads a file as it is, and with its checksum made right.
fn snapshot_file(bytes: &[u8]) {
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let path = dir.path().join("snapshot");
    let body = bytes.len().saturating_sub(4);
    let mended = [&bytes[..body], &samples::checksum(&bytes[..body])].concat();
    for bytes in [bytes, &mended] {
        fs::write(&path, bytes).expect("written");
        if let Ok((state, _)) = snapshot::load::<State>(&path) {
            let again = State::from_rows(state.rows()).expect("own rows are readable");
            assert!(again == state, "it changed on its way");
        }
    }
}

/// A row's key and the parts of its value, as the derived copy has them.
fn derived_part(bytes: &[u8]) {
    let _refused = RowKey::decode(bytes);
    let (key, parts) = bytes.split_at(bytes.len().min(8));
    let part = |(at, part): (usize, &[u8])| (u16::try_from(at).unwrap_or(0), part.into());
    let parts = parts.chunks(40).enumerate().map(part).collect();
    let _refused = derived::join_parts(b'r', key, parts);
}

fn peer_request(bytes: &[u8]) {
    let _refused = peer::read_envelope(bytes);
    let _refused = peer::read_request(bytes);
    if let Ok(entry) = pb::Entry::decode(bytes) {
        let _refused = crate::codec::entry_from_wire(entry);
    }
}

fn peer_answer(bytes: &[u8]) {
    let _refused = peer::append_answer(bytes);
    let _refused = peer::vote_answer(bytes);
    let _refused = peer::transfer_answer(bytes);
    let _refused = peer::snapshot_answer(bytes);
}
