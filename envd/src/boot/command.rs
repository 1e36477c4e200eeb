//! Shell lines that the agent runs of its own accord: the one given at start, and repairs.

use std::sync::Arc;

use crate::agent::Agent;
use crate::boot::cgroup::Group;
use crate::log;
use crate::log::chain;
use crate::process::launch::Launch;
use crate::process::live::CommandLine;

/// Runs `line` in a shell as the default user, with its output dropped.
pub fn start(agent: &Arc<Agent>, line: &str) {
    start_as(agent, None, line);
}

/// Runs `line` in a shell as `user`, or as the default one, with its output dropped.
pub fn start_as(agent: &Arc<Agent>, user: Option<&str>, line: &str) {
    let user = match agent.user(user) {
        Ok(user) => user,
        Err(err) => return log!("start '{line}': {}", chain(&err)),
    };
    let command = CommandLine {
        cmd: "/bin/sh".to_owned(),
        args: vec!["-c".to_owned(), line.to_owned()],
        ..CommandLine::default()
    };
    let env = agent
        .settings()
        .global
        .for_process(agent.path(), &user, &command.envs);
    let cwd = if user.home.is_dir() {
        user.home.clone()
    } else {
        "/".into()
    };
    let launch = Launch {
        command,
        tag: None,
        user,
        cwd,
        env,
        stdin: false,
        terminal: None,
        place: agent.surroundings.groups.place(Group::User),
        deadline: None,
    };
    if let Err(err) = launch.start(&agent.processes) {
        log!("start '{line}': {}", chain(&err));
    }
}
