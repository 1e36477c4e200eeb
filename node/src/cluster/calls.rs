//! The calls that nodes make to each other, beside raft's own: their numbers and their messages.

use bytes::Bytes;
use prost::Message;
use transport::{Method, RpcError, Service};

/// Raft's one call: opaque bytes both ways.
pub(super) const RAFT: Method = Service::RAFT.method(1);
/// A stranger asks to be let in.
pub(super) const JOIN: Method = Service::JOIN.method(1);
/// A proposal for the leader.
pub(super) const PROPOSE: Method = Service::CLUSTER.method(1);
/// Which entry a read must have seen.
pub(super) const READ_INDEX: Method = Service::CLUSTER.method(2);
/// A lease to be renewed.
pub(super) const RENEW: Method = Service::CLUSTER.method(3);
/// Whether a key belongs to a member.
pub(super) const VOUCH: Method = Service::CLUSTER.method(4);
/// The load reports that a voter has heard.
pub(super) const LOAD_TABLE: Method = Service::CLUSTER.method(5);
/// Applied entries, for a mirror.
pub(super) const PULL: Method = Service::CLUSTER.method(6);

/// Newest version of the messages here; spoken by every release so far.
pub(super) const PROTOCOL: u32 = 1;

/// What a node says that is not the leader and may not send a call on.
pub(super) const NOT_LEADER: &str = "not the leader";

/// `message` as the body of a call or an answer.
pub(super) fn body(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

/// Reads the body of a call.
pub(super) fn request<M: Message + Default>(bytes: Bytes) -> Result<M, RpcError> {
    M::decode(bytes).map_err(|_| RpcError::rejected("the request is no message of this call"))
}

/// Reads an answer; a peer that answers something else counts as one that failed.
pub(super) fn answer<M: Message + Default>(bytes: Bytes) -> Result<M, RpcError> {
    M::decode(bytes).map_err(|_| RpcError::failed("the answer is no message of this call"))
}
