//! Names and types in the headers of a download. Pure.

use std::path::Path;

/// The type of what we know nothing about.
const UNKNOWN: &str = "application/octet-stream";

/// The media type that a file's extension stands for.
#[must_use]
pub fn media_type(path: &Path) -> &'static str {
    let extension = path
        .extension()
        .and_then(|extension| extension.to_str())
        .unwrap_or_default();
    match extension.to_ascii_lowercase().as_str() {
        "txt" | "log" | "text" => "text/plain; charset=utf-8",
        "html" | "htm" => "text/html; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "csv" => "text/csv; charset=utf-8",
        "md" => "text/markdown; charset=utf-8",
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "xml" => "text/xml; charset=utf-8",
        "py" => "text/x-python; charset=utf-8",
        "sh" => "application/x-sh",
        "json" => "application/json",
        "yaml" | "yml" => "application/yaml",
        "pdf" => "application/pdf",
        "wasm" => "application/wasm",
        "zip" => "application/zip",
        "gz" => "application/gzip",
        "tar" => "application/x-tar",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "gif" => "image/gif",
        "svg" => "image/svg+xml",
        "webp" => "image/webp",
        "ico" => "image/vnd.microsoft.icon",
        "mp3" => "audio/mpeg",
        "wav" => "audio/wav",
        "mp4" => "video/mp4",
        "webm" => "video/webm",
        _ => UNKNOWN,
    }
}

/// `Content-Disposition` of a file shown in place under its own name.
#[must_use]
pub fn disposition(name: &str) -> String {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if !name.is_empty() && name.bytes().all(is_token) {
        return format!("inline; filename={name}");
    }
    if name.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        let quoted = name.replace('\\', "\\\\").replace('"', "\\\"");
        return format!("inline; filename=\"{quoted}\"");
    }
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let encode = |byte: u8| {
        if is_plain(byte) {
            char::from(byte).to_string()
        } else {
            format!("%{byte:02X}")
        }
    };
    format!(
        "inline; filename*=utf-8''{}",
        name.bytes().map(encode).collect::<String>()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extension_decides_the_type() {
        assert_eq!(
            media_type(Path::new("/a/b.TXT")),
            "text/plain; charset=utf-8"
        );
        assert_eq!(media_type(Path::new("/a.txt/b")), UNKNOWN);
    }

    #[test]
    fn names_are_quoted_only_as_far_as_needed() {
        assert_eq!(disposition("a.txt"), "inline; filename=a.txt");
        assert_eq!(
            disposition("a \"b\".txt"),
            "inline; filename=\"a \\\"b\\\".txt\""
        );
        assert_eq!(disposition("ä\n"), "inline; filename*=utf-8''%C3%A4%0A");
    }
}
