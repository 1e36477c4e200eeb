//! What one sandbox costs beside its guest's memory: VMM, shim and pager, of real shims.
//!
//! Counted is what belongs to a process alone and its share of what it shares with others, so that
//! the program itself counts once, however many run it. The guest's memory and the page states are
//! shared memory and are left out; how much of the guest's memory is there is told by itself.

use std::fs;
use std::thread;
use std::time::Duration;

use node::pager::handle::WORKING_SET;
use node::shim::client::{self, ShimClient};
use node::shim::spec::{MemoryImage, RestoreSpec, ShimSpec};
use node::shim::state::StateFile;
use node::shim::sweep::kill_leftovers;
use node::store::chunk::ChunkId;
use proto::epoch::Epoch;
use proto::ids::SandboxId;
use proto::units::Mib;
use tempfile::TempDir;
use wrenn_cluster_tests::world::wrenn;

use super::ours::Image;
use super::payload::pages;
use crate::figures::{Samples, ratio};
use crate::{Outcome, Run};

/// Sandboxes at one time: so many share one program.
const SANDBOXES: u8 = 8;
/// How long they run before they are looked at.
const SETTLING: Duration = Duration::from_secs(1);
/// The most of its memory that a resumed idle guest may hold.
const HELD_GOAL: f64 = 0.5;

/// Resumes some sandboxes of `image`, a guest of `memory` that does next to nothing, and looks.
pub(super) fn measure(run: &Run, image: &Image, memory: Mib) -> Outcome {
    let runtime = tokio::runtime::Runtime::new()?;
    let mut sandboxes = Vec::new();
    for number in 1..=SANDBOXES {
        run.go_on()?;
        sandboxes.push(runtime.block_on(Sandbox::resume(image, number))?);
    }
    thread::sleep(SETTLING);
    let [mut vmm, mut shim, mut pager, mut held] = [const { Samples::new() }; 4];
    for sandbox in &sandboxes {
        let status = runtime.block_on(sandbox.shim.status())?;
        let paging = status.paging.ok_or("nobody brings its memory")?;
        vmm.add(private_mib(status.vmm_pid)?);
        shim.add(private_mib(status.shim_pid)?);
        pager.add(private_mib(paging.pager_pid)?);
        held.add(paging.resident_bytes as f64);
    }
    let all = vmm.p50() + shim.p50() + pager.p50();
    vmm.print_p50("ch_overhead_vmm", "MiB");
    shim.print_p50("ch_overhead_shim", "MiB");
    pager.print_p50("ch_overhead_pager", "MiB");
    crate::figures::figure("ch_overhead", all, "MiB");
    let whole = pages(memory) as f64 * 4096.0;
    ratio("ch_resumed_held_over_whole", held.p50(), whole, HELD_GOAL);
    Ok(())
}

/// A sandbox whose processes do not outlive this.
struct Sandbox {
    dir: TempDir,
    shim: ShimClient,
}

impl Sandbox {
    async fn resume(image: &Image, number: u8) -> Outcome<Self> {
        let dir = image.lay_out()?;
        let _none = fs::remove_file(dir.path().join(WORKING_SET));
        let bytes = fs::read(image.state_path())?;
        let state = StateFile {
            path: image.state_path(),
            bytes: bytes.len() as u64,
            digest: ChunkId::of(&bytes).0.into(),
        };
        let spec = ShimSpec {
            sandbox: SandboxId([number; 16]),
            epoch: Epoch(1),
            lease: None,
            vmm: image.spec().clone(),
            restore: Some(RestoreSpec {
                state,
                hardware: image.hardware().clone(),
                memory: MemoryImage::Paged {
                    daemon: dir.path().join("pager.sock"),
                },
            }),
        };
        let spawned = client::spawn(dir.path(), &spec, &wrenn()).await;
        let shim = match spawned {
            Ok(shim) => shim,
            Err(err) => {
                let _swept = kill_leftovers(dir.path());
                return Err(err.into());
            }
        };
        let sandbox = Self { dir, shim };
        sandbox.shim.thaw(false).await?;
        Ok(sandbox)
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if let Err(err) = kill_leftovers(self.dir.path()) {
            eprintln!("a sandbox is left over: {err}");
        }
    }
}

/// The memory of the process `pid` without what is shared memory, in MiB.
fn private_mib(pid: u32) -> Outcome<f64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kib = |name: &str| -> Outcome<f64> {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name));
        let value = line.and_then(|it| it.trim().strip_suffix(" kB"));
        Ok(value.ok_or("the kernel does not tell")?.trim().parse()?)
    };
    Ok((kib("Pss_Anon:")? + kib("Pss_File:")?) / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_of_its_own() {
        assert!(private_mib(std::process::id()).unwrap() > 0.1);
    }
}
