//! `wrenn template build`, and what shows and ends builds.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use futures::StreamExt as _;
use http::Method;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::time::{self, Instant};
use tokio_util::io::ReaderStream;

use super::file::{RecipeFile, pack};
use crate::cli::client::Client;
use crate::cli::error::CliError;
use crate::cli::{Global, print};

/// How long a log that broke off is asked for again: a node restarts in less.
const AWAY_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause between two tries.
const AGAIN: Duration = Duration::from_secs(1);
/// Longest the sending of the files may take.
const SEND_TIMEOUT: Duration = Duration::from_secs(600);
/// Bytes of a root file system sent at once.
const SEND_BYTES: usize = 64 << 10;

/// A template to build.
#[derive(Debug, Args)]
pub(in crate::cli) struct Build {
    /// Where the files that are copied lie.
    #[arg(default_value = ".")]
    context: PathBuf,
    /// The recipe; `Wrennfile` in the context where absent.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Build from a root file system: a tar file of one, or an image as `docker save` and OCI tools write
    /// it, plain or compressed. What the image says of user, directory, environment and command holds; a
    /// recipe follows only where --file names one. Its command runs in capsules only if that recipe has a
    /// HEALTHCHECK: a template without one is a disk that boots.
    #[arg(long, value_name = "FILE", conflicts_with = "skip_pre_post")]
    from_archive: Option<PathBuf>,
    /// The name of the template.
    #[arg(short = 't', long)]
    name: String,
    /// Virtual processors.
    #[arg(long)]
    vcpus: Option<i64>,
    /// Memory in MiB.
    #[arg(long, value_name = "MIB")]
    memory: Option<i64>,
    /// Replace the template of that name, if there is one.
    #[arg(long)]
    overwrite: bool,
    /// Do steps anew that were done before.
    #[arg(long)]
    no_cache: bool,
    /// Leave out what usually comes before and after the recipe: the refreshed package index, the user
    /// wrenn-user, the emptied package caches.
    #[arg(long)]
    skip_pre_post: bool,
    /// Print the id of the build and do not wait for it.
    #[arg(long)]
    detach: bool,
}

/// Builds it, showing its log.
pub(super) async fn run(global: &Global, asked: Build) -> Result<ExitCode, CliError> {
    let client = global.client()?;
    let started = start(&client, &asked).await?;
    let id = print::text(&started, "id");
    if asked.detach {
        if global.json {
            print::json(&started)?;
        } else {
            print::line(&id)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    print::note(&format!("build {id}"));
    follow(global, &client, &id).await
}

async fn start(client: &Client, asked: &Build) -> Result<Value, CliError> {
    let file = recipe_of(asked)?;
    let config = json!({
        "name": asked.name,
        "base_template": file.base,
        "recipe": file.lines,
        "healthcheck": file.healthcheck,
        "vcpus": asked.vcpus,
        "memory_mb": asked.memory,
        "skip_pre_post": asked.skip_pre_post,
        "overwrite": asked.overwrite,
        "no_cache": asked.no_cache,
    });
    let config = config.to_string();
    let retry_key = format!("{:032x}", rand::random::<u128>());
    let sent = async {
        if let Some(archive) = &asked.from_archive {
            return send_archive(client, &config, archive, &retry_key).await;
        }
        let (kind, body) = body_of(&config, &asked.context, &file.sources())?;
        client
            .post_again("/v1/builds", &kind, body, &retry_key)
            .await
    };
    let sent = time::timeout(SEND_TIMEOUT, print::progress("sending the build", sent)).await;
    sent.map_err(|_| CliError::new(format!("the node took no build for {SEND_TIMEOUT:?}")))?
}

/// The recipe that was asked for; none where an archive needs none.
fn recipe_of(asked: &Build) -> Result<RecipeFile, CliError> {
    if asked.from_archive.is_some() && asked.file.is_none() {
        return Ok(RecipeFile::default());
    }
    let path = asked.file.clone();
    let path = path.unwrap_or_else(|| asked.context.join("Wrennfile"));
    let failed = |err| CliError::from_error(&format!("read {}", path.display()), &err);
    let text = fs::read_to_string(&path).map_err(failed)?;
    let wrong = |why: String| CliError::usage(format!("{}: {why}", path.display()));
    let file = RecipeFile::parse(&text).map_err(wrong)?;
    if asked.from_archive.is_some() && file.base.is_some() {
        return Err(wrong(
            "FROM and --from-archive are two things to begin with".into(),
        ));
    }
    Ok(file)
}

/// Sends the root file system as it is read.
async fn send_archive(
    client: &Client,
    config: &str,
    archive: &Path,
    retry_key: &str,
) -> Result<Value, CliError> {
    let failed = |err| CliError::from_error(&format!("read {}", archive.display()), &err);
    let file = tokio::fs::File::open(archive).await.map_err(failed)?;
    let boundary = format!("{:032x}", rand::random::<u128>());
    let (head, tail) = around(&boundary, config, "rootfs", "rootfs.tar");
    let whole = |text: String| futures::stream::iter([Ok(Bytes::from(text))]);
    let contents = ReaderStream::with_capacity(file, SEND_BYTES);
    let body = whole(head).chain(contents).chain(whole(tail));
    let kind = format!("multipart/form-data; boundary={boundary}");
    client
        .post_stream("/v1/builds", &kind, body, retry_key)
        .await
}

/// What stands before and behind a file in a form that begins with `config`.
fn around(boundary: &str, config: &str, part: &str, name: &str) -> (String, String) {
    let head = format!(
        "--{boundary}\r\nContent-Disposition: form-data; name=\"config\"\r\n\r\n{config}\r\n\
         --{boundary}\r\nContent-Disposition: form-data; name=\"{part}\"; filename=\"{name}\"\r\n\r\n"
    );
    (head, format!("\r\n--{boundary}--\r\n"))
}

/// The request: JSON alone, or with the files in a form.
fn body_of(config: &str, dir: &Path, sources: &[String]) -> Result<(String, Bytes), CliError> {
    if sources.is_empty() {
        return Ok(("application/json".into(), config.to_owned().into()));
    }
    let packed = pack(dir, sources);
    let packed = packed.map_err(|err| CliError::from_error("pack the files to copy", &err))?;
    let boundary = format!("{:032x}", rand::random::<u128>());
    let (head, tail) = around(&boundary, config, "archive", "files.tar");
    let body = [head.as_bytes(), &packed, tail.as_bytes()].concat();
    let kind = format!("multipart/form-data; boundary={boundary}");
    Ok((kind, body.into()))
}

/// Shows the log of a build until it ends; fails if it does.
pub(super) async fn follow(
    global: &Global,
    client: &Client,
    id: &str,
) -> Result<ExitCode, CliError> {
    let mut shown = Shown::default();
    let mut away_since: Option<Instant> = None;
    loop {
        match watch(client, id, &mut shown).await {
            Ok(Some(build)) => return ended(global, &build, &shown),
            Ok(None) => away_since = None,
            // The node said no: asking again changes nothing.
            Err(err) if err.is_refusal() => return Err(err),
            Err(err) => {
                let since = *away_since.get_or_insert_with(Instant::now);
                if since.elapsed() > AWAY_TIMEOUT {
                    return Err(err.hint("the build goes on; any other node shows it (--url)"));
                }
            }
        }
        time::sleep(AGAIN).await;
    }
}

/// Reads the log from where `shown` is; the build once it has ended.
async fn watch(client: &Client, id: &str, shown: &mut Shown) -> Result<Option<Value>, CliError> {
    let route = format!("{}/stream?follow=true&from={}", path(id)?, shown.next_piece);
    let mut body = client.open(Method::GET, &route, None).await?.into_body();
    let mut events = Events::default();
    loop {
        let label = shown.label.clone();
        let frame = print::progress(&label, next_frame(&mut body)).await;
        let Some(frame) = frame else {
            return Ok(None);
        };
        for event in events.take(&frame.map_err(|err| client.broken(&err))?) {
            if event.kind == "end" {
                shown.finish();
                return Ok(serde_json::from_str(&event.data).ok());
            }
            shown.take(&event);
        }
    }
}

async fn next_frame(body: &mut Incoming) -> Option<Result<Bytes, hyper::Error>> {
    loop {
        match body.frame().await? {
            Ok(frame) => {
                if let Ok(data) = frame.into_data() {
                    return Some(Ok(data));
                }
            }
            Err(err) => return Some(Err(err)),
        }
    }
}

fn ended(global: &Global, build: &Value, shown: &Shown) -> Result<ExitCode, CliError> {
    if build["status"] == "success" {
        if global.json {
            print::json(build)?;
        } else {
            print::line(&print::text(build, "name"))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    if build["status"] == "cancelled" {
        return Err(CliError::new("the build was called off"));
    }
    let why = print::text(build, "error");
    let err = CliError::new(format!("the build failed: {why}"));
    if !shown.failed_step {
        return Err(err);
    }
    Err(err.hint(
        "what the step wrote is above; the next build goes on after the steps that were kept",
    ))
}

/// What was shown of a log so far.
#[derive(Debug, Default)]
struct Shown {
    next_piece: u32,
    label: String,
    /// Whether the last output ended in the middle of a line.
    mid_line: bool,
    failed_step: bool,
}

impl Shown {
    fn take(&mut self, event: &Event) {
        if let Some(piece) = event.id.as_deref().and_then(|id| id.parse::<u32>().ok()) {
            self.next_piece = piece + 1;
        }
        for line in event.data.lines() {
            if let Ok(entry) = serde_json::from_str::<Value>(line) {
                self.show(&entry);
            }
        }
    }

    fn show(&mut self, entry: &Value) {
        let text = print::text(entry, "text");
        let step = entry["step"].as_u64().unwrap_or(0);
        match entry["kind"].as_str().unwrap_or_default() {
            "begin" => {
                self.finish();
                self.label = format!("step {step}: {text}");
                print::note(&format!("[{step}] {text}"));
            }
            "cached" => {
                self.finish();
                print::note(&format!("[{step}] {text} (done before)"));
            }
            "stdout" | "stderr" => {
                print::err(text.as_bytes());
                self.mid_line = !text.ends_with('\n');
            }
            "end" => self.step_ended(entry, step),
            _ => {
                self.finish();
                self.label.clone_from(&text);
                print::note(&format!("    {text}"));
            }
        }
    }

    fn step_ended(&mut self, entry: &Value, step: u64) {
        self.finish();
        let seconds = entry["elapsed_ms"].as_u64().unwrap_or(0) / 1000;
        let ok = entry["ok"].as_bool().unwrap_or(false);
        self.failed_step = !ok;
        if !ok {
            let exit = entry["exit"].as_i64().unwrap_or(-1);
            print::note(&format!("[{step}] failed with exit code {exit}"));
        } else if seconds > 0 {
            print::note(&format!("[{step}] done in {seconds} s"));
        }
    }

    /// Ends the line that output has left open.
    fn finish(&mut self) {
        if std::mem::take(&mut self.mid_line) {
            print::note("");
        }
    }
}

/// A server-sent event.
#[derive(Debug, Default, PartialEq, Eq)]
struct Event {
    kind: String,
    id: Option<String>,
    data: String,
}

/// Puts events together from what arrives.
#[derive(Debug, Default)]
struct Events {
    buffer: Vec<u8>,
    open: Event,
}

impl Events {
    fn take(&mut self, bytes: &[u8]) -> Vec<Event> {
        self.buffer.extend_from_slice(bytes);
        let mut whole = Vec::new();
        while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\r', '\n']);
            if line.is_empty() {
                if !self.open.kind.is_empty() {
                    whole.push(std::mem::take(&mut self.open));
                }
                continue;
            }
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "event" => value.clone_into(&mut self.open.kind),
                "id" => self.open.id = Some(value.to_owned()),
                "data" => {
                    if !self.open.data.is_empty() {
                        self.open.data.push('\n');
                    }
                    self.open.data.push_str(value);
                }
                _ => {}
            }
        }
        whole
    }
}

/// Lists the builds.
pub(super) async fn list(global: &Global) -> Result<ExitCode, CliError> {
    let client = global.client()?;
    let all = client.call(Method::GET, "/v1/builds", None).await?;
    if global.json {
        print::json(&all)?;
        return Ok(ExitCode::SUCCESS);
    }
    let row = |build: &Value| {
        let step = format!("{}/{}", build["current_step"], build["total_steps"]);
        ["id", "name", "status"]
            .map(|key| print::text(build, key))
            .into_iter()
            .chain([step, print::text(build, "created_at")])
            .collect()
    };
    let rows: Vec<Vec<String>> = all.as_array().into_iter().flatten().map(row).collect();
    print::table(&["ID", "NAME", "STATUS", "STEP", "CREATED"], &rows)?;
    Ok(ExitCode::SUCCESS)
}

/// Shows a build's log until it ends.
pub(super) async fn log(global: &Global, id: &str) -> Result<ExitCode, CliError> {
    follow(global, &global.client()?, id).await
}

/// Calls a build off.
pub(super) async fn cancel(global: &Global, id: &str) -> Result<ExitCode, CliError> {
    let route = format!("{}/cancel", path(id)?);
    global.client()?.call(Method::POST, &route, None).await?;
    Ok(ExitCode::SUCCESS)
}

/// The route of one build. The id is checked here, so that nothing else gets into a path.
fn path(id: &str) -> Result<String, CliError> {
    let plain = |it: char| it.is_ascii_alphanumeric() || it == '-';
    if id.is_empty() || !id.chars().all(plain) {
        return Err(CliError::usage(format!("{id:?} is no id of a build")));
    }
    Ok(format!("/v1/builds/{id}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_being_cut_anywhere() {
        let sent = "event: log\nid: 3\ndata: {\"a\":1}\ndata: {\"b\":2}\n\n: alive\n\nevent: end\ndata: {}\n\n";
        for cut in 0..sent.len() {
            let mut events = Events::default();
            let (one, two) = sent.split_at(cut);
            let mut all = events.take(one.as_bytes());
            all.extend(events.take(two.as_bytes()));
            assert_eq!(all.len(), 2, "cut at {cut}");
            assert_eq!(all[0].data, "{\"a\":1}\n{\"b\":2}");
            assert_eq!(
                (all[0].id.as_deref(), all[1].kind.as_str()),
                (Some("3"), "end")
            );
        }
    }

    #[test]
    fn an_id_cannot_lead_to_another_route() {
        assert!(path("bld-0a1").is_ok());
        for bad in ["", "../capsules", "a/b", "a?b"] {
            assert!(path(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn files_are_sent_only_where_something_is_copied() {
        let (kind, body) = body_of("{}", Path::new("/nowhere"), &[]).expect("a body");
        assert_eq!((kind.as_str(), &body[..]), ("application/json", &b"{}"[..]));
        body_of("{}", Path::new("/nowhere"), &["a".into()]).expect_err("it is not there");
    }
}
