//! A model of power cuts: of what was not synced, any part may be gone.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Cuts the power: of what was not synced yet, the medium got whichever pages it liked.
fn power_cut(store: &Store, dir: &Path, kept: &[bool]) -> tempfile::TempDir {
    const PAGE: usize = 4096;
    let synced = store.core.packs.synced_for_test();
    let copy = killed(dir);
    let Some((number, synced_to)) = synced else {
        return copy;
    };
    let pack = copy
        .path()
        .join("store/packs")
        .join(Pack::file_name(number));
    let mut bytes = fs::read(&pack).unwrap();
    let mut kept = kept.iter().cycle();
    let mut at = synced_to as usize;
    while at < bytes.len() {
        let end = bytes.len().min((at / PAGE + 1) * PAGE);
        if !kept.next().unwrap() {
            bytes[at..end].fill(0);
        }
        at = end;
    }
    // The file's new length may be lost as well.
    if !kept.next().unwrap() {
        bytes.truncate(synced_to as usize);
    }
    fs::write(&pack, bytes).unwrap();
    copy
}

#[derive(Clone, Debug)]
enum Step {
    Seal {
        first: u64,
        chunks: u64,
        finish: bool,
    },
    Drop,
    Collect,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let seal =
        (0..30_u64, 1..6_u64, prop::bool::weighted(0.7)).prop_map(|(first, chunks, finish)| {
            Step::Seal {
                first,
                chunks,
                finish,
            }
        });
    vec(
        prop_oneof![6 => seal, 1 => Just(Step::Drop), 2 => Just(Step::Collect)],
        1..25,
    )
}

proptest! {
    // Each case opens two stores.
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// The model is a list of images; the store must have their chunks whatever came before, and
    /// after any power cut.
    #[test]
    fn a_power_cut_after_any_steps_loses_nothing_that_was_finished(
        steps in steps(), kept in vec(any::<bool>(), 1..40),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let mut pinned: Vec<(ImageDigest, Manifest)> = Vec::new();
        let mut unfinished = Vec::new();
        for step in steps {
            match step {
                Step::Seal { first, chunks, finish } => {
                    let sealing = store.begin();
                    let image = put(&sealing, first..first + chunks);
                    if finish {
                        sealing.finish(None).unwrap();
                        pinned.push(image);
                    } else {
                        unfinished.push(sealing);
                    }
                }
                Step::Drop => {
                    pinned.pop();
                    unfinished.pop();
                }
                Step::Collect => {
                    let pins: Vec<_> = pinned.iter().map(|(digest, _)| Pin::Image(*digest)).collect();
                    collect(&store, &pins);
                }
            }
        }
        let copy = power_cut(&store, dir.path(), &kept);
        for store in [store, open(copy.path())] {
            prop_assert!(store.check().unwrap().is_sound());
            for (digest, manifest) in &pinned {
                prop_assert_eq!(&store.image(digest).unwrap(), manifest);
                prop_assert!(store.missing(manifest).is_empty());
            }
        }
    }
}
