//! A build as steps in order, and the name under which each step's outcome is kept.
//!
//! ```text
//! pre-build   refresh the package index, make wrenn-user, go to its home
//! recipe      as written
//! post-build  as root: empty package caches and lists
//! ```
//!
//! The key of a step is a hash of what it starts from (the key before it), what it does and the files it
//! takes along: whoever does the same to the same finds the outcome. Times, users and nodes are not in it.

use std::time::Duration;

use blake3::Hasher;

use super::recipe::{self, Directive, Line, RecipeError};

/// Keeps these hashes apart from all others. Changed whenever steps come to mean something else.
const CONTEXT: &str = "wrenn 2026-11-22 steps of a template build";
/// Longest a step before and after the recipe may take.
const OUTER_TIMEOUT: Duration = Duration::from_secs(600);
/// The user of templates whose recipe names none.
pub const DEFAULT_USER: &str = "wrenn-user";
/// Digits of a key in a name.
const KEY_DIGITS: usize = 32;

/// Brings the list of packages up to date, with whatever the guest has.
const REFRESH: &str = "if command -v apt-get >/dev/null; then apt-get update; \
     elif command -v apk >/dev/null; then apk update; \
     elif command -v dnf >/dev/null; then dnf makecache; \
     elif command -v pacman >/dev/null; then pacman -Sy; fi";
/// Removes what package managers keep.
const CLEAN: &str = "if command -v apt-get >/dev/null; then apt-get clean; fi; \
     if command -v dnf >/dev/null; then dnf clean all; fi; \
     rm -rf /var/lib/apt/lists/* /var/cache/apk/* /var/cache/pacman/pkg/*";

/// Part of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What comes before the recipe.
    PreBuild,
    /// What was asked for.
    Recipe,
    /// What comes after it.
    PostBuild,
}

impl Part {
    /// Its name in logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PreBuild => "pre-build",
            Self::Recipe => "recipe",
            Self::PostBuild => "post-build",
        }
    }
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where it comes from.
    pub part: Part,
    /// What to do, and how it was written.
    pub line: Line,
    /// Hash of the files it takes along; empty where it takes none.
    pub files: Vec<u8>,
}

impl Step {
    /// Whether it is root's to do, whoever the recipe has become.
    #[must_use]
    pub fn as_root(&self) -> bool {
        self.part != Part::Recipe
    }

    /// Whether it needs the build's archive.
    #[must_use]
    pub const fn takes_files(&self) -> bool {
        matches!(
            self.line.directive,
            Directive::Copy { .. } | Directive::Import { .. }
        )
    }

    /// Whether the archive it needs is a root file system.
    #[must_use]
    pub const fn imports(&self) -> bool {
        matches!(self.line.directive, Directive::Import { .. })
    }
}

/// What a build starts from, as far as its steps depend on it.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// Digest of the image, or id of the snapshot.
    pub base: &'a [u8],
    /// Processors, MiB of memory and of disk: a guest keeps them.
    pub shape: (u32, u32, u32),
}

/// Names the outcome of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key([u8; 32]);

impl Key {
    /// As part of a name.
    #[must_use]
    pub fn digits(&self) -> String {
        let mut hex = blake3::Hash::from_bytes(self.0).to_hex().to_string();
        hex.truncate(KEY_DIGITS);
        hex
    }
}

/// The steps of a recipe; `files` has for each line the hash of the files it takes along.
///
/// # Errors
/// [`RecipeError`]: the recipe cannot be used.
pub fn steps(
    recipe: &[String],
    files: &[Vec<u8>],
    skip_pre_post: bool,
) -> Result<Vec<Step>, RecipeError> {
    let files = files.iter().cloned().chain(std::iter::repeat(Vec::new()));
    let own = recipe::parse(recipe)?.into_iter().zip(files);
    let own = own.map(|(line, files)| Step {
        part: Part::Recipe,
        line,
        files,
    });
    if skip_pre_post {
        return Ok(own.collect());
    }
    Ok(before().into_iter().chain(own).chain([after()]).collect())
}

fn before() -> [Step; 3] {
    let user = DEFAULT_USER.to_owned();
    let path = format!("/home/{DEFAULT_USER}");
    [
        outer(Part::PreBuild, "refresh the package index", run(REFRESH)),
        outer(
            Part::PreBuild,
            "USER wrenn-user",
            Directive::User { name: user },
        ),
        outer(
            Part::PreBuild,
            "WORKDIR /home/wrenn-user",
            Directive::Workdir { path },
        ),
    ]
}

fn after() -> Step {
    outer(Part::PostBuild, "empty package caches", run(CLEAN))
}

fn run(command: &str) -> Directive {
    Directive::Run {
        command: command.to_owned(),
        timeout: OUTER_TIMEOUT,
    }
}

fn outer(part: Part, text: &str, directive: Directive) -> Step {
    let text = text.to_owned();
    Step {
        part,
        line: Line { text, directive },
        files: Vec::new(),
    }
}

/// The keys of `steps` in order, done to `origin`.
#[must_use]
pub fn keys(origin: Origin<'_>, steps: &[Step]) -> Vec<Key> {
    let mut hasher = Hasher::new_derive_key(CONTEXT);
    add(&mut hasher, origin.base);
    let (vcpus, memory, disk) = origin.shape;
    for size in [vcpus, memory, disk] {
        hasher.update(&size.to_le_bytes());
    }
    let mut last = *hasher.finalize().as_bytes();
    let key = |step: &Step| {
        let mut hasher = Hasher::new_derive_key(CONTEXT);
        add(&mut hasher, &last);
        add(&mut hasher, step.part.name().as_bytes());
        add(&mut hasher, meaning(&step.line.directive).as_bytes());
        add(&mut hasher, &step.files);
        last = *hasher.finalize().as_bytes();
        Key(last)
    };
    steps.iter().map(key).collect()
}

/// What a directive does, without how it was written; a timeout changes no outcome.
fn meaning(directive: &Directive) -> String {
    match directive {
        Directive::Run { command, .. } => format!("RUN {command}"),
        other => format!("{other:?}"),
    }
}

/// With its length: two steps must not become one by where a part ends.
fn add(hasher: &mut Hasher, part: &[u8]) {
    hasher.update(&(part.len() as u64).to_le_bytes());
    hasher.update(part);
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGIN: Origin<'static> = Origin {
        base: b"minimal",
        shape: (1, 512, 5120),
    };

    fn own(lines: &[&str]) -> Vec<Step> {
        let lines: Vec<String> = lines.iter().map(|it| (*it).to_owned()).collect();
        steps(&lines, &[], true).expect("a recipe")
    }

    #[test]
    fn what_comes_before_a_change_keeps_its_key_and_what_follows_does_not() {
        let one = keys(ORIGIN, &own(&["RUN a", "ENV A=1", "RUN b"]));
        let two = keys(ORIGIN, &own(&["RUN a", "ENV A=2", "RUN b"]));
        assert_eq!(one[0], two[0]);
        assert_ne!(one[1], two[1]);
        assert_ne!(one[2], two[2]);
        assert_eq!(one[0].digits().len(), KEY_DIGITS);
    }

    #[test]
    fn keys_depend_on_the_origin_and_on_files_and_not_on_spelling_or_timeouts() {
        let plain = keys(ORIGIN, &own(&["RUN a"]));
        assert_eq!(plain, keys(ORIGIN, &own(&["run --timeout=5m   a"])));
        for other in [
            Origin {
                base: b"other",
                ..ORIGIN
            },
            Origin {
                shape: (2, 512, 5120),
                ..ORIGIN
            },
        ] {
            assert_ne!(plain, keys(other, &own(&["RUN a"])));
        }
        let copy = |files: &[u8]| {
            let lines = vec!["COPY a /b".to_owned()];
            let steps = steps(&lines, &[files.to_vec()], true).expect("a recipe");
            keys(ORIGIN, &steps)
        };
        assert_ne!(copy(b"one"), copy(b"two"));
    }

    #[test]
    fn the_outer_parts_are_there_unless_they_are_left_out() {
        let lines = vec!["RUN a".to_owned()];
        let whole = steps(&lines, &[], false).expect("a recipe");
        let parts: Vec<&str> = whole.iter().map(|step| step.part.name()).collect();
        assert_eq!(
            parts,
            [
                "pre-build",
                "pre-build",
                "pre-build",
                "recipe",
                "post-build"
            ]
        );
        assert!(!whole[3].as_root() && whole[4].as_root());
    }
}
