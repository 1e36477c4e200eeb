//! `wrenn node recover`: going on from one survivor after the quorum is lost for good.
//!
//! It shows what it is about to do and what it cannot check itself, and does it only after a plain
//! yes: `--yes`, or the cluster's id typed in.

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use proto::ids::NodeId;
use serde_json::{Value, json};

use super::error::{CliError, chain};
use super::node::STOP_FIRST;
use super::{Global, Hooks, print};
use crate::cluster::recovery::{Plan, Survey, list, plan};

/// What to recover, and how sure the person is.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Where the stopped node keeps its state.
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Only show how much of the log this node has, and who votes.
    #[arg(long, conflicts_with_all = ["lost", "yes"])]
    inspect: bool,
    /// The nodes that are dead for good, e.g. node-2,node-3.
    #[arg(long, value_name = "NODES", value_delimiter = ',')]
    lost: Vec<NodeId>,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

/// Does what the options say.
pub(super) fn run(hooks: Hooks, global: &Global, options: &Options) -> Result<ExitCode, CliError> {
    let surveyed = (hooks.survey)(&options.data_dir);
    let survey = surveyed.map_err(|err| {
        let hint = format!("--data-dir is a stopped node's; {STOP_FIRST}");
        CliError::new(chain(err.as_ref())).hint(hint)
    })?;
    if options.inspect {
        show(global, &survey)?;
        return Ok(ExitCode::SUCCESS);
    }
    let lost: BTreeSet<NodeId> = options.lost.iter().copied().collect();
    let plan = plan(&survey, &lost).map_err(|err| {
        let hint = "`wrenn node recover --inspect` shows who is in the log";
        CliError::new(err.to_string()).hint(hint)
    })?;
    explain(&survey, &plan);
    if !options.yes {
        ask(&plan)?;
    }
    let recovered = (hooks.recover)(&options.data_dir, &lost, plan.last);
    let cluster = recovered.map_err(|err| CliError::new(chain(err.as_ref())))?;
    if global.json {
        print::json(&json!({
            "cluster": cluster.to_string(),
            "former_cluster": plan.cluster.to_string(),
            "survivor": plan.survivor.to_string(),
            "lost": names(plan.lost.keys()),
            "kept": names(plan.kept.keys()),
        }))?;
    } else {
        print::line(&format!("{} is the only voter of {cluster}", plan.survivor))?;
        print::note("now start it, then the other survivors; let new nodes in with new tokens");
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows a stopped node's log.
fn show(global: &Global, survey: &Survey) -> Result<(), CliError> {
    let log = &survey.log;
    if global.json {
        let member = |(id, node): (&NodeId, &raft::types::Node)| {
            let votes = log.voters.contains(id);
            json!({ "id": id.to_string(), "address": node.address, "voter": votes })
        };
        return print::json(&json!({
            "node": survey.node.to_string(),
            "cluster": survey.cluster.to_string(),
            "position": { "term": log.last.term, "index": log.last.index },
            "term": log.term,
            "voters": names(&log.voters),
            "members": log.members.iter().map(member).collect::<Vec<_>>(),
        }));
    }
    print::line(&format!("{} of {}", survey.node, survey.cluster))?;
    print::line(&format!("position  {}", position(survey)))?;
    print::line(&format!("voters    {}", list(&log.voters)))?;
    let row = |(id, node): (&NodeId, &raft::types::Node)| {
        let role = if log.voters.contains(id) {
            "voter"
        } else {
            "learner"
        };
        vec![id.to_string(), role.into(), node.address.clone()]
    };
    let rows: Vec<_> = log.members.iter().map(row).collect();
    print::table(&["MEMBER", "ROLE", "ADDRESS"], &rows)
}

/// Tells what is about to happen, and what only a person can know.
fn explain(survey: &Survey, plan: &Plan) {
    print::note(&format!(
        "{survivor} of {cluster}
  position  {position}
  voters    {voters}
  lost      {lost}
  follows   {kept}

{survivor} will be the only voter, with everything its log has up to this position. What others
acknowledged beyond it is gone. So first run `wrenn node recover --inspect` on every survivor, and
do this on the one with the highest position: the higher term counts, then the higher index.

The lost are shut out for ever. They must never run again with their old data: together they may
still be a quorum of the old cluster, serve it to whoever asks them, and run capsules that run
here too. Wipe them before they are started; they join as new nodes. Their capsules end, or are
placed anew if they asked for it. Nothing is deleted here; the old membership stays in the log.",
        survivor = plan.survivor,
        cluster = plan.cluster,
        position = position(survey),
        voters = list(&survey.log.voters),
        lost = addresses(&plan.lost),
        kept = addresses(&plan.kept),
    ));
}

fn ask(plan: &Plan) -> Result<(), CliError> {
    print::note(&format!(
        "\nTo go on, type the cluster's id ({}):",
        plan.cluster
    ));
    let mut typed = String::new();
    let read = std::io::stdin().lock().read_line(&mut typed);
    read.map_err(|err| CliError::from_error("read the answer", &err))?;
    if typed.trim() == plan.cluster.to_string() {
        return Ok(());
    }
    Err(CliError::new("not confirmed; nothing was changed").hint("--yes goes on without asking"))
}

fn position(survey: &Survey) -> String {
    let last = survey.log.last;
    format!("term {}, index {}", last.term, last.index)
}

fn addresses(nodes: &BTreeMap<NodeId, String>) -> String {
    if nodes.is_empty() {
        return "nobody".into();
    }
    let one = |(id, address): (&NodeId, &String)| format!("{id} ({address})");
    nodes.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn names<'a>(ids: impl IntoIterator<Item = &'a NodeId>) -> Vec<Value> {
    ids.into_iter().map(|id| id.to_string().into()).collect()
}
