//! Pinned, mutually authenticated QUIC between Wrenn nodes.
//!
//! There is no certificate authority: a node *is* its Ed25519 key ([`identity`]). TLS proves the
//! key on both ends ([`tls`]); a gate right after the handshake ([`gate`]) decides from the
//! replicated member list what the other end may do; a hello exchange ([`rpc::hello`]) proves to
//! the dialler that it was let in, and only then does a connection count as a peer ([`peers`]).
//!
//! ```text
//! dial > handshake (both keys proven) > gate (alpn, key, members) > hello > peer: calls both ways
//! ```
//!
//! Each node owns two endpoints with a socket each ([`endpoint`]): *control* for calls and small
//! datagrams, *bulk* for chunks and snapshots ([`bulk`]), so that the second cannot delay the
//! first. [`mesh::Transport`] is the assembled thing and owns every task; bounds are in
//! [`limits`], reasons for closing in [`close`]. This crate knows nothing of raft or sandboxes:
//! others register handlers for their services ([`rpc`]).

#![forbid(unsafe_code)]

pub mod alpn;
mod bucket;
pub mod bulk;
pub mod close;
mod complaints;
mod congestion;
pub mod datagram;
pub mod endpoint;
pub mod gate;
pub mod identity;
pub mod join;
pub mod limits;
pub mod mesh;
pub mod peers;
pub mod rpc;
pub mod seal;
pub mod sim;
pub mod streams;
pub mod tls;

#[cfg(test)]
mod tests;

/// A future in a box, as the callbacks here return it.
pub type BoxFuture<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + Send + 'a>>;

pub use bulk::Pace;
pub use close::CloseCode;
pub use datagram::DatagramError;
pub use endpoint::Lane;
pub use gate::Membership;
pub use identity::Identity;
pub use join::JoinChannel;
pub use limits::Limits;
pub use mesh::{Config, DialError, StartError, Transport};
pub use rpc::{Call, Handler, Method, RpcError, Service};
pub use seal::{Seed, verify_seed_signature};
pub use sim::{Faults, Link};
pub use streams::{BiStream, Inbound, StreamHandler};
