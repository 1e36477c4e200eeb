//! `wrenn store`: looks at the chunks and snapshots a node has on its disk.
//!
//! The node itself owns its store while it runs, so these work on a stopped node's. What may be
//! dropped is known only to the cluster's state, never to a disk alone: without a node that
//! answers, `gc` drops nothing.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::error::CliError;
use super::node::STOP_FIRST;
use super::{Global, print};
use crate::config::defaults;
use crate::store::{
    Checked, Collected, DataDir, Limits, OpenDataDirError, OpenStoreError, Pin, Stats, Store,
};

/// Exit code where damage was found.
const DAMAGED: u8 = 1;
/// As many names of a kind as are shown to a person; JSON has all.
const SHOWN: usize = 10;

/// What to do with the store.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Read and hash everything. What is damaged is forgotten, so that the node fetches it again.
    Check(Place),
    /// Drop what no snapshot needs. Needs a running node: it alone knows which snapshots exist.
    Gc(Place),
    /// Show how much there is, and how much of it is needed.
    Stats(Place),
}

/// Whose store.
#[derive(Debug, Args)]
pub(super) struct Place {
    /// Where the stopped node keeps its state.
    #[arg(long, value_name = "DIR", default_value = defaults::DATA_DIR)]
    data_dir: PathBuf,
}

/// Does it.
pub(super) fn run(global: &Global, command: &Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Check(place) => check(global, &Offline::open(&place.data_dir)?.store),
        Command::Gc(place) => gc(global, &Offline::open(&place.data_dir)?.store, None),
        Command::Stats(place) => stats(global, &Offline::open(&place.data_dir)?.store),
    }
}

/// A stopped node's store. The node cannot start meanwhile.
struct Offline {
    /// Dropped before the directory is unlocked.
    store: Store,
    _dir: DataDir,
}

impl Offline {
    fn open(data_dir: &Path) -> Result<Self, CliError> {
        // Opening would make a directory where there is none.
        if !data_dir.join("version").exists() {
            let err = CliError::new(format!(
                "{} is no data directory of a node",
                data_dir.display()
            ));
            return Err(err.hint("name the one that the node was started with, by --data-dir"));
        }
        let doing = "open the data directory";
        let dir = DataDir::open(data_dir).map_err(|err| {
            let told = CliError::from_error(doing, &err);
            match err {
                OpenDataDirError::InUse { .. } => told.hint(STOP_FIRST),
                _ => told,
            }
        })?;
        let opened = Store::open(&dir.paths().store(), Limits::default());
        let store = opened.map_err(|err| {
            let told = CliError::from_error("open the store", &err);
            match err {
                OpenStoreError::InUse { .. } => told.hint(STOP_FIRST),
                _ => told,
            }
        })?;
        Ok(Self { store, _dir: dir })
    }
}

fn check(global: &Global, store: &Store) -> Result<ExitCode, CliError> {
    let checked = store.check();
    let checked = checked.map_err(|err| CliError::from_error("check the store", &err))?;
    if global.json {
        print::json(&checked_json(&checked))?;
    } else {
        show_checked(&checked)?;
    }
    if checked.is_sound() {
        return Ok(ExitCode::SUCCESS);
    }
    print::note(
        "what was damaged has been set aside; the node fetches it again from another holder",
    );
    Ok(ExitCode::from(DAMAGED))
}

/// Drops what `pins` do not need; without pins, nothing.
fn gc(global: &Global, store: &Store, pins: Option<Vec<Pin>>) -> Result<ExitCode, CliError> {
    let Some(pins) = pins else {
        let err = CliError::new(
            "which snapshots exist is known to the cluster, not to this disk; nothing was dropped",
        );
        return Err(err.hint("start the node: only a running node can tell what is still needed"));
    };
    let collected = store.collect(|| Ok::<_, std::convert::Infallible>(pins));
    let collected = collected.map_err(|err| CliError::from_error("collect", &err))?;
    if global.json {
        print::json(&collected_json(&collected))?;
    } else {
        print::line(&format!(
            "freed {}: {} packs, {} manifests",
            bytes(collected.freed_bytes),
            collected.packs,
            collected.manifests
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn stats(global: &Global, store: &Store) -> Result<ExitCode, CliError> {
    let stats = store.stats();
    let stats = stats.map_err(|err| CliError::from_error("count what is in the store", &err))?;
    if global.json {
        print::json(&stats_json(&stats))?;
    } else {
        show_stats(&stats)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show_checked(checked: &Checked) -> Result<(), CliError> {
    print::line(&format!(
        "{} chunks and {} manifests are sound",
        checked.chunks, checked.manifests
    ))?;
    list("damaged chunk", checked.damaged.iter())?;
    list("damaged manifest of", checked.bad_manifests.iter())?;
    list("unreadable pack", checked.unreadable_packs.iter())?;
    let incomplete = checked.incomplete.keys();
    list("not all here of", incomplete)?;
    if checked.garbled_bytes > 0 {
        let garbled = bytes(checked.garbled_bytes);
        print::line(&format!("{garbled} in packs are no chunks"))?;
    }
    Ok(())
}

fn list(what: &str, names: impl ExactSizeIterator<Item = impl ToString>) -> Result<(), CliError> {
    let more = names.len().saturating_sub(SHOWN);
    for name in names.take(SHOWN) {
        print::line(&format!("{what} {}", name.to_string()))?;
    }
    if more > 0 {
        print::line(&format!("{what} ... and {more} more"))?;
    }
    Ok(())
}

fn show_stats(stats: &Stats) -> Result<(), CliError> {
    let rows = [
        (
            "packs",
            format!("{} ({})", stats.packs, bytes(stats.pack_bytes)),
        ),
        (
            "chunks",
            format!(
                "{} ({}, stored in {})",
                stats.chunks,
                bytes(stats.chunk_bytes),
                bytes(stats.stored_bytes)
            ),
        ),
        ("snapshots", stats.snapshots.to_string()),
        (
            "images",
            format!(
                "{} ({} of chunks, {} of them different: dedup {:.2})",
                stats.images,
                bytes(stats.image_bytes),
                bytes(stats.unique_bytes),
                stats.dedup_ratio()
            ),
        ),
        (
            "not needed",
            format!(
                "{} ({:.0} % of the packs)",
                bytes(stats.garbage_bytes),
                stats.garbage_share() * 100.0
            ),
        ),
    ];
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(what, how_much)| vec![what.to_owned(), how_much])
        .collect();
    print::table(&["WHAT", "HOW MUCH"], &rows)
}

fn bytes(count: u64) -> String {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    match count {
        0..KIB => format!("{count} B"),
        KIB..MIB => format!("{} KiB", count / KIB),
        MIB.. => format!("{} MiB", count / MIB),
    }
}

fn checked_json(checked: &Checked) -> Value {
    let incomplete = checked.incomplete.iter();
    let incomplete =
        incomplete.map(|(pin, lacks)| json!({ "of": pin.to_string(), "lacks": lacks }));
    json!({
        "sound": checked.is_sound(),
        "chunks": checked.chunks,
        "manifests": checked.manifests,
        "damaged_chunks": names(&checked.damaged),
        "damaged_manifests": names(&checked.bad_manifests),
        "unreadable_packs": checked.unreadable_packs,
        "garbled_bytes": checked.garbled_bytes,
        "incomplete": incomplete.collect::<Vec<_>>(),
    })
}

fn names<'a>(all: impl IntoIterator<Item = &'a (impl ToString + 'a)>) -> Vec<String> {
    all.into_iter().map(ToString::to_string).collect()
}

fn collected_json(collected: &Collected) -> Value {
    json!({
        "manifests": collected.manifests,
        "packs": collected.packs,
        "chunks": collected.chunks,
        "copied_bytes": collected.copied_bytes,
        "freed_bytes": collected.freed_bytes,
        "absent": collected.absent,
        "damaged": collected.damaged,
    })
}

fn stats_json(stats: &Stats) -> Value {
    json!({
        "packs": stats.packs,
        "pack_bytes": stats.pack_bytes,
        "chunks": stats.chunks,
        "chunk_bytes": stats.chunk_bytes,
        "stored_bytes": stats.stored_bytes,
        "images": stats.images,
        "snapshots": stats.snapshots,
        "image_bytes": stats.image_bytes,
        "unique_bytes": stats.unique_bytes,
        "garbage_bytes": stats.garbage_bytes,
        "dedup_ratio": stats.dedup_ratio(),
        "garbage_share": stats.garbage_share(),
    })
}
