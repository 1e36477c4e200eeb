//! `wrenn capsule exec`.
//!
//! Where somebody watches, at a terminal, output comes as it is written. Elsewhere it comes whole and byte by byte,
//! binary output included.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _};
use std::process::ExitCode;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use http::Method;
use serde_json::{Value, json};
use tokio::time;

use super::capsule::{self, pair, period};
use super::client::{Client, DEADLINE_EXCEEDED};
use super::error::CliError;
use super::socket::{Frame, Socket};
use super::{Global, print};

/// Exit code of a command whose time ran out, as of timeout(1).
const TIMED_OUT: u8 = 124;
/// Exit code that stands for a signal, or for a code that no process can have.
const NO_CODE: u8 = 255;
/// Added to a command's own time before this side gives up.
const EXEC_GRACE: Duration = Duration::from_secs(15);

/// A command to run.
#[derive(Debug, Args)]
pub(super) struct Exec {
    /// The capsule.
    id: String,
    /// Working directory.
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// An environment variable; may be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// Kill the command after this long, e.g. 90s.
    #[arg(long, value_name = "TIME", value_parser = period, default_value = "30s")]
    timeout: Duration,
    /// Leave it running and print its process id.
    #[arg(long)]
    background: bool,
    /// A name for the background process.
    #[arg(long, requires = "background")]
    tag: Option<String>,
    /// The program and its arguments, after `--`.
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

/// Runs it.
pub(super) async fn run(
    global: &Global,
    client: &Client,
    request: Exec,
) -> Result<ExitCode, CliError> {
    let watched = io::stdout().is_terminal() && !global.json && !request.background;
    if watched {
        return watch(client, request).await;
    }
    let route = format!("{}/exec", capsule::path(&request.id)?);
    let (cmd, args) = words(&request)?;
    let envs: BTreeMap<_, _> = request.env.iter().cloned().collect();
    let body = json!({
        "cmd": cmd,
        "args": args,
        "background": request.background,
        "timeout_sec": request.timeout.as_secs().max(1),
        "cwd": request.cwd,
        "envs": envs,
        "tag": request.tag,
    });
    let limit = request.timeout + EXEC_GRACE;
    let asked = client.call_within(Method::POST, &route, Some(body), limit);
    let answer = match print::progress(cmd, asked).await {
        Ok(answer) => answer,
        Err(err) if err.detail.as_deref() == Some(DEADLINE_EXCEEDED) => {
            return Err(out_of_time(err));
        }
        Err(err) => return Err(err),
    };
    if global.json {
        print::json(&answer)?;
    } else if request.background {
        let (pid, tag) = (&answer["pid"], print::text(&answer, "tag"));
        print::line(&format!("{pid} {tag}"))?;
    } else {
        forward(&answer)?;
    }
    Ok(exit_code(&answer))
}

/// Runs a command whose output somebody watches: it is shown as it comes. Interrupting this command kills it.
async fn watch(client: &Client, request: Exec) -> Result<ExitCode, CliError> {
    let (cmd, args) = words(&request)?;
    let envs: BTreeMap<_, _> = request.env.iter().cloned().collect();
    let route = format!("{}/exec/stream", capsule::path(&request.id)?);
    let mut socket = client.socket(&route).await?;
    let start =
        json!({"type": "start", "cmd": cmd, "args": args, "envs": envs, "cwd": request.cwd});
    socket.say(&start).await?;
    let shown = time::timeout(request.timeout, show(&mut socket)).await;
    shown.unwrap_or_else(|_| {
        let text = format!(
            "the command ran past its timeout of {:?} and was killed",
            request.timeout
        );
        Err(out_of_time(CliError::new(text)))
    })
}

/// Shows what comes until the command ends.
async fn show(socket: &mut Socket) -> Result<ExitCode, CliError> {
    loop {
        let told = match socket.next().await? {
            Some(Frame::Json(told)) => told,
            Some(Frame::Bytes(_)) => continue,
            Some(Frame::Away) => {
                let err = CliError::new("the node stopped while the command ran");
                return Err(err.hint("the command goes on in the capsule; run it with --background to be free of the connection"));
            }
            None => return Err(CliError::new("the node closed the connection")),
        };
        let data = told["data"].as_str().unwrap_or_default();
        match told["type"].as_str() {
            Some("stdout") => print::out(data.as_bytes())?,
            Some("stderr") => print::err(data.as_bytes()),
            Some("exit") => return Ok(exit_code(&told)),
            Some("error") => return Err(CliError::new(data)),
            _ => {}
        }
    }
}

/// The program and its arguments.
fn words(request: &Exec) -> Result<(&String, &[String]), CliError> {
    let words = request.command.split_first();
    words.ok_or_else(|| CliError::usage("no command was given"))
}

fn out_of_time(err: CliError) -> CliError {
    let exit = TIMED_OUT;
    CliError { exit, ..err }.hint("--timeout gives it longer")
}

/// Writes what a command wrote, byte by byte, where it wrote it.
pub(super) fn forward(answer: &Value) -> Result<(), CliError> {
    print::out(&stream(answer, "stdout")?)?;
    print::err(&stream(answer, "stderr")?);
    Ok(())
}

/// The exit code of a command; 0 for one that was left running.
pub(super) fn exit_code(answer: &Value) -> ExitCode {
    let code = answer["exit_code"].as_i64().unwrap_or(0);
    ExitCode::from(u8::try_from(code).unwrap_or(NO_CODE))
}

fn stream(answer: &Value, key: &str) -> Result<Vec<u8>, CliError> {
    let text = answer[key].as_str().unwrap_or_default();
    if answer["encoding"] != "base64" {
        return Ok(text.as_bytes().to_vec());
    }
    let decoded = STANDARD.decode(text);
    decoded.map_err(|err| CliError::from_error("decode the command's output", &err))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binary_output_is_forwarded_as_it_was() {
        let answer = json!({"stdout": "AP8K", "stderr": "", "encoding": "base64"});
        assert_eq!(stream(&answer, "stdout"), Ok(vec![0, 255, 10]));
        let answer = json!({"stdout": "AP8K", "encoding": "utf-8"});
        assert_eq!(stream(&answer, "stdout"), Ok(b"AP8K".to_vec()));
    }

    #[test]
    fn an_exit_code_that_no_process_can_have_is_255() {
        let code = |code: i64| format!("{:?}", exit_code(&json!({"exit_code": code})));
        assert_eq!(code(-1), format!("{:?}", ExitCode::from(255)));
        assert_eq!(code(42), format!("{:?}", ExitCode::from(42)));
    }
}
