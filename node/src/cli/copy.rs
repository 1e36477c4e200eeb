//! `wrenn capsule cp`: files of any size, streamed, into and out of a capsule.

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};
use http::Method;
use http_body_util::BodyExt as _;
use serde_json::json;
use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;
use tokio_util::io::ReaderStream;

use super::client::Client;
use super::error::CliError;
use super::{capsule, print};

/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;
/// What a half-written download is called.
const PART_SUFFIX: &str = ".wrenn-part";

/// One end of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    /// A file here; `-` is standard input or output.
    Here(PathBuf),
    /// A file in a capsule.
    There { id: String, path: String },
}

/// Copies a file.
pub(super) async fn run(client: &Client, from: &str, to: &str) -> Result<(), CliError> {
    match (end(from), end(to)) {
        (End::Here(from), End::There { id, path }) => {
            let work = upload(client, &from, &id, path);
            print::progress(&format!("copying {}", from.display()), work).await
        }
        (End::There { id, path }, End::Here(to)) => {
            let work = download(client, &id, &path, &to);
            print::progress(&format!("copying {path}"), work).await
        }
        (End::Here(_), End::Here(_)) => {
            let err = CliError::usage("neither end is in a capsule");
            Err(err.hint("write one of them as ID:/path"))
        }
        (End::There { .. }, End::There { .. }) => {
            let err = CliError::usage("both ends are in capsules");
            Err(err.hint("copy through a file here"))
        }
    }
}

fn end(text: &str) -> End {
    match text.split_once(':') {
        Some((id, path)) if id.starts_with("cl-") => End::There {
            id: id.to_owned(),
            path: path.to_owned(),
        },
        _ => End::Here(text.into()),
    }
}

async fn upload(client: &Client, from: &Path, id: &str, mut path: String) -> Result<(), CliError> {
    if path.ends_with('/') {
        let name = from.file_name().unwrap_or_default().to_string_lossy();
        path.push_str(&name);
    }
    let contents = open(from).await?;
    let boundary = format!("{:032x}", rand::random::<u128>());
    let head = format!(
        "--{boundary}\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n{path}\r\n\
         --{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"upload.bin\"\r\n\
         Content-Type: application/octet-stream\r\n\r\n"
    );
    let tail = format!("\r\n--{boundary}--\r\n");
    let whole = |text: String| stream::iter([Ok(Bytes::from(text))]);
    let body = whole(head).chain(contents).chain(whole(tail));
    let route = format!("{}/files/stream/write", capsule::path(id)?);
    let content_type = format!("multipart/form-data; boundary={boundary}");
    client.upload(&route, &content_type, body).await
}

async fn open(from: &Path) -> Result<BoxStream<'static, io::Result<Bytes>>, CliError> {
    if from == Path::new("-") {
        return Ok(ReaderStream::with_capacity(tokio::io::stdin(), READ_BYTES).boxed());
    }
    let failed = |err| CliError::from_error(&format!("open {}", from.display()), &err);
    let file = File::open(from).await.map_err(failed)?;
    if file.metadata().await.map_err(failed)?.is_dir() {
        let err = CliError::usage(format!("{} is a directory", from.display()));
        return Err(err.hint("pack it first: tar c DIR | wrenn capsule cp - ID:/tmp/dir.tar"));
    }
    Ok(ReaderStream::with_capacity(file, READ_BYTES).boxed())
}

async fn download(client: &Client, id: &str, path: &str, to: &Path) -> Result<(), CliError> {
    let route = format!("{}/files/stream/read", capsule::path(id)?);
    let answer = client
        .open(Method::POST, &route, Some(json!({"path": path})))
        .await?;
    let mut body = answer.into_body();
    if to == Path::new("-") {
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|err| client.broken(&err))?;
            print::out(frame.data_ref().map_or(&[], |data| data.as_ref()))?;
        }
        return Ok(());
    }
    let to = if to.is_dir() {
        to.join(Path::new(path).file_name().unwrap_or_default())
    } else {
        to.to_owned()
    };
    // A download that broke off must not look like the file.
    let mut part = to.clone().into_os_string();
    part.push(PART_SUFFIX);
    let part = PathBuf::from(part);
    let failed = |err| CliError::from_error(&format!("write {}", to.display()), &err);
    let mut file = File::create(&part).await.map_err(failed)?;
    let copied = async {
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|err| client.broken(&err))?;
            let data = frame.data_ref().map_or(&[][..], |data| data.as_ref());
            file.write_all(data).await.map_err(failed)?;
        }
        file.flush().await.map_err(failed)?;
        tokio::fs::rename(&part, &to).await.map_err(failed)
    };
    let outcome = copied.await;
    if outcome.is_err() {
        let _gone_anyway = tokio::fs::remove_file(&part).await;
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_id_before_a_colon_means_a_capsule() {
        let there = |id: &str, path: &str| End::There {
            id: id.into(),
            path: path.into(),
        };
        assert_eq!(end("cl-1:/tmp/a:b"), there("cl-1", "/tmp/a:b"));
        assert_eq!(end("a:b"), End::Here("a:b".into()));
        assert_eq!(end("-"), End::Here("-".into()));
        assert_eq!(end("./cl-1:/x"), End::Here("./cl-1:/x".into()));
    }
}
