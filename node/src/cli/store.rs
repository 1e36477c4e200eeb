//! `wrenn store`: looks at the chunks and snapshots a node has on its disk.
//!
//! The node itself owns its store while it runs, so then its daemon is asked, by a socket in the data
//! directory. A stopped node's store is opened here. What may be dropped is known only to the
//! cluster's state, never to a disk alone: without a daemon that answers, `gc` drops nothing.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::error::CliError;
use super::node::STOP_FIRST;
use super::{Global, print};
use crate::config::defaults;
use crate::store::report::{CheckReport, Chore, ScrubReport, StatsReport, Told};
use crate::store::{DataDir, DataPaths, Limits, OpenDataDirError, OpenStoreError, Store};

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
    /// Where the node, running or stopped, keeps its state.
    #[arg(long, value_name = "DIR", default_value = defaults::DATA_DIR)]
    data_dir: PathBuf,
}

/// Does it.
pub(super) fn run(global: &Global, command: &Command) -> Result<ExitCode, CliError> {
    let (chore, place) = match command {
        Command::Check(place) => (Chore::Check, place),
        Command::Gc(place) => (Chore::Gc, place),
        Command::Stats(place) => (Chore::Stats, place),
    };
    let told = match open_data(&place.data_dir)? {
        Some(dir) => {
            let store = open_store(dir.paths())?;
            carry_out(chore, &store)?
        }
        None => ask_daemon(chore, &place.data_dir)?,
    };
    show(global, &told)
}

/// The directory of a stopped node, which cannot start meanwhile; `None` where one runs.
fn open_data(data_dir: &Path) -> Result<Option<DataDir>, CliError> {
    // Opening would make a directory where there is none.
    if !data_dir.join("version").exists() {
        let err = CliError::new(format!(
            "{} is no data directory of a node",
            data_dir.display()
        ));
        return Err(err.hint("name the one that the node was started with, by --data-dir"));
    }
    match DataDir::open_if_free(data_dir) {
        Ok(dir) => Ok(Some(dir)),
        Err(OpenDataDirError::InUse { .. }) => Ok(None),
        Err(err) => Err(CliError::from_error("open the data directory", &err)),
    }
}

fn open_store(paths: &DataPaths) -> Result<Store, CliError> {
    let opened = Store::open(&paths.store(), Limits::default());
    opened.map_err(|err| {
        let told = CliError::from_error("open the store", &err);
        match err {
            OpenStoreError::InUse { .. } => told.hint(STOP_FIRST),
            _ => told,
        }
    })
}

fn carry_out(chore: Chore, store: &Store) -> Result<Told, CliError> {
    match chore {
        Chore::Check => {
            let checked = store.check();
            let checked = checked.map_err(|err| CliError::from_error("check the store", &err))?;
            Ok(Told::Check((&checked).into()))
        }
        Chore::Stats => {
            let counted = store.stats();
            let counted =
                counted.map_err(|err| CliError::from_error("count what is in the store", &err))?;
            Ok(Told::Stats((&counted).into()))
        }
        Chore::Gc => {
            let err = CliError::new(
                "which snapshots exist is known to the cluster, not to this disk; nothing was \
                 dropped",
            );
            Err(err.hint("start the node: only a running node can tell what is still needed"))
        }
    }
}

/// Has the daemon do it. A check takes as long as it takes; a daemon that dies closes the socket.
fn ask_daemon(chore: Chore, data_dir: &Path) -> Result<Told, CliError> {
    let asked = exchange(chore, data_dir);
    let answer = asked.map_err(|err| {
        let told = CliError::from_error("ask the daemon that has the data directory in use", &err);
        told.hint(format!(
            "it may be starting, be of an earlier version or of another user: try again, as root, \
             or {STOP_FIRST}"
        ))
    })?;
    match serde_json::from_slice(&answer) {
        Ok(Told::Failed(why)) => Err(CliError::new(format!("the daemon could not: {why}"))),
        Ok(told) => Ok(told),
        Err(_) => Err(CliError::new("the daemon ended before it had answered")),
    }
}

fn exchange(chore: Chore, data_dir: &Path) -> io::Result<Vec<u8>> {
    // A socket's path may have 107 bytes, a data directory's may have more.
    let dir = File::open(data_dir)?;
    let through = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string());
    let socket = DataPaths::new(&through).store_socket();
    let mut stream = UnixStream::connect(socket)?;
    let mut question = serde_json::to_vec(&chore)?;
    question.push(b'\n');
    stream.write_all(&question)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

fn show(global: &Global, told: &Told) -> Result<ExitCode, CliError> {
    match told {
        Told::Check(checked) => {
            match global.json {
                true => print::json(&as_json(checked)?)?,
                false => show_checked(checked)?,
            }
            if !checked.sound {
                print::note(
                    "what was damaged has been set aside; the node fetches it again from another \
                     holder",
                );
                return Ok(ExitCode::from(DAMAGED));
            }
        }
        Told::Gc(collected) if global.json => print::json(&as_json(collected)?)?,
        Told::Gc(collected) => print::line(&format!(
            "freed {}: {} packs, {} manifests",
            bytes(collected.freed_bytes),
            collected.packs,
            collected.manifests
        ))?,
        Told::Stats(stats) if global.json => print::json(&as_json(stats)?)?,
        Told::Stats(stats) => show_stats(stats)?,
        Told::Failed(why) => return Err(CliError::new(why.clone())),
    }
    Ok(ExitCode::SUCCESS)
}

fn as_json(report: &impl serde::Serialize) -> Result<serde_json::Value, CliError> {
    serde_json::to_value(report).map_err(|err| CliError::from_error("write JSON", &err))
}

fn show_checked(checked: &CheckReport) -> Result<(), CliError> {
    print::line(&format!(
        "{} chunks and {} manifests are sound",
        checked.chunks, checked.manifests
    ))?;
    list("damaged chunk", checked.damaged_chunks.iter())?;
    list("damaged manifest of", checked.damaged_manifests.iter())?;
    list("unreadable pack", checked.unreadable_packs.iter())?;
    let incomplete = checked.incomplete.iter().map(|it| &it.of);
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

fn show_stats(stats: &StatsReport) -> Result<(), CliError> {
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
                stats.dedup_ratio
            ),
        ),
        (
            "not needed",
            format!(
                "{} ({:.0} % of the packs)",
                bytes(stats.garbage_bytes),
                stats.garbage_share * 100.0
            ),
        ),
    ];
    let rounds = [
        ("scrubbing", &stats.scrubbing),
        ("scrubbed", &stats.scrubbed),
    ];
    let rounds = rounds
        .into_iter()
        .filter_map(|(what, round)| Some((what, round_in_words(round.as_ref()?))));
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .chain(rounds)
        .map(|(what, how_much)| vec![what.to_owned(), how_much])
        .collect();
    print::table(&["WHAT", "HOW MUCH"], &rows)
}

fn round_in_words(round: &ScrubReport) -> String {
    let when = match &round.ended_at {
        Some(ended_at) => format!("by {ended_at}"),
        None => format!("since {}", round.began_at),
    };
    let found = match (
        round.damaged_chunks,
        round.damaged_manifests,
        round.unreadable_packs,
    ) {
        (0, 0, 0) => "no damage".to_owned(),
        (chunks, manifests, packs) => {
            format!("damaged: {chunks} chunks, {manifests} manifests; unreadable: {packs} packs")
        }
    };
    format!("{} {when}: {found}", bytes(round.read_bytes))
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
