//! Which directory each kernel watch stands for. Pure.
//!
//! Paths are relative to the watched directory, whose own is empty. The kernel watches inodes and
//! not names, so the table follows every move.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::path::{Path, PathBuf};

/// Watches by path and paths by watch.
#[derive(Debug)]
pub struct Table<D> {
    paths: HashMap<D, PathBuf>,
    watches: BTreeMap<PathBuf, D>,
}

impl<D> Default for Table<D> {
    fn default() -> Self {
        Self {
            paths: HashMap::new(),
            watches: BTreeMap::new(),
        }
    }
}

impl<D: Copy + Eq + Hash> Table<D> {
    /// Notes that `watch` stands for `path`, whatever either stood for before.
    pub fn insert(&mut self, watch: D, path: PathBuf) {
        self.forget(watch);
        if let Some(before) = self.watches.insert(path.clone(), watch) {
            self.paths.remove(&before);
        }
        self.paths.insert(watch, path);
    }

    /// The directory that `watch` stands for.
    #[must_use]
    pub fn path(&self, watch: D) -> Option<&Path> {
        self.paths.get(&watch).map(PathBuf::as_path)
    }

    /// Whether the directory at `path` is watched.
    #[must_use]
    pub fn knows(&self, path: &Path) -> bool {
        self.watches.contains_key(path)
    }

    /// Forgets one watch.
    pub fn forget(&mut self, watch: D) {
        if let Some(path) = self.paths.remove(&watch) {
            self.watches.remove(&path);
        }
    }

    /// Forgets the directory at `path` and all below it; returns their watches.
    pub fn forget_below(&mut self, path: &Path) -> Vec<D> {
        let below = self.below(path);
        for (_, watch) in &below {
            self.forget(*watch);
        }
        below.into_iter().map(|(_, watch)| watch).collect()
    }

    /// Moves the directory at `from`, and all below it, to `to`.
    pub fn rename(&mut self, from: &Path, to: &Path) {
        let moved = self.below(from);
        for (_, watch) in &moved {
            self.forget(*watch);
        }
        for (path, watch) in moved {
            let rest = path.strip_prefix(from).unwrap_or(&path);
            // Joining an empty rest would append a slash.
            let path = if rest.as_os_str().is_empty() {
                to.to_owned()
            } else {
                to.join(rest)
            };
            self.insert(watch, path);
        }
    }

    /// How many directories are watched.
    #[must_use]
    pub fn len(&self) -> usize {
        self.paths.len()
    }

    /// Whether no directory is watched.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    fn below(&self, path: &Path) -> Vec<(PathBuf, D)> {
        // Paths are ordered part by part, so what lies below one follows it without a gap.
        let from = self.watches.range(path.to_owned()..);
        from.take_while(|(candidate, _)| candidate.starts_with(path))
            .map(|(candidate, watch)| (candidate.clone(), *watch))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table(paths: &[&str]) -> Table<usize> {
        let mut table = Table::default();
        for (watch, path) in paths.iter().enumerate() {
            table.insert(watch, path.into());
        }
        table
    }

    #[test]
    fn a_moved_directory_takes_all_below_it_along_and_no_neighbour() {
        let mut table = table(&["", "a", "a/b", "a b", "a-b", "ab"]);
        table.rename(Path::new("a"), Path::new("x/y"));
        let paths: Vec<_> = (0..6).filter_map(|watch| table.path(watch)).collect();
        assert_eq!(
            paths,
            ["", "x/y", "x/y/b", "a b", "a-b", "ab"].map(Path::new)
        );
    }

    #[test]
    fn what_lies_below_is_forgotten_with_its_directory() {
        let mut table = table(&["", "a", "a/b", "ab"]);
        assert_eq!(table.forget_below(Path::new("a")), [1, 2]);
        assert!(table.knows(Path::new("ab")) && !table.knows(Path::new("a/b")));
        assert_eq!(table.forget_below(Path::new("")).len(), 2);
        assert!(table.is_empty());
    }

    proptest! {
        #[test]
        fn both_directions_agree_whatever_happens(
            steps in prop::collection::vec((0_u8..4, 0_usize..6, "[ab](/[ab]){0,2}", "[ab](/[ab]){0,2}"), 0..40)
        ) {
            let mut table = Table::default();
            for (step, watch, one, other) in steps {
                match step {
                    0 | 1 => table.insert(watch, one.into()),
                    2 => drop(table.forget_below(Path::new(&one))),
                    _ => table.rename(Path::new(&one), Path::new(&other)),
                }
                prop_assert_eq!(table.paths.len(), table.watches.len());
                for (path, watch) in &table.watches {
                    prop_assert_eq!(table.paths.get(watch), Some(path));
                }
            }
        }
    }
}
