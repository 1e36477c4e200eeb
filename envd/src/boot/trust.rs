//! Certificates that the host has the guest trust: those of a proxy that looks into what leaves it.
//!
//! They are appended to the bundle that programs read, and kept beside the system's own local ones,
//! so that an image that makes the bundle anew takes them in. There is one set; a new one takes the
//! place of the old.

use std::fs;
use std::path::Path;

use super::BootError;

/// What programs read.
const BUNDLE: &str = "etc/ssl/certs/ca-certificates.crt";
/// What the system makes the bundle from, besides its own.
const LOCAL: &str = "usr/local/share/ca-certificates/wrenn-host.crt";
/// Largest set: some hundred certificates.
pub const MAX_BYTES: usize = 512 * 1024;

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// Whether `text` is certificates in PEM, one at least, whole, and little enough. Pure.
#[must_use]
pub fn is_bundle(text: &str) -> bool {
    let begins = text.matches(BEGIN).count();
    begins > 0 && begins == text.matches(END).count() && text.len() <= MAX_BYTES
}

/// Has programs of the system at `root` trust `certificates`, and no more the ones given before.
///
/// # Errors
/// [`BootError::File`] names the file.
pub fn install(root: &Path, certificates: &str) -> Result<(), BootError> {
    let (bundle, local) = (root.join(BUNDLE), root.join(LOCAL));
    let before = fs::read_to_string(&local).unwrap_or_default();
    let trusted = fs::read_to_string(&bundle).unwrap_or_default();
    let merged = merge(&trusted, &before, certificates);
    for (path, text, old) in [
        (&local, certificates, &before),
        (&bundle, &merged, &trusted),
    ] {
        if text == old {
            continue;
        }
        let shown = path.to_string_lossy().into_owned();
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(BootError::file("create the place of", &*shown))?;
        }
        fs::write(path, text).map_err(BootError::file("write", shown))?;
    }
    Ok(())
}

/// The bundle with `new` at its end in the place of `old`. Pure.
fn merge(bundle: &str, old: &str, new: &str) -> String {
    let mut merged = match old.trim() {
        "" => bundle.to_owned(),
        old => bundle.replace(old, ""),
    };
    merged.truncate(merged.trim_end().len());
    if !merged.is_empty() {
        merged.push('\n');
    }
    format!("{merged}{}\n", new.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(content: &str) -> String {
        format!("{BEGIN}\n{content}\n{END}\n")
    }

    #[test]
    fn a_new_set_takes_the_place_of_the_old_and_twice_is_once() {
        let root = tempfile::tempdir().expect("a directory");
        let bundle = root.path().join(BUNDLE);
        fs::create_dir_all(bundle.parent().expect("not the root")).expect("made");
        fs::write(&bundle, certificate("system")).expect("written");
        for (given, kept) in [("one", "one"), ("one", "one"), ("two", "two")] {
            install(root.path(), &certificate(given)).expect("installed");
            let expected = certificate("system") + &certificate(kept);
            assert_eq!(fs::read_to_string(&bundle).expect("there"), expected);
        }
        let bare = tempfile::tempdir().expect("a directory");
        install(bare.path(), &certificate("only")).expect("installed");
        let bundle = fs::read_to_string(bare.path().join(BUNDLE));
        assert_eq!(bundle.expect("there"), certificate("only"));
    }

    #[test]
    fn what_is_no_certificate_is_told_from_what_is() {
        assert!(is_bundle(&(certificate("a") + &certificate("b"))));
        for text in ["", "a", BEGIN, END, &certificate(&"a".repeat(MAX_BYTES))] {
            assert!(!is_bundle(text));
        }
    }
}
