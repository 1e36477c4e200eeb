//! Compiles `wire/*.proto` without a `protoc` binary: protox parses, prost and (for the guest
//! agent's Connect services) connectrpc generate.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

/// Messages that only our own processes exchange or write to disk.
const OWN: &[&str] = &[
    "wire/cluster.proto",
    "wire/mesh.proto",
    "wire/raft.proto",
    "wire/raftlog.proto",
    "wire/relay.proto",
    "wire/shim.proto",
];
/// The guest agent's services, named as in the descriptor set.
const ENVD: [&str; 2] = ["process.proto", "filesystem.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=wire");
    let own = protox::compile(OWN, ["wire"])?;
    // The same message is always the same bytes: rows can be compared, and histories replayed.
    prost_build::Config::new()
        .btree_map(["."])
        .compile_fds(own)?;

    if env::var_os("CARGO_FEATURE_ENVD").is_some() {
        let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
        let mut compiler = protox::Compiler::new(["wire/envd"])?;
        compiler.include_imports(true).include_source_info(true);
        compiler.open_files(ENVD)?;
        let set = out.join("envd.fds");
        fs::write(&set, compiler.encode_file_descriptor_set())?;
        connectrpc_build::Config::new()
            .descriptor_set(set)
            .files(&ENVD)
            .emit_rerun_directives(false)
            .include_file("envd.rs")
            .compile()?;
    }
    Ok(())
}
