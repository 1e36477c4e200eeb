//! The user's key-value pairs of a file, kept as extended attributes.
//!
//! Clients send them as headers, and each upload replaces the whole set. Only attributes that are
//! there or asked for are touched, since each touch is seen by whoever watches the directory. A
//! file system without attributes is no error: metadata is a convenience.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;

use axum::http::HeaderMap;

use crate::sys;

/// Start of the header names; the rest is the key.
const HEADER_PREFIX: &str = "x-metadata-";
/// Start of the attribute names; the rest is the key.
const ATTRIBUTE_PREFIX: &str = "user.e2b.";
/// Longest key: with its prefix it fills the kernel's 255 bytes.
const MAX_KEY_BYTES: usize = 246;
/// All pairs with their prefixes: what ext4 can keep beside one inode.
const MAX_TOTAL_BYTES: usize = 4096;

/// Keys and values.
pub type Metadata = BTreeMap<String, String>;

/// Why metadata is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MetadataError {
    /// A key that is no key.
    #[error("metadata key '{0}' is empty, too long or not printable")]
    Key(String),
    /// A value that is not plain text.
    #[error("metadata value of '{0}' is not printable ASCII")]
    Value(String),
    /// Too much in all.
    #[error("metadata takes {0} bytes, at most {MAX_TOTAL_BYTES} are allowed")]
    Total(usize),
}

/// Reads the pairs out of a request's headers.
///
/// # Errors
/// [`MetadataError`] names the pair.
pub fn from_headers(headers: &HeaderMap) -> Result<Metadata, MetadataError> {
    let is_printable = |text: &str| text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    let mut metadata = Metadata::new();
    for (name, value) in headers {
        let Some(key) = name.as_str().strip_prefix(HEADER_PREFIX) else {
            continue;
        };
        if key.is_empty() || key.len() > MAX_KEY_BYTES || !is_printable(key) {
            return Err(MetadataError::Key(key.to_owned()));
        }
        let value = value.to_str().ok().filter(|value| is_printable(value));
        let value = value.ok_or_else(|| MetadataError::Value(key.to_owned()))?;
        metadata.insert(key.to_owned(), value.to_owned());
    }
    let bytes = |(key, value): (&String, &String)| ATTRIBUTE_PREFIX.len() + key.len() + value.len();
    let total = metadata.iter().map(bytes).sum();
    if total > MAX_TOTAL_BYTES {
        return Err(MetadataError::Total(total));
    }
    Ok(metadata)
}

/// Makes `metadata` the file's whole set.
///
/// # Errors
/// What the kernel said, unless it said that there are no attributes here.
pub fn replace(file: &File, metadata: &Metadata) -> io::Result<()> {
    tolerate(try_replace(file, metadata))
}

fn try_replace(file: &File, metadata: &Metadata) -> io::Result<()> {
    for name in ours(file)? {
        let key = name
            .as_bytes()
            .get(ATTRIBUTE_PREFIX.len()..)
            .unwrap_or_default();
        if !metadata.keys().any(|kept| kept.as_bytes() == key) {
            sys::remove_attribute(file, &name)?;
        }
    }
    for (key, value) in metadata {
        let name = OsString::from(format!("{ATTRIBUTE_PREFIX}{key}"));
        sys::set_attribute(file, &name, value.as_bytes())?;
    }
    Ok(())
}

/// Reads the file's set back. What is not text, or cannot be read, is left out.
#[must_use]
pub fn read(file: &File) -> Metadata {
    let pair = |name: OsString| {
        let key = name.to_str()?.strip_prefix(ATTRIBUTE_PREFIX)?.to_owned();
        let value = String::from_utf8(sys::get_attribute(file, &name).ok()?).ok()?;
        Some((key, value))
    };
    ours(file)
        .unwrap_or_default()
        .into_iter()
        .filter_map(pair)
        .collect()
}

fn ours(file: &File) -> io::Result<Vec<OsString>> {
    let mut names = sys::list_attributes(file)?;
    names.retain(|name| name.as_bytes().starts_with(ATTRIBUTE_PREFIX.as_bytes()));
    Ok(names)
}

fn tolerate(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(err) if err.raw_os_error() == Some(libc::ENOTSUP) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::{HeaderName, HeaderValue};

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&str, &str)| {
            let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
            (
                name,
                HeaderValue::from_bytes(value.as_bytes()).expect("a value"),
            )
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn keys_are_the_rest_of_the_header_name_in_lower_case() {
        let read = from_headers(&headers(&[
            ("X-Metadata-Purpose", "a b"),
            ("x-other", "no"),
        ]));
        assert_eq!(read, Ok(Metadata::from([("purpose".into(), "a b".into())])));
    }

    #[test]
    fn limits_are_those_of_the_spec() {
        let key = |length: usize| format!("x-metadata-{}", "k".repeat(length));
        assert!(from_headers(&headers(&[(&key(246), "v")])).is_ok());
        assert!(matches!(
            from_headers(&headers(&[(&key(247), "v")])),
            Err(MetadataError::Key(_))
        ));
        let value = |length: usize| "v".repeat(length);
        assert!(from_headers(&headers(&[(&key(1), &value(4086))])).is_ok());
        let too_much = from_headers(&headers(&[(&key(1), &value(4087))]));
        assert_eq!(too_much, Err(MetadataError::Total(4097)));
        let foreign = from_headers(&headers(&[(&key(1), "ä")]));
        assert_eq!(foreign, Err(MetadataError::Value("k".into())));
    }
}
