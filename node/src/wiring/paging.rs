//! Decides how the memory of resumed guests comes, and has their pagers answered.

use std::io;

use tokio::task;
use tracing::{info, warn};

use super::{RunError, disk};
use crate::base::chain::chain;
use crate::base::stop::Tasks;
use crate::pager::probe::{self, ProbeError};
use crate::pager::uffd::Tracking;
use crate::sandbox::paging::Paging;
use crate::store::{DataPaths, Store};

/// Set for a benchmark that compares with it: resumes copy all memory first, as where no pager can
/// serve. Guests that were resumed with a pager before would wait for this daemon in vain.
const COPY_MEMORY: &str = "WRENN_BENCH_COPY_MEMORY";

/// Answers pagers from now on; `None` where none is to be used. Pagers of an earlier daemon
/// wait for nothing else, so it comes before anything that takes long.
pub(super) async fn start(
    store: Store,
    paths: &DataPaths,
    tasks: &Tasks,
) -> Result<Option<Paging>, RunError> {
    if std::env::var_os(COPY_MEMORY).is_some() {
        warn!("{COPY_MEMORY} is set: resumes copy all memory first");
        return Ok(None);
    }
    let probed = task::spawn_blocking(probe).await;
    let probed = probed.map_err(|err| disk("try a pager")(io::Error::other(err)))?;
    let watches = match probed {
        Ok(tracking) => {
            info!("resumed guests get their memory {}", words(tracking));
            true
        }
        Err(err) => {
            let why = chain(&err);
            warn!(
                why,
                "no pager may watch over page faults on this host: under Cloud Hypervisor, which \
                 asks for pages, memory comes as it is touched, and under QEMU resumes copy it first"
            );
            false
        }
    };
    let paging = match watches {
        true => Paging::new(store),
        false => Paging::by_questions(store),
    };
    let served = paging.serve(&paths.pager_socket(), tasks);
    served.map_err(disk("listen for pagers"))?;
    Ok(Some(paging))
}

/// Tries a pager on a child of our own.
pub(super) fn probe() -> Result<Tracking, ProbeError> {
    probe::probe("/proc/self/exe")
}

/// How it will be, for people.
pub(super) fn words(tracking: Tracking) -> String {
    let writes = match tracking {
        Tracking::WriteProtect => "the kernel notes what they write",
        Tracking::Compare => "what they write is found by comparing: this kernel is older than 6.7",
    };
    format!("as they touch it; {writes}")
}
