//! The protocols a connection may ask for in its handshake.
//!
//! A number at the end changes only when two versions cannot understand each other's hello;
//! smaller steps are settled inside the hello.

/// What the dialling side wants to speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// Cluster traffic, for members only.
    Mesh,
    /// One call of a stranger who holds a join token.
    Join,
}

impl Alpn {
    /// Every protocol there is.
    pub const ALL: [Self; 2] = [Self::Mesh, Self::Join];

    /// The name sent in the handshake.
    #[must_use]
    pub const fn wire(self) -> &'static [u8] {
        match self {
            Self::Mesh => b"wrenn-mesh/1",
            Self::Join => b"wrenn-join/1",
        }
    }

    /// The protocol of that name, if we speak it.
    #[must_use]
    pub fn from_wire(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|alpn| alpn.wire() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_protocol_is_found_by_its_own_name_only() {
        for alpn in Alpn::ALL {
            assert_eq!(Alpn::from_wire(alpn.wire()), Some(alpn));
        }
        for stranger in [&b"h3"[..], b"", b"wrenn-mesh/2", b"wrenn-mesh/1\0"] {
            assert_eq!(Alpn::from_wire(stranger), None);
        }
    }
}
