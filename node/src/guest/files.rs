//! Files in a guest: contents stream both ways, directories are listed and changed.

use bytes::Bytes;
use connectrpc::client::CallOptions;
use futures::Stream;
use http::Method;
use http_body_util::BodyExt as _;
use proto::envd::filesystem as pb;
use tokio::time;

use super::error::GuestError;
use super::http::{Guest, UNARY_TIMEOUT, bounded, full, streamed};

/// Largest list of a directory, as the agent sends it: its own limit of a message. The 200,000
/// entries that it lists at most take that where each has 300 bytes.
const LISTING_BYTES: usize = 64 << 20;
/// Most memory that a list takes while it is read: as many entries of some 600 bytes each.
const LISTING_MEMORY_BYTES: usize = 128 << 20;

/// What a path is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A file, or anything that is neither of the others.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
}

/// One entry of a guest directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEntry {
    /// Its last path element.
    pub name: String,
    /// Its absolute path.
    pub path: String,
    /// What it is.
    pub kind: FileKind,
    /// Its length in bytes.
    pub size_bytes: i64,
    /// Permission bits.
    pub mode: u32,
    /// Permission bits as `ls` shows them.
    pub permissions: String,
    /// Owner's name.
    pub owner: String,
    /// Group's name.
    pub group: String,
    /// Unix seconds of its last change.
    pub modified_at: i64,
    /// Where a link leads.
    pub symlink_target: Option<String>,
}

impl Guest {
    /// Opens a file for reading. Errors come before the first byte.
    ///
    /// # Errors
    /// [`GuestError::Refused`] where the path is missing or a directory.
    pub async fn read_file(
        &self,
        path: &str,
    ) -> Result<impl Stream<Item = Result<Bytes, GuestError>> + Send + use<>, GuestError> {
        let query = files_query(path);
        let opened = self.send(Method::GET, &query, None, full(Vec::new()));
        let response =
            time::timeout(UNARY_TIMEOUT, opened)
                .await
                .map_err(|_| GuestError::TimedOut {
                    waited: UNARY_TIMEOUT,
                })??;
        let frames = response.into_body().into_data_stream();
        Ok(futures::TryStreamExt::map_err(
            frames,
            GuestError::unreachable,
        ))
    }

    /// Writes a file from a stream, making its parent directories.
    ///
    /// # Errors
    /// [`GuestError::Refused`] where the path is a directory or the guest's disk is full.
    pub async fn write_file<S, E>(&self, path: &str, contents: S) -> Result<(), GuestError>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        let octets = Some("application/octet-stream");
        let answer = self
            .send(Method::POST, &files_query(path), octets, streamed(contents))
            .await?;
        // Read to the end, so that the connection can be used again.
        answer
            .into_body()
            .collect()
            .await
            .map_err(GuestError::unreachable)?;
        Ok(())
    }

    /// Lists a directory down to `depth` levels.
    ///
    /// # Errors
    /// [`GuestError::Refused`] where the path is missing or no directory.
    pub async fn list_dir(&self, path: &str, depth: u32) -> Result<Vec<FileEntry>, GuestError> {
        let request = pb::ListDirRequest {
            path: path.to_owned(),
            depth,
            ..Default::default()
        };
        let sized = CallOptions::default()
            .with_max_message_size(LISTING_BYTES)
            .with_element_memory_limit(LISTING_MEMORY_BYTES);
        let listed = self.filesystem().list_dir_with_options(request, sized);
        let answer = bounded(listed).await?.into_owned();
        Ok(answer.entries.into_iter().map(entry).collect())
    }

    /// Makes a directory and its parents.
    ///
    /// # Errors
    /// [`GuestError::Refused`] where it exists.
    pub async fn make_dir(&self, path: &str) -> Result<FileEntry, GuestError> {
        let request = pb::MakeDirRequest {
            path: path.to_owned(),
            ..Default::default()
        };
        let answer = bounded(self.filesystem().make_dir(request))
            .await?
            .into_owned();
        let made = answer.entry.into_option();
        made.map(entry)
            .ok_or_else(|| GuestError::Nonsense("no entry was returned".into()))
    }

    /// Removes a file or a whole directory; a missing path is success.
    ///
    /// # Errors
    /// [`GuestError::Refused`] where the guest cannot remove it.
    pub async fn remove(&self, path: &str) -> Result<(), GuestError> {
        let request = pb::RemoveRequest {
            path: path.to_owned(),
            ..Default::default()
        };
        bounded(self.filesystem().remove(request)).await?;
        Ok(())
    }
}

/// The agent's files route for one path, as root.
fn files_query(path: &str) -> String {
    let mut query = String::from("/files?username=root&path=");
    for byte in path.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                query.push(char::from(byte));
            }
            other => query.push_str(&format!("%{other:02X}")),
        }
    }
    query
}

fn entry(info: pb::EntryInfo) -> FileEntry {
    let kind = match info.r#type.as_known() {
        Some(pb::FileType::Directory) => FileKind::Directory,
        Some(pb::FileType::Symlink) => FileKind::Symlink,
        _ => FileKind::File,
    };
    FileEntry {
        kind,
        modified_at: info
            .modified_time
            .into_option()
            .map_or(0, |time| time.seconds),
        name: info.name,
        path: info.path,
        size_bytes: info.size,
        mode: info.mode,
        permissions: info.permissions,
        owner: info.owner,
        group: info.group,
        symlink_target: info.symlink_target,
    }
}

#[cfg(test)]
mod tests {
    use super::files_query;

    #[test]
    fn a_path_cannot_break_out_of_its_query_parameter() {
        assert_eq!(
            files_query("/a b/&username=x#?%\n\u{e9}"),
            "/files?username=root&path=/a%20b/%26username%3Dx%23%3F%25%0A%C3%A9"
        );
    }
}
