//! Guests under Cloud Hypervisor in real shims: what their tests share.

#![allow(dead_code, reason = "each test program uses its part")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::SandboxId;
use wrenn_node::pager::region::Region;
use wrenn_node::shim::client::{self, ShimClient};
use wrenn_node::shim::dirty::DirtyList;
use wrenn_node::shim::saved::Saved;
use wrenn_node::shim::spec::{MemoryImage, RestoreSpec, ShimSpec};
use wrenn_node::shim::sweep::kill_leftovers;
use wrenn_node::vmm::Hardware;

use crate::ch_world::{MEMORY, World};
use crate::pager_world::{Image, eventually};

/// The program of a shim.
pub(crate) const WRENN: &str = env!("CARGO_BIN_EXE_wrenn");
const LONG: Duration = Duration::from_secs(30);

/// A directory for a sandbox, swept when dropped.
pub(crate) struct Dir(tempfile::TempDir);

impl Dir {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("tempdir"))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// The last round on the console.
    pub(crate) fn round(&self) -> u64 {
        let said = fs::read_to_string(self.path().join("console.log")).unwrap_or_default();
        let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let rounds = whole.lines().filter_map(|line| line.strip_prefix("round "));
        let rounds = rounds.map(|rest| rest.split_once(" bad ").expect(rest));
        rounds.fold(0, |_, (round, bad)| {
            assert_eq!(bad, "00000000", "{said}");
            u64::from_str_radix(round, 16).expect("a number")
        })
    }

    pub(crate) fn await_round(&self, round: u64) {
        assert!(
            eventually(LONG, || self.round() >= round),
            "{}",
            self.round()
        );
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _swept = kill_leftovers(self.path());
    }
}

pub(crate) async fn start(world: &World, dir: &Dir, restore: Option<RestoreSpec>) -> ShimClient {
    let spec = spec_of(world, restore);
    let spawned = client::spawn(dir.path(), &spec, Path::new(WRENN)).await;
    spawned.expect("it comes up")
}

/// What a shim is told to run.
pub(crate) fn spec_of(world: &World, restore: Option<RestoreSpec>) -> ShimSpec {
    ShimSpec {
        sandbox: SandboxId([7; 16]),
        epoch: Epoch(1),
        lease: None,
        vmm: world.spec.clone(),
        restore,
    }
}

/// What a snapshot of the guest would hold: what was listed, over its parent.
pub(crate) fn merged(dir: &Dir, saved: &Saved, parent: &[u8]) -> Vec<u8> {
    let list = DirtyList::read(dir.path(), Region::new(MEMORY)).expect("listed");
    let memory = saved.memory.open().expect("still there");
    let mut whole = parent.to_vec();
    for range in list.ranges() {
        let index = |at: u64| usize::try_from(at).expect("small");
        let part = &mut whole[index(range.start)..index(range.end)];
        memory.read_exact_at(part, range.start).expect("read");
    }
    whole
}

/// Who brings the pages of a guest that is brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bringing {
    /// A pager that watches over its page faults.
    Watched,
    /// The same, which answers the VMM's questions.
    Asked,
}

pub(crate) fn restoring(
    dir: &Dir,
    saved: &Saved,
    hardware: Hardware,
    memory: &[u8],
    bringing: Bringing,
) -> RestoreSpec {
    Image::of(dir.path(), memory);
    let daemon = dir.path().join("pager.sock");
    let path = dir.path().join("resume-state");
    fs::copy(&saved.state.path, &path).expect("copied");
    let mut state = saved.state.clone();
    state.path = path;
    RestoreSpec {
        state,
        hardware,
        memory: match bringing {
            Bringing::Watched => MemoryImage::Paged { daemon },
            Bringing::Asked => MemoryImage::Asked { daemon },
        },
    }
}
