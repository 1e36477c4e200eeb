//! Output: answers to standard output, progress and errors to standard error.

use std::io::{self, ErrorKind, IsTerminal as _, Write as _};
use std::time::Duration;

use serde_json::Value;
use tokio::time::{self, Instant};

use super::error::CliError;

/// Work shorter than this shows no progress.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often the spinner turns.
const TURN: Duration = Duration::from_millis(120);
/// The spinner.
const FRAMES: [char; 4] = ['|', '/', '-', '\\'];
/// Space between columns.
const GAP: &str = "  ";

/// Writes to standard output. A reader that has seen enough (`| head`) ends the program quietly.
pub(super) fn out(bytes: &[u8]) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        Err(err) if err.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(err) => Err(CliError::new(format!("write to standard output: {err}"))),
    }
}

/// Writes one line to standard output.
pub(super) fn line(text: &str) -> Result<(), CliError> {
    out(format!("{text}\n").as_bytes())
}

/// Writes raw bytes to standard error.
pub(super) fn err(bytes: &[u8]) {
    // Nobody is left to tell if this fails.
    let _ = io::stderr().lock().write_all(bytes);
}

/// Tells a person something that is not the answer.
pub(super) fn note(text: &str) {
    err(format!("{text}\n").as_bytes());
}

/// Tells why the program fails, and what to do.
pub(super) fn error(failure: &CliError) {
    note(&format!("error: {}", failure.message));
    if let Some(hint) = &failure.hint {
        note(&format!("hint: {hint}"));
    }
}

/// Writes JSON, indented.
pub(super) fn json(value: &Value) -> Result<(), CliError> {
    line(&format!("{value:#}"))
}

/// Writes rows under their headings, in columns as wide as needed.
pub(super) fn table(headings: &[&str], rows: &[Vec<String>]) -> Result<(), CliError> {
    let width = |at: usize| {
        let cells = rows.iter().filter_map(|row| row.get(at));
        let widest = cells.map(|cell| cell.chars().count()).max();
        widest.unwrap_or(0).max(headings[at].len())
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let render = |cells: &mut dyn Iterator<Item = &str>| {
        let padded = cells
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        let joined = padded.collect::<Vec<_>>().join(GAP);
        format!("{}\n", joined.trim_end())
    };
    let mut text = render(&mut headings.iter().copied());
    for row in rows {
        text.push_str(&render(&mut row.iter().map(String::as_str)));
    }
    out(text.as_bytes())
}

/// Waits for `work`; from the first second on, a terminal shows that and for how long.
pub(super) async fn progress<T>(label: &str, work: impl Future<Output = T>) -> T {
    progress_of(|| label.to_owned(), work).await
}

/// The same with a label that changes while the work goes on.
pub(super) async fn progress_of<T>(label: impl Fn() -> String, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    if !io::stderr().is_terminal() {
        return work.await;
    }
    if let Ok(done) = time::timeout(PATIENCE, &mut work).await {
        return done;
    }
    let began = Instant::now();
    let mut ticks = time::interval(TURN);
    for frame in FRAMES.iter().cycle() {
        tokio::select! {
            done = &mut work => {
                err(b"\r\x1b[K");
                return done;
            }
            _ = ticks.tick() => {
                let seconds = (began.elapsed() + PATIENCE).as_secs();
                let label = label();
                err(format!("\r{frame} {label} ({seconds} s)\x1b[K").as_bytes());
            }
        }
    }
    work.await
}

/// A text field of a JSON object, empty where it is not one.
pub(super) fn text(value: &Value, key: &str) -> String {
    match &value[key] {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}
