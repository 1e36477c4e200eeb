//! What a joiner's proof is tied to: the one TLS session it is sent on.
//!
//! Both ends of a connection derive the same secret from its handshake, and no other connection
//! has it. A joiner signs it with the token's seed ([`crate::seal`]); a proof copied to another
//! connection, or passed on by somebody in between, does not fit there.

use proto::ids::NodeKey;
use quinn::Connection;

/// What the secret is derived for; both ends must use the same words.
const EXPORTER_LABEL: &[u8] = b"wrenn join 1";

/// A connection as both ends of a join see it, each from its own side.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct JoinChannel {
    /// The same 32 bytes at both ends, and on no other connection.
    pub exporter: [u8; 32],
    /// This node's key.
    pub own: NodeKey,
    /// The key the other end has proven.
    pub peer: NodeKey,
}

impl JoinChannel {
    /// The channel of an established connection between `own` and `peer`.
    pub(crate) fn of(connection: &Connection, own: NodeKey, peer: NodeKey) -> Option<Self> {
        let mut exporter = [0; 32];
        connection
            .export_keying_material(&mut exporter, EXPORTER_LABEL, &[])
            .ok()?;
        Some(Self {
            exporter,
            own,
            peer,
        })
    }
}

impl std::fmt::Debug for JoinChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the exporter.
        write!(f, "JoinChannel({} with {})", self.own, self.peer)
    }
}
