//! The template of the SDK's code runner, built as its users build it: by our builder, from the recipe that
//! comes with Wrenn and what `deploy/clients code-runner` has brought.

use std::process::Command;
use std::time::Instant;

use wrenn_cluster_tests::clients::context_of;
use wrenn_cluster_tests::world::{World, wrenn};

/// Its name, which the SDK knows.
const NAME: &str = "code-runner-beta";
/// Memory of the guest, in MiB: a server and a kernel take 150 of them.
const MEMORY_MB: &str = "512";

/// Builds it, unless what it is built from is not there: then that is told, and so is it by whoever would
/// have used it.
pub(crate) fn build(world: &World) {
    let Some(context) = context_of("code-runner") else {
        return;
    };
    let began = Instant::now();
    let built = Command::new(wrenn())
        .args(["template", "build", "--skip-pre-post", "-t", NAME])
        .args(["--vcpus", "2", "--memory", MEMORY_MB])
        .arg(context)
        .env("WRENN_BASE_URL", world.url())
        .env("WRENN_API_KEY", world.key())
        .output()
        .expect("the command runs");
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{said}\n{}", world.log());
    println!("{NAME} was built in {} s", began.elapsed().as_secs());
}
