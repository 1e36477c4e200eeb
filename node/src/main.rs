//! The `wrenn` binary: arguments in, exit code out.

use std::env;
use std::ffi::OsString;
use std::process::ExitCode;

use wrenn_node::shim;

fn main() -> ExitCode {
    let args: Vec<OsString> = env::args_os().skip(1).collect();
    // First of all, before anything allocates or starts a thread: a shim forks and stays small.
    if let Some((command, rest)) = args.split_first()
        && command == shim::main::COMMAND
    {
        return shim::main::main(rest);
    }
    ExitCode::SUCCESS
}
