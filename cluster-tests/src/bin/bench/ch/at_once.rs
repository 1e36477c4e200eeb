//! Many guests resumed at the same instant, each to its first word.
//!
//! Each way by itself: guests that run use a processor each. A guest goes as soon as it was heard,
//! so what is measured is bringing it back and not how busy its fellows are. The reference daemon is
//! left out: of 16 of its guests one said nothing for three minutes.

use std::path::Path;
use std::sync::Barrier;
use std::thread;

use proto::units::Mib;

use super::ours::Image;
use super::theirs::{Snapshots, Way};
use super::{FIRST_GOAL, Resumed, Tools};
use crate::figures::{Samples, ms, ratio};
use crate::snapshots::rounds;
use crate::{Outcome, Run};

/// Resumes [`Run::at_once`] guests of `kernel`, ours and those that Cloud Hypervisor brings on demand.
pub(super) fn measure(run: &Run, tools: &Tools, kernel: &Path, memory: Mib) -> Outcome {
    let image = Image::make(&tools.program, kernel, memory)?;
    let snapshots = Snapshots::make(&tools.program, None, kernel, memory)?;
    let count = run.at_once;
    run.note(&format!("{count} at once: saved in all ways"));
    let mut ours = Samples::default();
    let (way, mut theirs) = (Way::NativeOnDemand, Samples::default());
    for round in 1..=rounds(run) {
        run.go_on()?;
        together(count, &mut ours, || image.resume(false))?;
        run.go_on()?;
        together(count, &mut theirs, || snapshots.resume(way, false))?;
        run.note(&format!("{count} at once: round {round}"));
    }
    ours.print(&format!("ch_at_once_{count}_ours_lazy_first"), "ms");
    let way = way.name();
    theirs.print(&format!("ch_at_once_{count}_{way}_first"), "ms");
    let name = format!("ch_at_once_{count}_first_over_{way}");
    ratio(&name, ours.p50(), theirs.p50(), FIRST_GOAL);
    Ok(())
}

fn together(
    count: usize,
    samples: &mut Samples,
    resume: impl Fn() -> Outcome<Resumed> + Sync,
) -> Outcome {
    let barrier = Barrier::new(count);
    let (barrier, resume) = (&barrier, &resume);
    thread::scope(|scope| {
        let one = move |_| {
            scope.spawn(move || {
                barrier.wait();
                let resumed = resume().map_err(|err| err.to_string())?;
                Ok::<_, String>(ms(resumed.first))
            })
        };
        let working: Vec<_> = (0..count).map(one).collect();
        for each in working {
            samples.add(each.join().map_err(|_| "a resume broke")??);
        }
        Ok(())
    })
}
