//! How a path in a request becomes an absolute path in the guest. Pure: looks at no file.

use std::path::{Component, Path, PathBuf};

/// Why a path of a request is not a path of the guest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ResolvePathError {
    /// `~name`: only one's own home can be written with a tilde.
    #[error("path '{0}' names another user's home, which is not supported")]
    OtherHome(String),
    /// A zero byte, which no path can hold.
    #[error("path holds a zero byte")]
    ZeroByte,
}

/// Where relative paths start.
#[derive(Clone, Copy, Debug)]
pub struct Base<'a> {
    /// The user's home directory.
    pub home: &'a Path,
    /// The default working directory, if one was set.
    pub workdir: Option<&'a Path>,
}

impl Base<'_> {
    /// Makes `path` absolute: empty and relative paths start in the working directory or home,
    /// `~` is home, and `.` and `..` are removed by their letters alone.
    ///
    /// # Errors
    /// [`ResolvePathError`] names what is wrong with the path.
    pub fn resolve(&self, path: &str) -> Result<PathBuf, ResolvePathError> {
        if path.contains('\0') {
            return Err(ResolvePathError::ZeroByte);
        }
        let joined = match path.strip_prefix('~') {
            Some("") => self.home.to_owned(),
            Some(rest) => match rest.strip_prefix('/') {
                Some(rest) => self.home.join(rest.trim_start_matches('/')),
                None => return Err(ResolvePathError::OtherHome(path.to_owned())),
            },
            None => self.start().join(path),
        };
        Ok(clean(&Path::new("/").join(joined)))
    }

    /// Where an empty path leads.
    #[must_use]
    pub fn start(&self) -> PathBuf {
        let start = self.workdir.unwrap_or(self.home);
        match start.strip_prefix("~") {
            Ok(rest) => self.home.join(rest),
            Err(_) => start.to_owned(),
        }
    }
}

/// Removes `.` and `..` without asking the file system; `..` at the root stays at the root.
fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn resolve(path: &str, workdir: Option<&str>) -> Result<PathBuf, ResolvePathError> {
        Base {
            home: Path::new("/home/u"),
            workdir: workdir.map(Path::new),
        }
        .resolve(path)
    }

    #[test]
    fn paths_resolve_by_the_table_of_the_spec() {
        for (path, workdir, expected) in [
            ("", None, "/home/u"),
            ("", Some("/work"), "/work"),
            ("~", Some("/work"), "/home/u"),
            ("~/a/b", None, "/home/u/a/b"),
            ("~//a", None, "/home/u/a"),
            ("a", None, "/home/u/a"),
            ("a", Some("/work"), "/work/a"),
            ("a", Some("~/w"), "/home/u/w/a"),
            ("/a/./b//c/../d/", None, "/a/b/d"),
            ("../../../../x", None, "/x"),
            ("/", None, "/"),
        ] {
            assert_eq!(
                resolve(path, workdir),
                Ok(expected.into()),
                "{path:?} in {workdir:?}"
            );
        }
    }

    #[test]
    fn another_users_home_and_zero_bytes_are_refused() {
        assert_eq!(
            resolve("~bob/x", None),
            Err(ResolvePathError::OtherHome("~bob/x".into()))
        );
        assert_eq!(resolve("a\0b", None), Err(ResolvePathError::ZeroByte));
    }

    proptest! {
        #[test]
        fn a_resolved_path_is_absolute_and_clean(path in ".{0,60}") {
            if let Ok(resolved) = resolve(&path, None) {
                prop_assert!(resolved.is_absolute());
                let clean = resolved
                    .components()
                    .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
                prop_assert!(clean);
                let again = resolve(resolved.to_str().expect("made of text"), None);
                prop_assert_eq!(again, Ok(resolved));
            }
        }
    }
}
