//! The HTTP interface: parses, proposes, answers.
//!
//! Requests run through [`router`](fn@router) to one file per noun. Handlers check what was sent,
//! propose through the log or call the guest through the relay, and answer; they hold no state.
//! [`wire`] has the shapes and turns sandboxes into capsules, [`error`] every refusal's status.

mod audit;
mod auth;
mod build_archive;
mod build_shape;
mod builds;
mod capsules;
mod catching_up;
mod channels;
mod cluster;
mod cluster_info;
mod create;
mod description;
mod error;
mod events;
mod exec;
mod extract;
mod files;
mod fork;
mod form;
mod grants;
mod host_shape;
mod hosts;
mod keys;
mod later;
mod linger;
mod members;
mod metrics;
mod migrating;
mod node_shape;
mod nodes;
mod opening;
mod pausing;
mod preview;
mod rates;
mod reading;
mod retry;
mod router;
mod run;
mod samples;
mod scopes;
mod serve;
mod service;
mod snapshots;
mod state;
mod stats;
mod streams;
mod teams;
mod templates;
mod tokens;
mod unread;
mod upload;
mod usage;
mod uses;
mod wire;

pub use cluster_info::{ClusterInfo, LinearizeFuture, Minted, NoQuorum, Standing, TokenTerms};
pub use error::{ApiError, Code, DEADLINE_EXCEEDED};
pub use router::{openapi, router, router_with_pages};
pub use serve::serve;
pub use state::{ApiState, NodeFacts};
