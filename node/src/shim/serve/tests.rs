//! What a shim answers, with a VMM that is none.

use proto::units::{Mib, Stamp};

use super::*;
use crate::pager::memory::GuestMemory;
use crate::shim::dirty::AllPresent;
use crate::shim::save::Saveable;
use crate::vmm::fake::FakeVmm;
use crate::vmm::{Vmm, VmmExit};

const SOON: Duration = Duration::from_secs(10);

/// A server for `vmm`, with somebody to announce its end, as the main thread would.
fn serve(vmm: FakeVmm) -> (Arc<Server>, Arc<FakeVmm>) {
    let vmm = Arc::new(vmm);
    let guest = Saveable {
        vmm: vmm.clone(),
        frozen: Arc::default(),
        memory: Arc::new(GuestMemory::create(Mib(1)).expect("memfd")),
        dirty: Box::new(AllPresent),
        // Nothing can be written there.
        dir: "/nonexistent".into(),
    };
    let saver = Saver::new(guest, Stand::Running);
    let server = Server::new(wire::Status::default(), saver, None).expect("pipes");
    let (main, theirs) = (server.clone(), vmm.clone());
    thread::spawn(move || {
        if let Ok(Some(exit)) = theirs.wait(Instant::now() + SOON) {
            let asked = main.ending.asked();
            main.ending
                .announce(ExitRecord::new(exit, asked, String::new(), Stamp(0)));
        }
    });
    (server, vmm)
}

fn dial(server: &Arc<Server>) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    server.start(theirs).expect("a thread");
    ours.set_read_timeout(Some(SOON)).expect("set");
    ours
}

fn ask(stream: &mut UnixStream, call: Call) -> Option<Answer> {
    protocol::write(stream, &Request { call: Some(call) }).expect("sent");
    let answered: Option<Response> = protocol::read(stream).expect("readable");
    answered?.answer
}

fn stop(grace_ms: u32) -> Call {
    Call::Stop(wire::Stop { grace_ms })
}

fn save() -> Call {
    Call::Save(wire::Save {
        timeout_ms: 1000,
        since_resume: false,
    })
}

#[test]
fn a_guest_that_obeys_is_only_told_once() {
    let (server, vmm) = serve(FakeVmm::obedient());
    let answer = ask(&mut dial(&server), stop(5000));
    assert!(matches!(answer, Some(Answer::Exit(exit)) if exit.asked));
    assert_eq!(vmm.told(), ["shutdown"]);
}

#[test]
fn a_guest_that_ignores_its_button_is_ended_after_the_grace() {
    let (server, vmm) = serve(FakeVmm::stubborn());
    ask(&mut dial(&server), stop(1));
    assert_eq!(vmm.told(), ["shutdown", "quit"]);
}

#[test]
fn a_vmm_that_does_not_listen_is_killed() {
    let (server, vmm) = serve(FakeVmm::frozen());
    let answer = ask(&mut dial(&server), stop(0));
    assert!(matches!(answer, Some(Answer::Exit(exit)) if exit.signal == 9));
    assert_eq!(vmm.told(), ["quit", "kill"]);
}

#[test]
fn a_frozen_vmm_is_killed_without_being_told() {
    let (server, vmm) = serve(FakeVmm::stubborn());
    server.saver.frozen().set(true);
    let answer = ask(&mut dial(&server), stop(60_000));
    assert!(matches!(answer, Some(Answer::Exit(exit)) if exit.asked));
    assert_eq!(vmm.told(), ["kill"]);
}

#[test]
fn a_guest_that_stands_still_is_ended_without_the_grace() {
    let (server, vmm) = serve(FakeVmm::obedient());
    vmm.refuse(&["resume"]);
    let answer = ask(&mut dial(&server), save());
    assert!(matches!(answer, Some(Answer::Failure(_))), "{answer:?}");
    ask(&mut dial(&server), stop(60_000));
    assert_eq!(vmm.told(), ["resume", "quit"]);
}

#[test]
fn a_save_that_fails_is_told_in_words_and_the_status_says_where_the_guest_stands() {
    let (server, vmm) = serve(FakeVmm::stubborn());
    let stand = |answer| match answer {
        Some(Answer::Status(status)) => status.stand(),
        other => panic!("{other:?}"),
    };
    vmm.refuse(&["resume"]);
    let mut stream = dial(&server);
    let Some(Answer::Failure(why)) = ask(&mut stream, save()) else {
        panic!("there is no such directory");
    };
    assert!(why.message.contains("write the file"), "{}", why.message);
    let hello = || Call::Hello(wire::Hello {});
    assert_eq!(stand(ask(&mut stream, hello())), wire::Stand::Still);
    vmm.refuse(&[]);
    let thawed = ask(&mut stream, Call::Thaw(wire::Thaw { sealed: false }));
    assert_eq!(stand(thawed), wire::Stand::Running);
}

#[test]
fn who_waits_for_a_freeze_is_told_of_it_and_then_of_the_thaw() {
    let (server, _vmm) = serve(FakeVmm::stubborn());
    let wait = |frozen| Call::WaitFreeze(wire::WaitFreeze { frozen });
    let mut stream = dial(&server);
    server.saver.frozen().set(true);
    let answer = ask(&mut stream, wait(false));
    assert!(matches!(answer, Some(Answer::Status(it)) if it.frozen));
    let thawing = Arc::clone(&server);
    let thaw = thread::spawn(move || thawing.saver.frozen().set(false));
    let answer = ask(&mut stream, wait(true));
    assert!(matches!(answer, Some(Answer::Status(it)) if !it.frozen));
    thaw.join().expect("no panic");
}

#[test]
fn who_waits_for_a_freeze_is_told_of_the_end() {
    let (server, vmm) = serve(FakeVmm::stubborn());
    let mut stream = dial(&server);
    let request = Request {
        call: Some(Call::WaitFreeze(wire::WaitFreeze { frozen: false })),
    };
    protocol::write(&mut stream, &request).expect("sent");
    vmm.end(VmmExit::default());
    let answered: Option<Response> = protocol::read(&mut stream).expect("readable");
    let answer = answered.and_then(|it| it.answer);
    assert!(matches!(answer, Some(Answer::Failure(_))), "{answer:?}");
}

#[test]
fn an_end_nobody_asked_for_is_told_as_such() {
    let (server, vmm) = serve(FakeVmm::stubborn());
    let mut stream = dial(&server);
    vmm.end(VmmExit::default());
    let answer = ask(&mut stream, Call::WaitExit(wire::WaitExit {}));
    assert!(matches!(answer, Some(Answer::Exit(exit)) if !exit.asked));
    // And from then on the shim does not pass for alive.
    let hello = ask(&mut stream, Call::Hello(wire::Hello {}));
    assert!(matches!(hello, Some(Answer::Failure(_))), "{hello:?}");
}

#[test]
fn a_waiting_client_that_hangs_up_gives_its_place_back() {
    let (server, _vmm) = serve(FakeVmm::stubborn());
    for _ in 0..2 * MAX_CLIENTS {
        let mut stream = dial(&server);
        let request = Request {
            call: Some(Call::WaitExit(wire::WaitExit {})),
        };
        protocol::write(&mut stream, &request).expect("sent");
        drop(stream);
        let deadline = Instant::now() + SOON;
        while server.lock().connected > 0 {
            assert!(Instant::now() < deadline, "places are lost");
            thread::yield_now();
        }
    }
}

#[test]
fn clients_past_the_limit_are_let_go() {
    let (server, _vmm) = serve(FakeVmm::stubborn());
    let crowd: Vec<UnixStream> = (0..MAX_CLIENTS).map(|_| dial(&server)).collect();
    let mut late = dial(&server);
    let answered = protocol::read::<Response>(&mut late);
    assert!(matches!(answered, Ok(None)), "{answered:?}");
    drop(crowd);
}
