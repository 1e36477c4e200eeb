//! What a shim refuses, and that nobody else notices: bad frames, second shims, bad specs, silence.
//!
//! Ignored unless asked for: needs QEMU and the guest kernel (see `shim_support`).

mod shim_support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::signal::Signal;
use shim_support::{SOON, Sandbox, WRENN, eventually, runs, signal};
use wrenn_node::shim::client::{self, connect};
use wrenn_node::shim::discover::{FoundState, discover};
use wrenn_node::shim::error::SpawnShimError;
use wrenn_node::shim::files::SocketPath;
use wrenn_node::shim::sweep::kill_leftovers;
use wrenn_node::vmm::NetworkSpec;

fn dial(sandbox: &Sandbox) -> UnixStream {
    let path = SocketPath::new(&sandbox.dir).expect("dir");
    let stream = UnixStream::connect(path.as_path()).expect("listens");
    stream.set_read_timeout(Some(SOON)).expect("set");
    stream
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_client_that_sends_nonsense_loses_its_own_connection_only() {
    let sandbox = Sandbox::new();
    let shim = sandbox.start("test.deaf").await;
    let mut patient = dial(&sandbox);
    let cases: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xff; 64],
        &[3, 0, 0, 0, 0xff, 0xff, 0xff],
        &[200, 0, 0, 0, 1],
    ];
    for bytes in cases {
        let mut stream = dial(&sandbox);
        stream.write_all(bytes).expect("accepted");
        stream
            .shutdown(std::net::Shutdown::Write)
            .expect("half closed");
        let mut rest = Vec::new();
        let _reset_or_end = stream.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{bytes:?} was answered with {rest:?}");
        shim.status().await.expect("others are served");
    }
    // An empty message is a request of a later release: refused in words, and the line stays.
    patient.write_all(&[0; 4]).expect("sent");
    let mut answer = [0; 4];
    patient.read_exact(&mut answer).expect("answered");
    assert_ne!(answer, [0; 4]);
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn idle_clients_past_the_limit_are_let_go_and_the_rest_is_served_again() {
    let sandbox = Sandbox::new();
    let shim = sandbox.start("test.deaf").await;
    let crowd: Vec<UnixStream> = (0..40).map(|_| dial(&sandbox)).collect();
    drop(crowd);
    let mut served = false;
    for _ in 0..100 {
        served |= shim.status().await.is_ok();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(served);
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_second_shim_of_a_directory_is_refused_and_harms_nothing() {
    let sandbox = Sandbox::new();
    let shim = sandbox.start("test.deaf").await;
    let err = client::spawn(&sandbox.dir, &sandbox.spec(""), WRENN.as_ref())
        .await
        .expect_err("refused");
    let SpawnShimError::GaveUp { reason } = err else {
        panic!("{err}");
    };
    assert!(reason.contains("another shim owns"), "{reason}");
    let again = connect(&sandbox.dir).await.expect("the first answers");
    assert_eq!(again.known_status(), shim.known_status());
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_guest_that_cannot_be_built_is_refused_in_words_and_leaves_nothing() {
    let sandbox = Sandbox::new();
    let good = sandbox.spec("");
    let mut no_kernel = good.clone();
    no_kernel.vmm.kernel = "/nonexistent/vmlinuz".into();
    let mut no_disk = good.clone();
    no_disk.vmm.root_disk = Some(sandbox.dir.join("none.qcow2"));
    let mut no_netns = good.clone();
    no_netns.vmm.network = Some(NetworkSpec {
        netns: "/run/netns/nonexistent".into(),
        tap: "tap0".into(),
        mac: [2, 0, 0, 0, 0, 1],
    });
    let mut no_cpus = good.clone();
    no_cpus.vmm.vcpus = 0;
    let mut no_program = good;
    no_program.vmm.program = "/nonexistent/qemu".into();
    for (spec, word) in [
        (no_kernel, "/nonexistent/vmlinuz"),
        (no_disk, "none.qcow2"),
        (no_netns, "/run/netns/nonexistent"),
        (no_cpus, "vcpus must be between 1 and 64, not 0"),
        (no_program, "/nonexistent/qemu"),
    ] {
        let err = client::spawn(&sandbox.dir, &spec, WRENN.as_ref())
            .await
            .expect_err("refused");
        assert!(err.to_string().contains(word), "{err}");
        assert!(sandbox.file("shim.log").contains(word));
        let left = kill_leftovers(&sandbox.dir).expect("swept");
        assert!(left.is_empty(), "{word}: {left:?} were left");
        let found = discover(sandbox.parent()).await.expect("listed");
        assert!(
            matches!(found[0].state, FoundState::NeverStarted),
            "{found:?}"
        );
    }
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_shim_that_does_not_answer_is_swept_with_its_vmm() {
    let sandbox = Sandbox::new();
    let bystander = Sandbox::new();
    let status = sandbox.start("test.deaf").await.known_status().clone();
    let other = bystander.start("test.deaf").await;
    signal(status.shim_pid, Signal::SIGSTOP);
    let found = discover(sandbox.parent()).await.expect("listed");
    assert!(
        matches!(found[0].state, FoundState::Dead { .. }),
        "{found:?}"
    );
    let killed = kill_leftovers(&sandbox.dir).expect("swept");
    assert!(killed.contains(&status.shim_pid), "{killed:?}");
    assert!(eventually(SOON, || !runs(status.vmm_pid)), "the VMM stays");
    assert!(
        kill_leftovers(&sandbox.dir)
            .expect("swept again")
            .is_empty()
    );
    other
        .status()
        .await
        .expect("another sandbox is left in peace");
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_path_longer_than_a_socket_address_works() {
    let sandbox = Sandbox::below(&"a-long-name/".repeat(12));
    assert!(sandbox.dir.as_os_str().len() > 108);
    let shim = sandbox.start("test.deaf").await;
    shim.status().await.expect("answers");
    shim.stop(Duration::ZERO).await.expect("stopped");
}
