//! Coming in: the one call of a node that is not a member yet, both ends.
//!
//! ```text
//! joiner   dial under the key the token names > sign (this connection | cluster, token, keys, node)
//! member   versions > clock > cluster > token > signature > RedeemToken through the log > roster
//! joiner   write the roster down > open raft under the id > a leader adds it
//! ```
//!
//! The signature is made with the token's seed over a value that only the two ends of this very
//! connection know, so it is of no use on another one, and the secret never leaves the joiner. The
//! member that is asked checks it; the log decides whether the token still has a use, and burns it
//! in the same entry. A joiner that lost the answer asks again and finds its id.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use proto::ids::{ClusterId, NodeId, TokenId};
use proto::version;
use proto::wire::mesh as wire;
use raft::command::{Command, Receipt};
use raft::state::Node;
use raft::wire::{decode_node, encode_node};
use tokio::time::{self, Instant};
use transport::{
    Call, DialError, Handler, JoinChannel, RpcError, Seed, Transport, verify_seed_signature,
};

use super::calls;
use super::propose::{ProposeError, Proposer};
use super::roster::Roster;
use super::token::{JoinTicket, ReadTokenError, TokenContact};
use crate::base::chain::chain;
use crate::base::clock::Clock;

/// How far two hosts' wall clocks may differ. Tokens expire and records age by them.
const MAX_CLOCK_SKEW: Duration = Duration::from_secs(300);
/// Longest one contact may take: it has to reach a quorum.
const CONTACT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a joiner goes on asking while nobody can decide: a leader change and a slow start of
/// the contact fit.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause before all contacts are asked again.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// Longest name of a node that is let in; as long as a host's may be.
const NAME_BYTES: usize = 64;
/// What the member that is asked may spend on the log, within the transport's limit for strangers.
const REDEEM_TIMEOUT: Duration = Duration::from_secs(4);

/// A node that was let in.
#[derive(Clone, Debug)]
pub struct Joined {
    /// Its id, for ever.
    pub node: NodeId,
    /// Who else there is.
    pub roster: Roster,
}

/// Why a node was not let in.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The token is none.
    #[error(transparent)]
    Token(#[from] ReadTokenError),
    /// The cluster said no; asking again changes nothing.
    #[error("the cluster refused: {0}")]
    Refused(String),
    /// None of the contacts could be asked, or none could decide.
    #[error("no member could let this node in; the last said: {0}")]
    NobodyDecides(String),
}

/// Joins the cluster that `ticket` names.
///
/// # Errors
/// [`JoinError`]; nothing was changed here. Trying again with the same key is safe.
pub async fn join(
    transport: &Transport,
    ticket: &JoinTicket,
    node: &Node,
    clock: &dyn Clock,
) -> Result<Joined, JoinError> {
    let give_up = Instant::now() + JOIN_TIMEOUT;
    let seed = Seed::from_bytes(ticket.seed);
    loop {
        let mut last = String::new();
        for contact in &ticket.contacts {
            let asked = ask(transport, ticket, &seed, contact, node, clock).await;
            match asked {
                Ok(joined) => return Ok(joined),
                Err(Asked::Refused(why)) => return Err(JoinError::Refused(why)),
                Err(Asked::Later(why)) => last = why,
            }
        }
        if Instant::now() + ASK_AGAIN >= give_up {
            return Err(JoinError::NobodyDecides(last));
        }
        time::sleep(ASK_AGAIN).await;
    }
}

/// What asking one contact came to, if not to a membership.
enum Asked {
    Refused(String),
    Later(String),
}

async fn ask(
    transport: &Transport,
    ticket: &JoinTicket,
    seed: &Seed,
    contact: &TokenContact,
    node: &Node,
    clock: &dyn Clock,
) -> Result<Joined, Asked> {
    let deadline = Instant::now() + CONTACT_TIMEOUT;
    let make = |channel: &JoinChannel| {
        let mut request = wire::JoinRequest {
            protocol: calls::PROTOCOL,
            product: version::PRODUCT.to_owned(),
            cluster: ticket.cluster.0.to_vec(),
            token: ticket.token.0.to_vec(),
            clock_ms: clock.now().0,
            node: encode_node(node),
            signature: Vec::new(),
        };
        let joiner_first = [channel.own.0, channel.peer.0];
        let signed = transcript(&request, channel, joiner_first);
        request.signature = seed.sign(&signed).to_vec();
        calls::body(&request)
    };
    let called = transport
        .call_join(contact.control, contact.key, calls::JOIN, make, deadline)
        .await;
    let answer = called.map_err(|err| sorted(&err))?;
    let bad = || Asked::Later("the answer is of another version".into());
    let answer: wire::JoinAnswer = calls::answer(answer).map_err(|_| bad())?;
    let roster = answer.roster.map(Roster::from_wire);
    Ok(Joined {
        node: NodeId(answer.node),
        roster: roster.and_then(Result::ok).ok_or_else(bad)?,
    })
}

/// A refusal is final, whoever says it; whatever else went wrong may pass.
fn sorted(err: &DialError) -> Asked {
    match err {
        DialError::Hello { source, .. } => match &**source {
            RpcError::Rejected { reason } => Asked::Refused(reason.clone()),
            RpcError::Failed { reason } => Asked::Later(reason.clone()),
            _ => Asked::Later(chain(err)),
        },
        DialError::WrongKey { .. } => Asked::Later(format!(
            "{}: it was set up anew since the token was made, or is not who it says; \
             create a new token",
            chain(err)
        )),
        DialError::JoinClosed { .. } => Asked::Later(format!(
            "{}: the token was used or withdrawn long ago, or is of another cluster",
            chain(err)
        )),
        DialError::VersionMismatch { .. } => Asked::Refused(chain(err)),
        _ => Asked::Later(chain(err)),
    }
}

/// What is signed: everything the request says, tied to the connection it is said on. Each part
/// has its length before it, so that no two requests read the same.
fn transcript(request: &wire::JoinRequest, channel: &JoinChannel, keys: [[u8; 32]; 2]) -> Vec<u8> {
    let [joiner, member] = keys;
    let parts: [&[u8]; 9] = [
        b"wrenn join 1",
        &channel.exporter,
        &joiner,
        &member,
        &request.cluster,
        &request.token,
        &request.clock_ms.to_be_bytes(),
        &request.protocol.to_be_bytes(),
        &request.node,
    ];
    let mut bytes = Vec::new();
    for part in parts {
        bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
        bytes.extend_from_slice(part);
    }
    bytes
}

/// The member's end.
pub struct JoinCalls {
    /// How the token is burned.
    pub proposer: Proposer,
    /// To tell a joiner whose clock is off.
    pub clock: std::sync::Arc<dyn Clock>,
    /// Whom a host of one team may dial.
    pub voters: Box<dyn Fn() -> BTreeSet<NodeId> + Send + Sync>,
}

impl Handler for JoinCalls {
    async fn call(&self, call: Call) -> Result<Bytes, RpcError> {
        let channel = call.channel.ok_or_else(|| no("not a join"))?;
        if call.method != calls::JOIN {
            return Err(RpcError::NotServed {
                method: call.method,
            });
        }
        let request: wire::JoinRequest = calls::request(call.body)?;
        let (token, node) = self.check(&request, &channel).await.map_err(no)?;
        let redeem = Command::RedeemToken { token, node };
        let redeemed = time::timeout(REDEEM_TIMEOUT, self.proposer.propose(redeem)).await;
        match redeemed {
            Ok(Ok(Receipt::Admitted(node))) => Ok(self.welcome(node)),
            Ok(Ok(_)) => Err(RpcError::failed("the log answered something else")),
            Ok(Err(ProposeError::Refused(refusal))) => Err(no(refusal)),
            Ok(Err(ProposeError::Log(err))) => Err(RpcError::failed(chain(&err))),
            Err(_) => Err(RpcError::failed("the cluster did not decide in time")),
        }
    }
}

impl JoinCalls {
    /// Everything that can be said without the log.
    async fn check(
        &self,
        request: &wire::JoinRequest,
        channel: &JoinChannel,
    ) -> Result<(TokenId, Node), String> {
        if request.protocol != calls::PROTOCOL {
            return Err(format!(
                "the node runs Wrenn {} with protocol {}, this cluster speaks protocol {}: update \
                 the older of the two",
                printable(&request.product),
                request.protocol,
                calls::PROTOCOL
            ));
        }
        self.check_clock(request.clock_ms)?;
        let cluster = request.cluster.as_slice().try_into().map(ClusterId);
        let token = request.token.as_slice().try_into().map(TokenId);
        let (Ok(cluster), Ok(token)) = (cluster, token) else {
            return Err("the request is garbled".into());
        };
        let ours = self.proposer.view().state().cluster().map(|it| it.id);
        if ours != Some(cluster) {
            return Err(format!("the token is of another cluster, {cluster}"));
        }
        let public_key = self.public_key(token).await?;
        let keys = [channel.peer.0, channel.own.0];
        let signed = transcript(request, channel, keys);
        if !verify_seed_signature(&public_key, &signed, &request.signature) {
            return Err("the token's secret is wrong: it was changed or made up".into());
        }
        let mut node =
            decode_node(&request.node).map_err(|err| format!("the node's record: {err}"))?;
        check_record(&node)?;
        // Whatever the record says: the key is the one that was proven.
        node.key = channel.peer;
        Ok((token, node))
    }

    fn check_clock(&self, theirs_ms: u64) -> Result<(), String> {
        let ours_ms = self.clock.now().0;
        let skew = Duration::from_millis(ours_ms.abs_diff(theirs_ms));
        if skew <= MAX_CLOCK_SKEW {
            return Ok(());
        }
        let way = if theirs_ms < ours_ms {
            "behind"
        } else {
            "ahead of"
        };
        Err(format!(
            "the node's clock is {} s {way} this cluster's; set it (a time server helps) and try \
             again",
            skew.as_secs()
        ))
    }

    /// The public half of a token. One made a moment ago on another node may not show here yet.
    async fn public_key(&self, id: TokenId) -> Result<[u8; 32], String> {
        let known = || {
            let state = self.proposer.view().state();
            state.token(id).map(|token| token.public_key)
        };
        if let Some(key) = known() {
            return Ok(key);
        }
        let _may_be_stale = time::timeout(REDEEM_TIMEOUT, self.proposer.linearize()).await;
        known().ok_or_else(|| {
            format!("no join token {id}: it was withdrawn or forgotten; create a new one")
        })
    }

    fn welcome(&self, node: NodeId) -> Bytes {
        let view = self.proposer.view();
        let applied = view.applied();
        let state = view.state();
        let mut roster = Roster::of(&state, applied);
        if state.node(node).is_none_or(|node| node.team.is_some()) {
            roster = roster.for_host(&(self.voters)());
        }
        calls::body(&wire::JoinAnswer {
            node: node.0,
            roster: Some(roster.to_wire()),
        })
    }
}

/// What a stranger says of itself is shown to people, and dialled: a record that is no record must
/// not burn a token.
fn check_record(node: &Node) -> Result<(), String> {
    let plain = |it: char| it.is_ascii_graphic();
    if node.name.is_empty() || node.name.len() > NAME_BYTES || !node.name.chars().all(plain) {
        return Err(format!(
            "the node's name is not 1 to {NAME_BYTES} visible ASCII characters; set another one"
        ));
    }
    for address in [&node.cluster_address, &node.bulk_address] {
        if address.parse::<SocketAddr>().is_err() {
            let shown = printable(address);
            return Err(format!(
                "the node's address {shown:?} is no IP address with a port; set another one"
            ));
        }
    }
    Ok(())
}

fn no(reason: impl ToString) -> RpcError {
    RpcError::rejected(reason.to_string())
}

/// A stranger's text, fit for a message.
fn printable(text: &str) -> String {
    text.chars()
        .filter(|it| it.is_ascii_graphic())
        .take(32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_nobody_could_read_or_dial_lets_nobody_in() {
        let fine = Node {
            name: "box-1".into(),
            cluster_address: "10.0.0.1:7321".into(),
            bulk_address: "[::1]:7322".into(),
            ..Node::default()
        };
        assert_eq!(check_record(&fine), Ok(()));
        for name in ["", "two words", "\x1b[2Jbox", &"x".repeat(65)] {
            let name = name.to_owned();
            let node = Node {
                name,
                ..fine.clone()
            };
            assert!(check_record(&node).is_err(), "{:?}", node.name);
        }
        for address in ["", "box", "10.0.0.1", "10.0.0.1:99999"] {
            let (cluster_address, bulk_address) = (address.to_owned(), address.to_owned());
            let control = Node {
                cluster_address,
                ..fine.clone()
            };
            let bulk = Node {
                bulk_address,
                ..fine.clone()
            };
            assert!(check_record(&control).is_err(), "{address}");
            assert!(check_record(&bulk).is_err(), "{address}");
        }
    }
}
