//! The file that a template is built from: the directives of a recipe, and three of its own.
//!
//! ```text
//! # Comments and empty lines are left out; a backslash at the end joins a line with the next.
//! FROM minimal
//! RUN apt-get install -y git
//! COPY app /srv/app
//! START /srv/app/serve
//! HEALTHCHECK --interval=1s --retries=30 curl -sf localhost:8000
//! ```

use std::fs;
use std::io;
use std::path::Path;

use tar::{Builder, EntryType, Header};

use crate::template::recipe::{self, Directive};

/// Most bytes of files that a build takes along, as the interface has it.
const ARCHIVE_BYTES: usize = 100 << 20;

/// What a file asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RecipeFile {
    /// The template to build upon.
    pub(super) base: Option<String>,
    /// The directives.
    pub(super) lines: Vec<String>,
    /// When it is ready.
    pub(super) healthcheck: Option<String>,
}

impl RecipeFile {
    /// Reads a file's text; an error names its line.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut file = Self::default();
        for (number, line) in joined(text) {
            let (keyword, rest) = line.split_once(char::is_whitespace).unwrap_or((&line, ""));
            let rest = rest.trim().to_owned();
            let told = |why: &str| Err(format!("line {number}: {why}"));
            match keyword.to_ascii_uppercase().as_str() {
                "FROM" if rest.is_empty() => return told("FROM names no template"),
                "FROM" if file.base.is_some() => return told("there is a FROM already"),
                "FROM" if !file.lines.is_empty() => return told("FROM comes first"),
                "FROM" => file.base = Some(rest),
                "HEALTHCHECK" if file.healthcheck.is_some() => {
                    return told("there is a HEALTHCHECK already");
                }
                "HEALTHCHECK" => file.healthcheck = Some(rest),
                _ => {
                    if let Err(err) = recipe::parse(&[&line]) {
                        return told(&err.problem.to_string());
                    }
                    file.lines.push(line);
                }
            }
        }
        if file.lines.is_empty() {
            return Err("it has no directives".into());
        }
        Ok(file)
    }

    /// The sources of everything that is copied.
    pub(super) fn sources(&self) -> Vec<String> {
        let parsed = recipe::parse(&self.lines).unwrap_or_default();
        let sources = parsed.into_iter().filter_map(|line| match line.directive {
            Directive::Copy { sources, .. } => Some(sources),
            _ => None,
        });
        sources.flatten().collect()
    }
}

/// The lines that say something, with the number of their first, from 1.
fn joined(text: &str) -> Vec<(usize, String)> {
    let mut lines: Vec<(usize, String)> = Vec::new();
    let mut open: Option<(usize, String)> = None;
    for (line, number) in text.lines().zip(1..) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (at, before) = open.take().unwrap_or((number, String::new()));
        let (line, goes_on) = match line.strip_suffix('\\') {
            Some(line) => (line, true),
            None => (line, false),
        };
        let whole = format!("{before}{line}");
        if goes_on {
            open = Some((at, whole));
        } else {
            lines.push((at, whole));
        }
    }
    lines.extend(open);
    lines
}

/// Packs what `sources` name below `dir`. The same files make the same archive.
pub(super) fn pack(dir: &Path, sources: &[String]) -> io::Result<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    let mut sources = sources.to_vec();
    sources.sort();
    sources.dedup();
    for source in &sources {
        add(&mut builder, dir, source)?;
    }
    builder.into_inner()
}

fn add(builder: &mut Builder<Vec<u8>>, dir: &Path, path: &str) -> io::Result<()> {
    let at = dir.join(path);
    let named = |err: io::Error| io::Error::new(err.kind(), format!("{}: {err}", at.display()));
    let metadata = fs::symlink_metadata(&at).map_err(named)?;
    let mut header = Header::new_gnu();
    header.set_mode(std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o7777);
    header.set_mtime(u64::try_from(std::os::unix::fs::MetadataExt::mtime(&metadata)).unwrap_or(0));
    if metadata.is_symlink() {
        header.set_entry_type(EntryType::Symlink);
        header.set_size(0);
        let target = fs::read_link(&at).map_err(named)?;
        return builder.append_link(&mut header, path, target);
    }
    if metadata.is_dir() {
        if !path.is_empty() {
            header.set_entry_type(EntryType::Directory);
            header.set_size(0);
            builder.append_data(&mut header, path, io::empty())?;
        }
        return add_all(builder, dir, path);
    }
    if !metadata.is_file() {
        return Err(named(io::Error::other("it is no file, directory or link")));
    }
    let contents = fs::read(&at).map_err(named)?;
    if builder.get_ref().len() + contents.len() > ARCHIVE_BYTES {
        let why = format!("the files to copy have more than {ARCHIVE_BYTES} bytes");
        return Err(io::Error::other(why));
    }
    header.set_entry_type(EntryType::Regular);
    header.set_size(contents.len() as u64);
    builder.append_data(&mut header, path, &contents[..])
}

fn add_all(builder: &mut Builder<Vec<u8>>, dir: &Path, path: &str) -> io::Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir.join(path))? {
        let name = entry?.file_name().into_string();
        names.push(name.map_err(|name| {
            io::Error::other(format!("the name {} is no text", name.to_string_lossy()))
        })?);
    }
    names.sort();
    for name in names {
        let below = match path {
            "" => name,
            path => format!("{path}/{name}"),
        };
        add(builder, dir, &below)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::archive::Contents;

    #[test]
    fn comments_and_joined_lines_are_understood() {
        let text = "# a comment\nfrom minimal\n\nRUN a && \\\n  # within\n  b\nhealthcheck --retries=3 true\n";
        let file = RecipeFile::parse(text).expect("a file");
        assert_eq!(file.base.as_deref(), Some("minimal"));
        assert_eq!(file.lines, ["RUN a && b"]);
        assert_eq!(file.healthcheck.as_deref(), Some("--retries=3 true"));
    }

    #[test]
    fn the_recipes_that_come_with_wrenn_can_be_used() {
        let text = include_str!("../../../../deploy/templates/code-runner-beta/Wrennfile");
        let file = RecipeFile::parse(text).expect("a file");
        assert_eq!(file.base.as_deref(), Some("minimal"));
        let sources = ["wheels", "jupyter_server_config.py", "ready.py"];
        assert_eq!(file.sources(), sources);
        let check =
            crate::template::health::HealthCheck::parse(&file.healthcheck.expect("a check"));
        assert_eq!(check.expect("a check").retries, 1);
    }

    #[test]
    fn mistakes_name_their_line() {
        for (text, line) in [
            ("FROM a\nFROM b\nRUN x", "line 2"),
            ("RUN x\nFROM a", "line 2"),
            ("\n\nEXPOSE 80", "line 3"),
            ("FROM\nRUN x", "line 1"),
        ] {
            let err = RecipeFile::parse(text).expect_err("a mistake");
            assert!(err.starts_with(line), "{err}");
        }
        RecipeFile::parse("FROM a\n").expect_err("nothing to do");
    }

    #[test]
    fn what_is_packed_can_be_copied_by_every_directive() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join("app")).expect("made");
        fs::write(dir.path().join("app/main"), "x").expect("written");
        fs::write(dir.path().join("other"), "y").expect("written");
        std::os::unix::fs::symlink("main", dir.path().join("app/link")).expect("linked");
        let file = RecipeFile::parse("COPY app /a\nCOPY app/main /b").expect("a file");
        let packed = pack(dir.path(), &file.sources()).expect("packed");
        let contents = Contents::read(&packed[..]).expect("an archive");
        contents.hash_of(&["app".into()]).expect("there");
        contents.hash_of(&["app/main".into()]).expect("there");
        contents.hash_of(&["app/link".into()]).expect("there");
        contents
            .hash_of(&["other".into()])
            .expect_err("nobody asked for it");
        let whole = pack(dir.path(), &[String::new()]).expect("packed");
        let contents = Contents::read(&whole[..]).expect("an archive");
        contents.hash_of(&["other".into()]).expect("there");
        assert!(pack(dir.path(), &["none".into()]).is_err());
    }
}
