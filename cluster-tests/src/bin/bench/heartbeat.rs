//! x
use crate::{Outcome, Run};
pub(crate) fn run(_: &Run) -> Outcome {
    Ok(())
}
