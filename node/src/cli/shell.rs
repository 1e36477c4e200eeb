//! `wrenn capsule shell` where the input is no terminal: a loop that runs one line after the other.
//!
//! Each line runs to its end in a new shell, which first takes over directory and exported
//! variables from where the last one left them: a file in the guest that is removed at the end.

use std::process::ExitCode;
use std::time::Duration;

use http::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::client::Client;
use super::error::CliError;
use super::{capsule, exec, print};

/// Longest one line may run.
const LINE_TIMEOUT: Duration = Duration::from_secs(3600);
/// Takes the state over, runs the line in `$2`, and leaves the state in the file `$1`.
const STEP: &str = r#"
state=$1 line=$2
[ -f "$state" ] && . "$state"
save() {
    code=$?
    { export -p; printf 'cd %s\n' "'$(pwd | sed "s/'/'\\\\''/g")'"; } > "$state"
    exit "$code"
}
trap save EXIT
eval "$line"
"#;

/// Reads lines and runs them until there are no more, or one says `exit`.
pub(super) async fn run(client: &Client, id: &str) -> Result<ExitCode, CliError> {
    let state = format!("/tmp/.wrenn-shell-{:08x}", rand::random::<u32>());
    let mut last = step(client, id, &state, "true").await?;
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    loop {
        let read = lines.next_line().await;
        let line = read.map_err(|err| CliError::from_error("read a line", &err))?;
        let Some(line) = line.filter(|line| line.trim() != "exit") else {
            break;
        };
        if line.trim().is_empty() {
            continue;
        }
        match step(client, id, &state, &line).await {
            Ok(answer) => {
                exec::forward(&answer)?;
                last = answer;
            }
            // A line that ran too long was killed; the capsule and the shell go on.
            Err(err) if err.detail.is_some() => print::error(&err),
            Err(err) => return Err(err),
        }
    }
    step(client, id, "/dev/null", &format!("rm -f {state}")).await?;
    Ok(exec::exit_code(&last))
}

async fn step(client: &Client, id: &str, state: &str, line: &str) -> Result<Value, CliError> {
    let route = format!("{}/exec", capsule::path(id)?);
    let body = json!({
        "cmd": "/bin/sh",
        "args": ["-c", STEP, "shell", state, line],
        "timeout_sec": LINE_TIMEOUT.as_secs(),
    });
    let asked = client.call_within(Method::POST, &route, Some(body), 2 * LINE_TIMEOUT);
    print::progress(line, asked).await
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::STEP;

    fn step(state: &std::path::Path, line: &str) -> (String, Option<i32>) {
        let ran = Command::new("/bin/sh")
            .args(["-c", STEP, "shell"])
            .arg(state)
            .arg(line)
            .output()
            .expect("a shell");
        (
            String::from_utf8_lossy(&ran.stdout).into_owned(),
            ran.status.code(),
        )
    }

    #[test]
    fn directory_and_variables_outlive_a_line() {
        let dir = tempfile::tempdir().expect("a directory");
        let odd = dir.path().join("it's odd");
        std::fs::create_dir(&odd).expect("a directory");
        let state = dir.path().join("state");
        step(&state, &format!("cd \"{}\"; export A='b c'", odd.display()));
        let (out, code) = step(&state, "pwd; echo \"$A\"; exit 7");
        assert_eq!(out, format!("{}\nb c\n", odd.display()));
        assert_eq!(code, Some(7));
        assert_eq!(step(&state, "basename \"$PWD\"").0, "it's odd\n");
    }
}
