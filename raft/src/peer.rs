//! Requests and answers between members, as bytes.
//!
//! Every request names the disk it is meant for, as the membership records it. A node that lost
//! its disk comes back under its old id with a blank memory; it finds itself addressed by a disk
//! it does not have, and neither votes nor acknowledges.

use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, TransferLeaderResponse,
    VoteRequest, VoteResponse,
};
use prost::Message;
use proto::wire::raftlog as pb;
use proto::wire::raftlog::append_answer::Outcome;
use proto::wire::raftlog::peer_answer::Answer;
use proto::wire::raftlog::peer_request::Call;

use crate::codec::{self, BadBytes};
use crate::snapshot;
use crate::types::{DiskId, LogId, SnapshotMeta, Types, Vote};

/// What goes with every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Envelope {
    /// Who asks.
    pub(crate) sender: u64,
    /// The receiver's disk, as the sender's membership has it.
    pub(crate) target_disk: DiskId,
}

impl Envelope {
    fn seal(self, call: Call) -> Vec<u8> {
        pb::PeerRequest {
            call: Some(call),
            target_disk: self.target_disk.0.to_vec(),
            sender: self.sender,
        }
        .encode_to_vec()
    }
}

/// Why a member's answer is none.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum NoAnswer {
    #[error(transparent)]
    Bad(#[from] BadBytes),
    /// Whoever answers there is not the member that was asked.
    #[error("it runs on disk {0}, not on the one the membership records")]
    OtherDisk(DiskId),
}

/// A request as a member receives it.
pub(crate) enum Request {
    Append(AppendEntriesRequest<Types>),
    Vote(VoteRequest<Types>),
    PreVote(VoteRequest<Types>),
    Transfer(TransferLeaderRequest<Types>),
    Snapshot(Vote, SnapshotMeta),
}

impl Request {
    /// The vote of whoever makes it.
    fn vote(&self) -> &Vote {
        match self {
            Self::Append(rpc) => &rpc.vote,
            Self::Vote(rpc) | Self::PreVote(rpc) => &rpc.vote,
            Self::Transfer(rpc) => rpc.from_leader(),
            Self::Snapshot(vote, _) => vote,
        }
    }
}

fn answer(answer: Answer) -> Vec<u8> {
    pb::PeerAnswer {
        answer: Some(answer),
    }
    .encode_to_vec()
}

fn log_id(id: Option<LogId>) -> Option<pb::LogId> {
    id.as_ref().map(codec::log_id_to_wire)
}

fn read_log_id(id: Option<pb::LogId>) -> Option<LogId> {
    id.as_ref().map(codec::log_id_from_wire)
}

fn read_vote(vote: Option<pb::Vote>) -> Result<Vote, BadBytes> {
    let vote = vote.ok_or(BadBytes("a message without a vote"))?;
    Ok(codec::vote_from_wire(&vote))
}

pub(crate) fn append_request(to: Envelope, rpc: &AppendEntriesRequest<Types>) -> Vec<u8> {
    to.seal(Call::Append(pb::AppendRequest {
        vote: Some(codec::vote_to_wire(&rpc.vote)),
        previous: log_id(rpc.prev_log_id),
        entries: rpc.entries.iter().map(codec::entry_to_wire).collect(),
        leader_commit: log_id(rpc.leader_commit),
    }))
}

pub(crate) fn vote_request(to: Envelope, rpc: &VoteRequest<Types>, pre: bool) -> Vec<u8> {
    let vote = pb::VoteRequest {
        vote: Some(codec::vote_to_wire(&rpc.vote)),
        last: log_id(rpc.last_log_id),
        transfer: rpc.leadership_transfer,
    };
    to.seal(if pre {
        Call::PreVote(vote)
    } else {
        Call::Vote(vote)
    })
}

pub(crate) fn transfer_request(to: Envelope, rpc: &TransferLeaderRequest<Types>) -> Vec<u8> {
    to.seal(Call::Transfer(pb::TransferRequest {
        from: Some(codec::vote_to_wire(rpc.from_leader())),
        to: *rpc.to_node_id(),
        last: log_id(rpc.last_log_id().copied()),
    }))
}

pub(crate) fn snapshot_offer(to: Envelope, vote: &Vote, meta: &SnapshotMeta) -> Vec<u8> {
    to.seal(Call::Snapshot(pb::SnapshotOffer {
        vote: Some(codec::vote_to_wire(vote)),
        head: Some(snapshot::head(meta)),
    }))
}

/// Reads what went with a request, passing over the request.
pub(crate) fn read_envelope(bytes: &[u8]) -> Result<Envelope, BadBytes> {
    let wire = codec::decode::<pb::PeerEnvelope>("not a request", bytes)?;
    let disk = wire.target_disk.try_into();
    Ok(Envelope {
        sender: wire.sender,
        target_disk: DiskId(disk.map_err(|_| BadBytes("a request that names no disk"))?),
    })
}

/// Reads a request. Every kind carries the vote of whoever makes it, so one with another node's is
/// made by a member that lies: as a leader or a candidate it would speak in that node's name.
pub(crate) fn read_request(bytes: &[u8]) -> Result<Request, BadBytes> {
    let wire = codec::decode::<pb::PeerRequest>("not a request", bytes)?;
    let sender = wire.sender;
    let request = read_call(wire.call.ok_or(BadBytes("a request of an unknown kind"))?)?;
    if request.vote().leader_id.node_id != sender {
        return Err(BadBytes("a vote of another member than the sender"));
    }
    Ok(request)
}

fn read_call(call: Call) -> Result<Request, BadBytes> {
    match call {
        Call::Append(append) => {
            let entries = append.entries.into_iter().map(codec::entry_from_wire);
            Ok(Request::Append(AppendEntriesRequest {
                vote: read_vote(append.vote)?,
                prev_log_id: read_log_id(append.previous),
                entries: entries.collect::<Result<_, _>>()?,
                leader_commit: read_log_id(append.leader_commit),
            }))
        }
        Call::Vote(vote) => Ok(Request::Vote(read_vote_request(vote)?)),
        Call::PreVote(vote) => Ok(Request::PreVote(read_vote_request(vote)?)),
        Call::Transfer(transfer) => Ok(Request::Transfer(TransferLeaderRequest::new(
            read_vote(transfer.from)?,
            transfer.to,
            read_log_id(transfer.last),
        ))),
        Call::Snapshot(offer) => {
            let head = offer.head.ok_or(BadBytes("a snapshot without a head"))?;
            Ok(Request::Snapshot(
                read_vote(offer.vote)?,
                snapshot::meta(head)?,
            ))
        }
    }
}

fn read_vote_request(wire: pb::VoteRequest) -> Result<VoteRequest<Types>, BadBytes> {
    let mut rpc = VoteRequest::new(read_vote(wire.vote)?, read_log_id(wire.last));
    rpc.leadership_transfer = wire.transfer;
    Ok(rpc)
}

pub(crate) fn answer_append(response: &AppendEntriesResponse<Types>) -> Vec<u8> {
    let outcome = match response {
        AppendEntriesResponse::Success => Outcome::Success(pb::Success {}),
        AppendEntriesResponse::PartialSuccess(matching) => Outcome::Partial(pb::Partial {
            matching: log_id(*matching),
        }),
        AppendEntriesResponse::Conflict => Outcome::Conflict(pb::Conflict {}),
        AppendEntriesResponse::HigherVote(vote) => Outcome::HigherVote(codec::vote_to_wire(vote)),
    };
    answer(Answer::Append(pb::AppendAnswer {
        outcome: Some(outcome),
    }))
}

pub(crate) fn answer_vote(response: &VoteResponse<Types>) -> Vec<u8> {
    answer(Answer::Vote(pb::VoteAnswer {
        vote: Some(codec::vote_to_wire(&response.vote)),
        granted: response.vote_granted,
        last: log_id(response.last_log_id),
    }))
}

pub(crate) fn answer_transfer(response: &TransferLeaderResponse<Types>) -> Vec<u8> {
    use openraft::raft::TransferLeaderError::{LogNotFlushed, VoteChanged};
    let mut wire = pb::TransferAnswer {
        accepted: response.is_ok(),
        ..pb::TransferAnswer::default()
    };
    match response {
        Ok(()) => {}
        Err(VoteChanged { expected, actual }) => {
            wire.expected_vote = Some(codec::vote_to_wire(expected));
            wire.actual_vote = Some(codec::vote_to_wire(actual));
        }
        Err(LogNotFlushed { expected, actual }) => {
            wire.expected_log = log_id(*expected);
            wire.actual_log = log_id(*actual);
        }
    }
    answer(Answer::Transfer(wire))
}

pub(crate) fn answer_snapshot(vote: &Vote) -> Vec<u8> {
    answer(Answer::Snapshot(codec::vote_to_wire(vote)))
}

pub(crate) fn answer_stopped(why: String) -> Vec<u8> {
    answer(Answer::Stopped(why))
}

pub(crate) fn answer_other_disk(here: DiskId) -> Vec<u8> {
    answer(Answer::OtherDisk(here.0.to_vec()))
}

fn read_answer(bytes: &[u8]) -> Result<Answer, NoAnswer> {
    let wire = codec::decode::<pb::PeerAnswer>("not an answer", bytes)?;
    match wire.answer {
        Some(Answer::Stopped(_)) => Err(BadBytes("the member's raft has stopped").into()),
        Some(Answer::OtherDisk(disk)) => {
            let disk = disk.try_into().map_err(|_| WRONG_ANSWER)?;
            Err(NoAnswer::OtherDisk(DiskId(disk)))
        }
        Some(answer) => Ok(answer),
        None => Err(BadBytes("an answer of an unknown kind").into()),
    }
}

const WRONG_ANSWER: NoAnswer = NoAnswer::Bad(BadBytes("an answer to another question"));

pub(crate) fn append_answer(bytes: &[u8]) -> Result<AppendEntriesResponse<Types>, NoAnswer> {
    let Answer::Append(append) = read_answer(bytes)? else {
        return Err(WRONG_ANSWER);
    };
    Ok(match append.outcome.ok_or(WRONG_ANSWER)? {
        Outcome::Success(_) => AppendEntriesResponse::Success,
        Outcome::Partial(partial) => {
            AppendEntriesResponse::PartialSuccess(read_log_id(partial.matching))
        }
        Outcome::Conflict(_) => AppendEntriesResponse::Conflict,
        Outcome::HigherVote(vote) => {
            AppendEntriesResponse::HigherVote(codec::vote_from_wire(&vote))
        }
    })
}

pub(crate) fn vote_answer(bytes: &[u8]) -> Result<VoteResponse<Types>, NoAnswer> {
    let Answer::Vote(vote) = read_answer(bytes)? else {
        return Err(WRONG_ANSWER);
    };
    Ok(VoteResponse::new(
        read_vote(vote.vote)?,
        read_log_id(vote.last),
        vote.granted,
    ))
}

pub(crate) fn transfer_answer(bytes: &[u8]) -> Result<TransferLeaderResponse<Types>, NoAnswer> {
    use openraft::raft::TransferLeaderError::{LogNotFlushed, VoteChanged};
    let Answer::Transfer(transfer) = read_answer(bytes)? else {
        return Err(WRONG_ANSWER);
    };
    if transfer.accepted {
        return Ok(Ok(()));
    }
    Ok(Err(if transfer.expected_vote.is_some() {
        VoteChanged {
            expected: read_vote(transfer.expected_vote)?,
            actual: read_vote(transfer.actual_vote)?,
        }
    } else {
        LogNotFlushed {
            expected: read_log_id(transfer.expected_log),
            actual: read_log_id(transfer.actual_log),
        }
    }))
}

pub(crate) fn snapshot_answer(bytes: &[u8]) -> Result<Vote, NoAnswer> {
    match read_answer(bytes)? {
        Answer::Snapshot(vote) => Ok(codec::vote_from_wire(&vote)),
        _ => Err(WRONG_ANSWER),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vote_of(node: u64) -> Vote {
        codec::vote_from_wire(&pb::Vote {
            term: 3,
            node,
            committed: false,
        })
    }

    #[test]
    fn a_member_that_carries_another_ones_vote_is_not_heard() {
        let to = Envelope {
            sender: 2,
            target_disk: DiskId([1; 16]),
        };
        for pre in [false, true] {
            let own = vote_request(to, &VoteRequest::new(vote_of(2), None), pre);
            assert!(read_request(&own).is_ok());
            let others = vote_request(to, &VoteRequest::new(vote_of(3), None), pre);
            assert!(read_request(&others).is_err());
        }
        let lead = |node| AppendEntriesRequest {
            vote: vote_of(node),
            prev_log_id: None,
            entries: vec![],
            leader_commit: None,
        };
        assert!(read_request(&append_request(to, &lead(2))).is_ok());
        assert!(read_request(&append_request(to, &lead(3))).is_err());
        let hand_over = |from| TransferLeaderRequest::new(vote_of(from), 1, None);
        assert!(read_request(&transfer_request(to, &hand_over(2))).is_ok());
        assert!(read_request(&transfer_request(to, &hand_over(3))).is_err());
    }
}
