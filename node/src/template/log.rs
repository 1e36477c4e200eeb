//! The lines of a build's log: JSON, one object a line, written by the node that builds and read by all.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Most bytes of output kept of one step, so that one step leaves room for the others.
const STEP_BYTES: usize = 64 << 10;
/// Bytes kept of the end of what was left out.
const TAIL_BYTES: usize = 4 << 10;

/// What a line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A step begins; the text is how it was written.
    Begin,
    /// It was done before, and is not done again.
    Cached,
    /// It wrote to standard output.
    Stdout,
    /// It wrote to standard error.
    Stderr,
    /// It ended.
    End,
    /// Something about the build itself.
    Note,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// What it says.
    pub kind: Kind,
    /// Which step, from 1; 0 for the build itself.
    #[serde(default)]
    pub step: u32,
    /// The part of the build.
    #[serde(default)]
    pub phase: String,
    /// Its text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// The exit code, where it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<i32>,
    /// Whether it is as it should be, where it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ok: Option<bool>,
    /// How long it took, where it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elapsed_ms: Option<u64>,
}

impl Entry {
    /// A line of this kind.
    #[must_use]
    pub fn new(kind: Kind, step: u32, phase: &str, text: impl Into<String>) -> Self {
        Self {
            kind,
            step,
            phase: phase.to_owned(),
            text: text.into(),
            exit: None,
            ok: None,
            elapsed_ms: None,
        }
    }

    /// The line, with its end.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).unwrap_or_default();
        line.push(b'\n');
        line
    }
}

/// The entries in pieces of a log; what cannot be read is left out.
#[must_use]
pub fn entries<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<Entry> {
    let lines = pieces.flat_map(|piece| piece.split(|byte| *byte == b'\n'));
    lines
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect()
}

/// The steps of a log, as lists of builds show them.
#[must_use]
pub fn by_step(entries: &[Entry]) -> Vec<Value> {
    let mut steps: Vec<Value> = Vec::new();
    for entry in entries {
        match entry.kind {
            Kind::Note => {}
            Kind::Begin | Kind::Cached => steps.push(begun(entry)),
            Kind::Stdout | Kind::Stderr | Kind::End => {
                if let Some(step) = steps.last_mut() {
                    extend(step, entry);
                }
            }
        }
    }
    steps
}

fn begun(entry: &Entry) -> Value {
    let is_cached = entry.kind == Kind::Cached;
    json!({
        "step": entry.step,
        "phase": entry.phase,
        "cmd": entry.text,
        "stdout": "",
        "stderr": "",
        "exit": 0,
        "ok": is_cached,
        "cached": is_cached,
        "elapsed_ms": 0,
    })
}

fn extend(step: &mut Value, entry: &Entry) {
    let stream = match entry.kind {
        Kind::Stdout => "stdout",
        Kind::Stderr => "stderr",
        _ => {
            step["exit"] = entry.exit.unwrap_or_default().into();
            step["ok"] = entry.ok.unwrap_or_default().into();
            step["elapsed_ms"] = entry.elapsed_ms.unwrap_or_default().into();
            return;
        }
    };
    let text = step[stream].as_str().unwrap_or_default();
    step[stream] = format!("{text}{}", entry.text).into();
}

/// Bounds the output of one step: its beginning is passed on, and of the rest the end is kept for when
/// it fails.
#[derive(Debug, Default)]
pub struct Output {
    passed: usize,
    left_out: usize,
    tail: Vec<u8>,
    partial: [Vec<u8>; 2],
}

impl Output {
    /// What to log of a piece of output; bytes that are half a character wait for the other half.
    pub fn take(&mut self, is_stderr: bool, bytes: &[u8]) -> Option<String> {
        let room = STEP_BYTES.saturating_sub(self.passed);
        let (kept, rest) = bytes.split_at(room.min(bytes.len()));
        self.passed += kept.len();
        self.left_out += rest.len();
        self.tail.extend_from_slice(rest);
        let over = self.tail.len().saturating_sub(TAIL_BYTES);
        self.tail.drain(..over);
        let partial = &mut self.partial[usize::from(is_stderr)];
        partial.extend_from_slice(kept);
        let whole = partial.len() - unfinished(partial);
        let text: Vec<u8> = partial.drain(..whole).collect();
        (!text.is_empty()).then(|| String::from_utf8_lossy(&text).into_owned())
    }

    /// What was left out: a line that says so, with the end of it.
    #[must_use]
    pub fn rest(&self) -> Option<String> {
        let tail = String::from_utf8_lossy(&self.tail);
        (self.left_out > 0).then(|| {
            let between = self.left_out.saturating_sub(self.tail.len());
            format!("\n[{between} bytes of output left out]\n{tail}")
        })
    }
}

/// How many bytes at the end of `bytes` are the beginning of a character.
fn unfinished(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Err(err) if err.error_len().is_none() => bytes.len() - err.valid_up_to(),
        // In the middle of other rubbish it does not matter.
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_become_steps_with_their_output_and_end() {
        let mut end = Entry::new(Kind::End, 1, "recipe", "");
        (end.exit, end.ok, end.elapsed_ms) = (Some(7), Some(false), Some(12));
        let written: Vec<Vec<u8>> = [
            Entry::new(Kind::Note, 0, "", "hello"),
            Entry::new(Kind::Begin, 1, "recipe", "RUN x"),
            Entry::new(Kind::Stdout, 1, "recipe", "a"),
            Entry::new(Kind::Stderr, 1, "recipe", "b\n"),
            Entry::new(Kind::Stdout, 1, "recipe", "c"),
            end,
        ]
        .iter()
        .map(Entry::encode)
        .collect();
        let read = entries(written.iter().map(Vec::as_slice).chain([&b"rubbish\n"[..]]));
        let steps = by_step(&read);
        assert_eq!(steps.len(), 1);
        assert_eq!(steps[0]["stdout"], "ac");
        assert_eq!(steps[0]["stderr"], "b\n");
        assert_eq!(
            (&steps[0]["exit"], &steps[0]["ok"]),
            (&7.into(), &false.into())
        );
    }

    #[test]
    fn of_endless_output_the_beginning_and_the_end_are_kept() {
        let mut output = Output::default();
        let first = output
            .take(false, &[b'a'; STEP_BYTES])
            .expect("a beginning");
        assert_eq!(first.len(), STEP_BYTES);
        assert_eq!(output.take(false, &[b'b'; TAIL_BYTES]), None);
        assert_eq!(output.take(true, b"the end"), None);
        let rest = output.rest().expect("a rest");
        assert!(rest.contains("[7 bytes of output left out]"), "{rest}");
        assert!(rest.ends_with("bbbthe end"), "{rest}");
    }

    proptest! {
        #[test]
        fn characters_survive_being_cut(text in "\\PC{0,40}", cut in 0..80_usize) {
            let mut output = Output::default();
            let bytes = text.as_bytes();
            let (one, two) = bytes.split_at(cut.min(bytes.len()));
            let mut joined = output.take(false, one).unwrap_or_default();
            joined.push_str(&output.take(false, two).unwrap_or_default());
            prop_assert_eq!(joined, text);
        }
    }
}
