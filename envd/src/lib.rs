//! The agent inside the guest.
//!
//! It is the guest's first process: it finds the root disk, mounts what a Linux system expects,
//! brings up the network, and then serves files and processes to the host over one TCP port. It is
//! linked statically and lives in the initramfs, so templates need no agent inside. Started by
//! hand with `--port` it only serves, which is how it is tested.
//!
//! | room | who lives there |
//! |---|---|
//! | [`boot`] | the duties of process 1, from the first mount to the poweroff |
//! | [`serve`] | the listening socket and its connections |
//! | [`http`] | routes, tokens, `/init` and the other plain endpoints |
//! | [`process`] | starting, feeding, watching and ending processes |
//! | [`files`] | upload, download and the file service |
//! | [`watch`] | telling what happens in directories |
//! | [`ports`] | reaching what listens on the guest's loopback only |
//! | [`snapshot`] [`connections`] | the guest's half of pause and resume |
//! | [`agent`] | the state they share |
//! | [`auth`] [`environment`] [`paths`] [`users`] [`clock`] [`metrics`] | rules, mostly pure |
//! | [`sys`] | the only `unsafe` code |

#![deny(unsafe_code)]

pub mod agent;
pub mod auth;
pub mod boot;
pub mod clock;
pub mod connections;
pub mod environment;
pub mod files;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod http;
pub mod log;
pub mod metrics;
pub mod paths;
pub mod ports;
pub mod process;
pub mod serve;
pub mod snapshot;
pub mod sys;
pub mod users;
pub mod watch;
