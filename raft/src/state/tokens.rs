//! Join tokens. The log holds only the public half of a token's seed: neither a member nor whoever
//! steals a state file can join with it.

use proto::ids::{NodeId, NodeKey, TeamId, TokenId};
use proto::units::Stamp;
use proto::wire::raft as pb;

use super::rows::BadRow;
use crate::wire::{array, optional};

/// A join token without its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Its name in lists and for revoking it.
    pub id: TokenId,
    /// Ed25519 public key of its seed.
    pub public_key: [u8; 32],
    /// The only team that nodes which join by it serve; `None` makes them full members.
    pub team: Option<TeamId>,
    /// Past it the token is refused.
    pub expires_at: Stamp,
    /// How many nodes may still join by it.
    pub uses_left: u32,
    /// When it was made.
    pub created_at: Stamp,
    /// Who made it, for people.
    pub created_by: String,
    /// Whether it was withdrawn.
    pub revoked: bool,
    /// Who has joined by it. A joiner whose answer was lost finds its id here.
    pub redeemed: Vec<(NodeKey, NodeId)>,
}

impl Token {
    /// Whether somebody may still join by it.
    #[must_use]
    pub fn is_open(&self, now: Stamp) -> bool {
        !self.revoked && self.uses_left > 0 && now <= self.expires_at
    }
}

impl From<&Token> for pb::TokenRow {
    fn from(token: &Token) -> Self {
        Self {
            id: token.id.0.to_vec(),
            public_key: token.public_key.to_vec(),
            team: token.team.map(|team| team.0.to_vec()).unwrap_or_default(),
            expires_at_ms: token.expires_at.0,
            uses_left: token.uses_left,
            created_at_ms: token.created_at.0,
            created_by: token.created_by.clone(),
            revoked: token.revoked,
            redeemed: token
                .redeemed
                .iter()
                .map(|(key, node)| pb::Redeemed {
                    key: key.0.to_vec(),
                    node: node.0,
                })
                .collect(),
        }
    }
}

impl TryFrom<pb::TokenRow> for Token {
    type Error = BadRow;

    fn try_from(row: pb::TokenRow) -> Result<Self, BadRow> {
        let redeemed = row.redeemed.into_iter().map(|it| {
            let key = NodeKey(array("node key", &it.key)?);
            Ok((key, NodeId(it.node)))
        });
        Ok(Self {
            id: TokenId(array("token id", &row.id)?),
            public_key: array("token key", &row.public_key)?,
            team: optional("team id", &row.team)?.map(TeamId),
            expires_at: Stamp(row.expires_at_ms),
            uses_left: row.uses_left,
            created_at: Stamp(row.created_at_ms),
            created_by: row.created_by,
            revoked: row.revoked,
            redeemed: redeemed.collect::<Result<_, BadRow>>()?,
        })
    }
}
