//! What a node leaves on its host, by the names only it uses.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::{fs, io};

/// Everything on this host that carries a slot tag or a data directory in its name.
///
/// # Panics
/// Where the host cannot be looked at: then nothing can be said.
#[must_use]
pub fn of_node(tag: &str, data: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let netns = format!("wrenn-{tag}-");
    found.extend(
        names("/run/netns", |name| name.starts_with(&netns)).map(|it| "netns ".to_owned() + &it),
    );
    let veth = format!("w{tag}-");
    found.extend(
        names("/sys/class/net", |name| name.starts_with(&veth)).map(|it| "link ".to_owned() + &it),
    );
    found.extend(tables(&format!("wrenn_{tag}")));
    found.extend(processes(data).map(|it| format!("process {it}")));
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    let data_text = data.to_string_lossy().into_owned();
    found.extend(
        mounts
            .lines()
            .filter(|line| line.contains(&data_text))
            .map(|line| format!("mount {line}")),
    );
    found
}

/// The nftables tables of this name.
///
/// # Panics
/// Where `nft` is not installed.
#[must_use]
pub fn tables(name: &str) -> Vec<String> {
    let listed = Command::new("nft")
        .args(["list", "tables"])
        .output()
        .expect("nft is installed");
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    listed
        .lines()
        .filter(|line| line.split_whitespace().last() == Some(name))
        .map(|line| format!("nft {line}"))
        .collect()
}

/// Command lines of live processes that name `data`, other than this one.
fn processes(data: &Path) -> impl Iterator<Item = String> {
    let data = data.to_string_lossy().into_owned();
    let own = std::process::id().to_string();
    names("/proc", move |pid| {
        pid != own && pid.bytes().all(|byte| byte.is_ascii_digit())
    })
    .filter_map(move |pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(&data).then(|| format!("{pid} {line}"))
    })
}

fn names(dir: &str, keep: impl Fn(&str) -> bool) -> impl Iterator<Item = String> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries
            .collect::<io::Result<Vec<_>>>()
            .expect("a readable directory"),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(err) => panic!("{dir}: {err}"),
    };
    let names = entries
        .into_iter()
        .filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter(move |name| keep(name))
        .collect::<Vec<_>>()
        .into_iter()
}
