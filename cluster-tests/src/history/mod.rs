//! Histories of what clients asked and were told, and whether one order explains them.
//!
//! ```text
//! threads > Recorder (invoked, returned, outcome) > History > check, key by key > Report
//! ```
//!
//! A history is *linearizable* when every operation can be given one instant between its call and
//! its return so that a single object, doing them one after the other, gives the answers that were
//! seen. That is what "any node answers" promises: no client can tell the cluster from one machine.
//!
//! What became of an operation has three values, and none may be squeezed into another:
//! an answer; a *definite* refusal, which counts as never happened; and *unknown*, which may have
//! happened at any instant after the call, long after the client gave up, or never.
//!
//! Keys (one register, one capsule, one API key) are independent objects and are checked one by
//! one: linearizability is local. The search is exact and can take very long on bad luck, so it has
//! [`Limits`] and says [`Undecided`] when it meets one; that is neither a pass nor a failure.
//!
//! ```
//! use wrenn_cluster_tests::history::{Capsule, CapsuleAction, CapsuleSeen, Limits, Recorder};
//!
//! let recorder = Recorder::<Capsule>::new();
//! let client = recorder.client();
//! let call = client.invoke_unnamed(CapsuleAction::Create);
//! // ... POST /v1/capsules answers 201 with an id:
//! call.named("cl-1").answered(CapsuleSeen::Live);
//! let call = client.invoke("cl-1", CapsuleAction::Read);
//! // ... GET /v1/capsules/cl-1 answers 200, "running":
//! call.answered(CapsuleSeen::Live);
//! recorder.history().check(&Limits::default()).unwrap();
//! ```
//!
//! `operation.rs` has the records, `recorder.rs` takes them, `capsule.rs`, `api_key.rs` and
//! `register.rs` are the objects, `search.rs` with `uses.rs` is the algorithm, `report.rs` what it comes to.

mod api_key;
mod capsule;
mod model;
mod operation;
mod recorder;
mod register;
mod report;
mod search;
mod uses;

pub use api_key::{ApiKey, ApiKeyAction, ApiKeySeen};
pub use capsule::{Capsule, CapsuleAction, CapsuleSeen};
pub use model::{Model, Shape};
pub use operation::{History, Operation, Outcome, Process};
pub use recorder::{Client, Recorder, Token, Unnamed};
pub use register::{Register, RegisterAction};
pub use report::{Report, Undecided, Violation};
pub use search::Limits;
