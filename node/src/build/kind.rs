//! What becomes of a build: a guest that goes on, or a disk alone; and what the disk lacks. Pure.

use raft::state::{BuildSpec, Node, SnapshotKind};

use crate::template::plan::Step;
use crate::template::recipe::Directive;

/// Directories that a guest has in its memory: nothing below them is on its disk.
const IN_MEMORY: [&str; 3] = ["/tmp", "/run", "/dev"];

/// Services that are known to be healthy are kept as they run, or else the disk is all there is. While
/// there are nodes of releases that cannot boot from it, all is kept as it was then.
pub(super) fn kind<'a>(
    spec: &BuildSpec,
    mut nodes: impl Iterator<Item = &'a Node>,
) -> SnapshotKind {
    match spec.healthcheck.is_empty() && nodes.all(|node| node.boots_disks) {
        true => SnapshotKind::Base,
        false => SnapshotKind::Snapshot,
    }
}

/// What the recipe has made that a disk alone lacks, for whoever reads the log. `cwd` is where its
/// last step happened.
pub(super) fn lacks(steps: &[Step], cwd: &str) -> Vec<String> {
    let directives = || steps.iter().map(|step| &step.line.directive);
    let starts = directives().any(|it| matches!(it, Directive::Start { .. }));
    let copied = directives().filter_map(|it| match it {
        Directive::Copy { destination, .. } => Some(destination.as_str()),
        _ => None,
    });
    let mut lost: Vec<_> = copied.chain([cwd]).filter(|it| in_memory(it)).collect();
    lost.dedup();
    let services = "without a health check it is a disk alone: what START has begun does not run \
                    in its capsules";
    let lost = lost.into_iter().map(|path| {
        format!("without a health check it is a disk alone: {path} is in memory, and not in it")
    });
    starts
        .then(|| services.to_owned())
        .into_iter()
        .chain(lost)
        .collect()
}

fn in_memory(path: &str) -> bool {
    IN_MEMORY.iter().any(|dir| {
        let rest = path.strip_prefix(dir);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::plan;

    fn told(recipe: &str, cwd: &str) -> Vec<String> {
        let recipe: Vec<String> = recipe.lines().map(str::to_owned).collect();
        let steps = plan::steps(&recipe, &[], true).expect("a recipe");
        lacks(&steps, cwd)
    }

    #[test]
    fn what_is_in_memory_or_runs_is_named_and_nothing_else() {
        assert_eq!(
            told("RUN true\nWORKDIR /tmpfiles", "/tmpfiles"),
            [] as [&str; 0]
        );
        let told = told("START sleep 1\nRUN true", "/tmp/app");
        assert_eq!(told.len(), 2);
        assert!(told[0].contains("START"), "{told:?}");
        assert!(told[1].contains("/tmp/app"), "{told:?}");
    }

    #[test]
    fn a_disk_alone_is_made_only_where_all_nodes_boot_from_one() {
        let spec = BuildSpec::default();
        let checked = BuildSpec {
            healthcheck: "true".into(),
            ..spec.clone()
        };
        let made = |spec: &BuildSpec, boots: [bool; 2]| {
            let nodes = boots.map(|boots_disks| Node {
                boots_disks,
                ..Node::default()
            });
            kind(spec, nodes.iter())
        };
        assert_eq!(made(&spec, [true, true]), SnapshotKind::Base);
        assert_eq!(made(&spec, [true, false]), SnapshotKind::Snapshot);
        assert_eq!(made(&checked, [true, true]), SnapshotKind::Snapshot);
    }
}
