//! The recipe of a template: what is done to another one to make it.
//!
//! One directive a line, its keyword in any case, then a space. Pure: what a directive does to a guest is
//! decided in the room `build`.
//!
//! | directive | meaning |
//! |---|---|
//! | `RUN [--timeout=90s] SHELL` | runs it and waits |
//! | `START SHELL` | starts it and leaves it running |
//! | `ENV NAME=VALUE` | for everything that follows; `$NAME`, `${NAME}` and `$$` are replaced in the value |
//! | `WORKDIR PATH` | makes it and goes there |
//! | `USER NAME` | makes the user and becomes it |
//! | `COPY SOURCE… DESTINATION` | takes files of the build's archive along |
//! | `IMPORT [--user=USER]` | has the build's archive take the place of the root file system; written by the node that takes one in, first and once |

use std::time::Duration;

/// Most directives of a recipe.
pub const MAX_LINES: usize = 200;
/// Longest directive.
const MAX_LINE_BYTES: usize = 16 << 10;
/// Longest a `RUN` may take that names no timeout.
pub const RUN_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest timeout that a `RUN` may name.
const MAX_RUN_TIMEOUT: Duration = Duration::from_secs(6 * 3600);
/// Longest name of a user: the limit of common tools.
const MAX_USER_CHARS: usize = 32;

/// What one line of a recipe asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Directive {
    /// A command that must succeed.
    Run {
        /// For the guest's shell.
        command: String,
        /// Longest it may take.
        timeout: Duration,
    },
    /// A command that is left running.
    Start {
        /// For the guest's shell.
        command: String,
    },
    /// A variable for everything that follows.
    Env {
        /// Its name.
        name: String,
        /// Its value, before variables in it are replaced.
        value: String,
    },
    /// The directory everything that follows happens in.
    Workdir {
        /// Absolute, or relative to the one before.
        path: String,
    },
    /// Who does everything that follows.
    User {
        /// The name.
        name: String,
    },
    /// Files of the archive that are taken along.
    Copy {
        /// Paths in the archive, without `.` and `..`; empty for all of it.
        sources: Vec<String>,
        /// Where to.
        destination: String,
    },
    /// The root file system of the archive takes the place of the guest's.
    Import {
        /// Who does everything that follows: a name or a number, and after a colon a group; root where
        /// absent.
        user: Option<String>,
    },
}

/// A directive and how it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// As written, without blanks around it.
    pub text: String,
    /// What it means.
    pub directive: Directive,
}

/// Why a recipe cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("recipe line {line}: {problem}")]
pub struct RecipeError {
    /// Which line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a line.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// There are no lines, or too many.
    #[error("a recipe has 1 to {MAX_LINES} directives, this one has {0}")]
    Lines(usize),
    /// Nothing is in it.
    #[error("it is empty")]
    Empty,
    /// It is longer than any honest one.
    #[error("it is longer than {MAX_LINE_BYTES} bytes")]
    TooLong,
    /// It holds a NUL, which no command can.
    #[error("it holds a NUL byte")]
    Nul,
    /// The keyword is none of ours.
    #[error("{0:?} is no directive: RUN, START, ENV, WORKDIR, USER and COPY are")]
    Keyword(String),
    /// The keyword stands alone.
    #[error("{0} needs something to follow it")]
    NothingFollows(&'static str),
    /// A flag of `RUN` that is not known.
    #[error("RUN does not know {0:?}; it knows --timeout=DURATION")]
    Flag(String),
    /// `IMPORT` with something else than a user.
    #[error("IMPORT is written alone or with --user=USER")]
    Import,
    /// A duration that is none.
    #[error("{0:?} is no duration of up to 6h, such as 90s or 5m")]
    Duration(String),
    /// `ENV` without a name and a value.
    #[error("ENV is written NAME=VALUE, and a name has letters, digits and low lines")]
    Env,
    /// A name that no user has.
    #[error("{0:?} is no user name: a letter or low line, then letters, digits, '-' and low lines")]
    User(String),
    /// `COPY` without a source.
    #[error("COPY needs a source and a destination")]
    Copy,
    /// A source outside of the archive.
    #[error("{0:?} lies outside of the archive: sources are relative to its root")]
    Outside(String),
}

/// Reads a recipe.
///
/// # Errors
/// [`RecipeError`] for the first line that cannot be used.
pub fn parse<S: AsRef<str>>(lines: &[S]) -> Result<Vec<Line>, RecipeError> {
    if lines.is_empty() || lines.len() > MAX_LINES {
        return Err(RecipeError {
            line: lines.len().min(MAX_LINES + 1),
            problem: Problem::Lines(lines.len()),
        });
    }
    let read = lines.iter().zip(1..).map(|(text, line)| {
        let text = text.as_ref().trim().to_owned();
        let directive = directive(&text);
        let directive = directive.map_err(|problem| RecipeError { line, problem })?;
        Ok(Line { text, directive })
    });
    read.collect()
}

fn directive(text: &str) -> Result<Directive, Problem> {
    if text.is_empty() {
        return Err(Problem::Empty);
    }
    if text.len() > MAX_LINE_BYTES {
        return Err(Problem::TooLong);
    }
    if text.contains('\0') {
        return Err(Problem::Nul);
    }
    let (keyword, rest) = text.split_once(' ').unwrap_or((text, ""));
    let rest = rest.trim();
    match keyword.to_ascii_uppercase().as_str() {
        "RUN" => run(rest),
        "START" => follows("START", rest).map(|command| Directive::Start { command }),
        "ENV" => env(rest),
        "WORKDIR" => follows("WORKDIR", rest).map(|path| Directive::Workdir { path }),
        "USER" => user(rest),
        "COPY" => copy(rest),
        "IMPORT" => import(rest),
        _ => Err(Problem::Keyword(keyword.chars().take(32).collect())),
    }
}

fn follows(keyword: &'static str, rest: &str) -> Result<String, Problem> {
    if rest.is_empty() {
        return Err(Problem::NothingFollows(keyword));
    }
    Ok(rest.to_owned())
}

fn run(rest: &str) -> Result<Directive, Problem> {
    let mut timeout = RUN_TIMEOUT;
    let mut command = rest;
    while command.starts_with("--") {
        let (flag, after) = command.split_once(' ').unwrap_or((command, ""));
        let named = flag.strip_prefix("--timeout=");
        let named = named.ok_or_else(|| Problem::Flag(flag.chars().take(64).collect()))?;
        timeout = duration(named)
            .filter(|it| (Duration::from_millis(1)..=MAX_RUN_TIMEOUT).contains(it))
            .ok_or_else(|| Problem::Duration(named.chars().take(64).collect()))?;
        command = after.trim_start();
    }
    let command = follows("RUN", command)?;
    Ok(Directive::Run { command, timeout })
}

fn env(rest: &str) -> Result<Directive, Problem> {
    let (name, value) = rest.split_once('=').ok_or(Problem::Env)?;
    let first = name.chars().next();
    let begins = first.is_some_and(|it| it.is_ascii_alphabetic() || it == '_');
    let fits = name
        .chars()
        .all(|it| it.is_ascii_alphanumeric() || it == '_');
    if !begins || !fits {
        return Err(Problem::Env);
    }
    Ok(Directive::Env {
        name: name.to_owned(),
        value: value.to_owned(),
    })
}

fn user(rest: &str) -> Result<Directive, Problem> {
    let name = follows("USER", rest)?;
    let first = name.chars().next();
    let begins = first.is_some_and(|it| it.is_ascii_alphabetic() || it == '_');
    let plain = |it: char| it.is_ascii_alphanumeric() || matches!(it, '_' | '-');
    if !begins || !name.chars().all(plain) || name.len() > MAX_USER_CHARS {
        return Err(Problem::User(name.chars().take(64).collect()));
    }
    Ok(Directive::User { name })
}

fn import(rest: &str) -> Result<Directive, Problem> {
    if rest.is_empty() {
        return Ok(Directive::Import { user: None });
    }
    let plain = |it: char| it.is_ascii_alphanumeric() || matches!(it, '_' | '-' | '.' | ':');
    let user = rest.strip_prefix("--user=").filter(|it| {
        !it.is_empty()
            && !it.starts_with('-')
            && it.len() <= 2 * MAX_USER_CHARS
            && it.chars().all(plain)
    });
    let user = user.ok_or(Problem::Import)?.to_owned();
    Ok(Directive::Import { user: Some(user) })
}

fn copy(rest: &str) -> Result<Directive, Problem> {
    let mut words: Vec<&str> = rest.split_whitespace().collect();
    let destination = words.pop().ok_or(Problem::Copy)?.to_owned();
    if words.is_empty() {
        return Err(Problem::Copy);
    }
    let sources = words
        .into_iter()
        .map(|word| inside(word).ok_or_else(|| Problem::Outside(word.chars().take(64).collect())));
    let sources = sources.collect::<Result<_, _>>()?;
    Ok(Directive::Copy {
        sources,
        destination,
    })
}

/// `path` without `.`, `..` and doubled slashes; `None` where it is absolute or leads out. The root itself
/// is empty.
#[must_use]
pub fn inside(path: &str) -> Option<String> {
    if path.starts_with('/') || path.contains('\0') {
        return None;
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// A duration in the notation of Go: numbers, each with its unit (`1h30m`, `1.5s`, `250ms`).
#[must_use]
pub fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|it: char| !it.is_ascii_digit() && it != '.')?;
        let (number, after) = rest.split_at(digits);
        let unit = after.find(|it: char| it.is_ascii_digit() || it == '.');
        let (unit, next) = after.split_at(unit.unwrap_or(after.len()));
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let number: f64 = number.parse().ok()?;
        sum = sum.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = next;
    }
    (!text.is_empty()).then_some(sum)
}

/// `value` with `$NAME` and `${NAME}` replaced by what `lookup` knows, or nothing, and `$$` by one `$`.
#[must_use]
pub fn expand(value: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let is_name = |it: char| it.is_ascii_alphanumeric() || it == '_';
    let mut out = String::with_capacity(value.len());
    let mut rest = value;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let length = after.find(|it| !is_name(it)).unwrap_or(after.len());
        let braced = after
            .strip_prefix('{')
            .and_then(|inner| inner.split_once('}'))
            .filter(|(name, _)| !name.is_empty() && name.chars().all(is_name));
        if let Some(next) = after.strip_prefix('$') {
            out.push('$');
            rest = next;
        } else if let Some((name, next)) = braced {
            out.push_str(&lookup(name).unwrap_or_default());
            rest = next;
        } else if length > 0 && !after.starts_with(|it: char| it.is_ascii_digit()) {
            out.push_str(&lookup(&after[..length]).unwrap_or_default());
            rest = &after[length..];
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(text: &str) -> Result<Directive, Problem> {
        let parsed = parse(&[text]).map_err(|err| err.problem)?;
        Ok(parsed.into_iter().next().expect("a line").directive)
    }

    #[test]
    fn keywords_are_read_in_any_case_and_errors_name_the_line() {
        let run = one("run  echo  a ").expect("a directive");
        let (command, timeout) = ("echo  a".to_owned(), RUN_TIMEOUT);
        assert_eq!(run, Directive::Run { command, timeout });
        let err = parse(&["RUN true", "# comment"]).expect_err("a comment");
        assert_eq!(err.line, 2);
        assert!(err.to_string().starts_with("recipe line 2:"), "{err}");
        for empty in ["", "  ", "RUN", "ENV", "USER ", "COPY a", "WORKDIR"] {
            assert!(one(empty).is_err(), "{empty:?}");
        }
    }

    #[test]
    fn a_run_may_name_its_timeout_and_nothing_else() {
        let run = one("RUN --timeout=5m make").expect("a directive");
        let timeout = Duration::from_secs(300);
        let command = "make".to_owned();
        assert_eq!(run, Directive::Run { command, timeout });
        for bad in [
            "RUN --timeout=7h x",
            "RUN --timeout=0s x",
            "RUN --timeout=x y",
            "RUN --net x",
        ] {
            assert!(one(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sources_stay_inside_of_the_archive() {
        let copied = one("COPY ./a//b c/../d /srv/").expect("a directive");
        let sources = vec!["a/b".to_owned(), "d".to_owned()];
        let destination = "/srv/".to_owned();
        assert_eq!(
            copied,
            Directive::Copy {
                sources,
                destination
            }
        );
        for bad in ["COPY /etc/passwd /x", "COPY ../a /x", "COPY a/../../b /x"] {
            assert!(matches!(one(bad), Err(Problem::Outside(_))), "{bad}");
        }
        assert_eq!(inside("."), Some(String::new()));
    }

    #[test]
    fn durations_are_those_of_go() {
        for (text, millis) in [
            ("90s", 90_000),
            ("1h30m", 5_400_000),
            ("1.5s", 1500),
            ("250ms", 250),
            ("0", 0),
        ] {
            assert_eq!(
                duration(text),
                Some(Duration::from_millis(millis)),
                "{text}"
            );
        }
        for bad in ["", "5", "s", "-1s", "1d", "1e9h", "1s2", "..s"] {
            assert_eq!(duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn variables_are_replaced_once_and_unknown_ones_are_empty() {
        let lookup = |name: &str| (name == "A").then(|| "$B".to_owned());
        for (value, expanded) in [
            ("$A/x", "$B/x"),
            ("${A}x", "$Bx"),
            ("$$A", "$A"),
            ("[$NONE]", "[]"),
            ("${A", "${A"),
            ("$1 $", "$1 $"),
            ("${}", "${}"),
        ] {
            assert_eq!(expand(value, lookup), expanded, "{value}");
        }
    }

    #[test]
    fn users_and_variables_have_names_of_a_kind() {
        assert!(one("USER wrenn-user").is_ok());
        for bad in [
            "USER -x",
            "USER a b",
            "USER 1a",
            "USER a;b",
            "ENV A",
            "ENV 1=2",
            "ENV A B=1",
        ] {
            assert!(one(bad).is_err(), "{bad}");
        }
        let empty = one("ENV A=").expect("an empty value");
        let (name, value) = ("A".to_owned(), String::new());
        assert_eq!(empty, Directive::Env { name, value });
    }

    #[test]
    fn an_import_names_a_user_or_nothing() {
        assert_eq!(one("IMPORT"), Ok(Directive::Import { user: None }));
        let user = Some("1000:app".to_owned());
        assert_eq!(
            one("import --user=1000:app"),
            Ok(Directive::Import { user })
        );
        for bad in [
            "IMPORT x",
            "IMPORT --user=",
            "IMPORT --user=-a",
            "IMPORT --user=a b",
            "IMPORT --user=a;b",
        ] {
            assert_eq!(one(bad), Err(Problem::Import), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(lines in proptest::collection::vec(".{0,40}", 0..4)) {
            let _ = parse(&lines);
        }

        #[test]
        fn no_value_makes_the_expansion_panic(value in "[$A{}é]{0,20}") {
            let _ = expand(&value, |_| Some("x".into()));
            let _ = duration(&value);
        }

        #[test]
        fn what_lies_inside_has_no_way_up(path in "[a./]{0,20}") {
            if let Some(inside) = inside(&path) {
                prop_assert!(!inside.split('/').any(|part| part == ".." || part == "."));
                prop_assert!(!inside.starts_with('/'));
            }
        }
    }
}
