//! Every parser of bytes that come from a disk, a peer, a guest or a hypervisor, tried with damaged
//! bytes.
//!
//! The parsers lie all over the crates and are private to their rooms; their targets lie beside
//! them, in files called `fuzzing.rs` behind the feature of that name. Here is what makes damaged
//! bytes of sound ones ([`mutate`]), runs a target on them and judges it ([`trial`]), and the list
//! of all targets ([`targets`]).
//!
//! ```text
//! samples, corpus/<target>/*  ->  mutate(seed, number)  ->  run  ->  panic? too much memory? too long?
//! ```
//!
//! A case is a seed and a number, so a failure is repeated by both. What was found once is kept as a
//! file in `corpus/<target>/` and tried first ever after. There is no feedback from the code that
//! ran: what takes its place is that targets mend checksums before they try again, so that damage
//! gets behind them.

pub mod mutate;
pub mod targets;
pub mod trial;
