use std::sync::Barrier;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{self, Receiver};

use proptest::prelude::*;
use proto::units::Mib;

use super::*;
use crate::pager::memory::{GuestMemory, sealed_memfd};
use crate::pager::region::Region;
use crate::pager::source::{Asked, SourceError, Whereabouts};
use crate::store::chunk::ChunkId;
use crate::vmm::cloud_hypervisor::offload::codec::{
    Command, RANGE_BYTES as THEIR_RANGE, Request, Status, encode_answer,
};

const MEMORY: Mib = Mib(1);
/// The window that the image has nothing in.
const HOLE: u64 = 3;

/// Every byte is the number of its window, and one window is a hole.
struct Numbered;

impl PageSource for Numbered {
    fn whereabouts(&self, _: WindowIndex) -> Whereabouts {
        Whereabouts::Here
    }

    fn read_here(&self, window: WindowIndex, scratch: &mut Scratch) -> Option<Content> {
        if window.0 == HOLE {
            return Some(Content::Hole);
        }
        scratch.window.fill(byte_of(window));
        Some(Content::Bytes)
    }

    fn ask_ahead(&self, _: WindowIndex) -> Option<Asked> {
        None
    }

    fn read(
        &self,
        window: WindowIndex,
        _: Option<Asked>,
        scratch: &mut Scratch,
    ) -> Result<Content, SourceError> {
        Ok(self.read_here(window, scratch).expect("all is here"))
    }
}

/// As [`Numbered`], but its first window cannot be had for some `times`. Whoever tries first waits
/// before that for the test, twice.
struct Spoilt {
    times: usize,
    reads: AtomicUsize,
    gate: Arc<Barrier>,
}

impl PageSource for Spoilt {
    fn whereabouts(&self, window: WindowIndex) -> Whereabouts {
        Numbered.whereabouts(window)
    }

    fn read_here(&self, window: WindowIndex, scratch: &mut Scratch) -> Option<Content> {
        (window.0 > 0).then(|| Numbered.read_here(window, scratch))?
    }

    fn ask_ahead(&self, _: WindowIndex) -> Option<Asked> {
        None
    }

    fn read(
        &self,
        window: WindowIndex,
        asked: Option<Asked>,
        scratch: &mut Scratch,
    ) -> Result<Content, SourceError> {
        let earlier = self.reads.fetch_add(1, Ordering::Relaxed);
        if earlier == 0 {
            self.gate.wait();
            self.gate.wait();
        }
        if earlier < self.times {
            return Err(SourceError::Gone {
                chunk: ChunkId::of(b"spoilt"),
                reason: "no holder".to_owned(),
            });
        }
        Numbered.read(window, asked, scratch)
    }
}

fn byte_of(window: WindowIndex) -> u8 {
    u8::try_from(window.0 + 1).expect("few windows")
}

/// A VMM that asks.
struct World {
    memory: GuestMemory,
    states: OwnedFd,
    stream: UnixStream,
    pagers: UnixStream,
}

/// As Cloud Hypervisor places it: a part below a gap, the rest above.
const SLOTS: [Slot; 2] = [
    Slot {
        gpa: 0,
        bytes: 512 << 10,
        image: 0,
    },
    Slot {
        gpa: 4 << 30,
        bytes: 512 << 10,
        image: 512 << 10,
    },
];

impl World {
    fn new() -> Self {
        let (stream, pagers) = UnixStream::pair().expect("a pair");
        let patience = Some(Duration::from_secs(10));
        stream.set_read_timeout(patience).expect("set");
        let pages = Region::new(MEMORY).pages();
        Self {
            memory: GuestMemory::create(MEMORY).expect("memory"),
            states: sealed_memfd("test", pages).expect("states"),
            stream,
            pagers,
        }
    }

    /// A pager that is not running yet.
    fn answerer(&self) -> Arc<Answerer> {
        self.answerer_from(Numbered, Box::new(|err| panic!("{err}")))
    }

    /// The same, from an image that is spoilt `times` times, what the first to read it waits at, and
    /// where the end is told.
    fn spoilt(&self, times: usize) -> (Arc<Answerer>, Arc<Barrier>, Receiver<ServeError>) {
        let gate = Arc::new(Barrier::new(2));
        let source = Spoilt {
            times,
            reads: AtomicUsize::new(0),
            gate: Arc::clone(&gate),
        };
        let (tell, told) = mpsc::channel();
        let failed = Box::new(move |err| drop(tell.send(err)));
        (self.answerer_from(source, failed), gate, told)
    }

    fn answerer_from(&self, source: impl PageSource + 'static, failed: OnFailure) -> Arc<Answerer> {
        let table = StateTable::map(&self.states, Region::new(MEMORY)).expect("a table");
        let questions = Questions {
            stream: self.pagers.try_clone().expect("a clone"),
            slots: SLOTS.to_vec(),
        };
        let memory = self.memory.as_fd();
        let (table, source) = (Arc::new(table), Box::new(source));
        let made = Answerer::new(questions, memory, table, source, failed);
        Arc::new(made.expect("made"))
    }

    fn ask(&self, gpa: u64) {
        (&self.stream)
            .write_all(&question(gpa, PAGE_BYTES))
            .expect("asked");
        self.await_answer();
    }

    fn await_answer(&self) {
        let mut answer = [0; ANSWER_BYTES];
        (&self.stream).read_exact(&mut answer).expect("answered");
        assert_eq!(answer, encode_answer(Status::Ok));
    }

    fn page(&self, page: u64) -> [u8; 4096] {
        let mut bytes = [0xff; 4096];
        let memory = File::from(self.memory.as_fd().try_clone_to_owned().expect("a clone"));
        memory
            .read_exact_at(&mut bytes, page * PAGE_BYTES)
            .expect("read");
        bytes
    }
}

/// As Cloud Hypervisor writes it.
fn question(gpa: u64, bytes: u64) -> [u8; QUESTION_BYTES] {
    let mut question = [0; QUESTION_BYTES];
    let header = Request::new(Command::PageFault, THEIR_RANGE).encode();
    question[..16].copy_from_slice(&header);
    question[16..24].copy_from_slice(&gpa.to_le_bytes());
    question[24..].copy_from_slice(&bytes.to_le_bytes());
    question
}

#[test]
fn a_page_is_there_before_its_question_is_answered() {
    let world = World::new();
    let answerer = world.answerer();
    answerer
        .spawn("answer", |it| it.answer_all(false))
        .expect("started");
    for (gpa, page) in [(0x2000, 2), (4 << 30, 128), ((4 << 30) + 0x7_f000, 255)] {
        world.ask(gpa);
        let window = PageIndex(page).window();
        assert_eq!(world.page(page), [byte_of(window); 4096]);
    }
    // Nobody wrote ahead.
    let windows = 3 * WINDOW_BYTES;
    assert_eq!(world.memory.resident_bytes().expect("told"), windows);
}

#[test]
fn a_hole_is_made_only_where_the_guest_insists() {
    let world = World::new();
    let answerer = world.answerer();
    answerer
        .spawn("answer", |it| it.answer_all(false))
        .expect("started");
    let gpa = HOLE * WINDOW_BYTES;
    world.ask(gpa);
    assert_eq!(world.memory.resident_bytes().expect("told"), 0);
    world.ask(gpa);
    assert_eq!(world.memory.resident_bytes().expect("told"), PAGE_BYTES);
    assert_eq!(world.page(gpa / PAGE_BYTES), [0; 4096]);
}

#[test]
fn a_page_that_the_guest_has_written_is_left_alone_and_one_that_it_gave_back_is_zero() {
    let world = World::new();
    let answerer = world.answerer();
    answerer
        .spawn("answer", |it| it.answer_all(false))
        .expect("started");
    world.ask(0);
    nix::sys::uio::pwrite(&world.memory, &[0xaa; 4096], 0).expect("written");
    world.ask(0);
    assert_eq!(world.page(0), [0xaa; 4096]);
    let punch = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
        | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    nix::fcntl::fallocate(world.memory.as_fd(), punch, 0, 4096).expect("punched");
    world.ask(0);
    assert_eq!(world.page(0), [0; 4096]);
    assert!(answerer.exists(PageIndex(0)).expect("told"), "it was made");
}

#[test]
fn all_but_the_holes_is_written_ahead() {
    let world = World::new();
    let answerer = world.answerer();
    answerer.start(false).expect("started");
    await_it(|| answerer.pushing_done());
    let filled = MEMORY.bytes() - WINDOW_BYTES;
    assert_eq!(world.memory.resident_bytes().expect("told"), filled);
}

/// The one before may have died before it took its question, or after.
#[test]
fn a_pager_that_takes_over_answers_what_its_predecessor_left() {
    let world = World::new();
    (&world.stream)
        .write_all(&question(0x1000, PAGE_BYTES))
        .expect("asked");
    world.answerer().start(true).expect("started");
    world.await_answer();
    assert_eq!(world.page(1), [1; 4096]);

    let world = World::new();
    world.answerer().start(true).expect("started");
    // Its predecessor has taken the question.
    world.await_answer();
    world.ask(0x3000);
    assert_eq!(world.page(3), [1; 4096]);
}

/// Asks for a page that a thread has claimed which writes ahead, and lets that thread fail.
fn fail_ahead(world: &World, answerer: &Arc<Answerer>, gate: &Barrier) {
    answerer.start(false).expect("started");
    gate.wait();
    (&world.stream)
        .write_all(&question(0x1000, PAGE_BYTES))
        .expect("asked");
    await_it(|| answerer.counters().faults.load(Ordering::Relaxed) > 0);
    gate.wait();
}

fn await_it(is_so: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < end);
        thread::sleep(NAP);
    }
}

/// The guest would read zeros where it has bytes.
#[test]
fn a_page_that_was_given_up_while_it_was_waited_for_is_no_hole() {
    let world = World::new();
    let (answerer, gate, _told) = world.spoilt(1);
    fail_ahead(&world, &answerer, &gate);
    world.await_answer();
    assert_eq!(world.page(1), [1; 4096]);
    await_it(|| answerer.pushing_done());
}

#[test]
fn a_page_that_cannot_be_had_ends_the_guest_and_is_never_said_to_be_there() {
    let world = World::new();
    let (answerer, gate, told) = world.spoilt(2);
    fail_ahead(&world, &answerer, &gate);
    let err = told.recv_timeout(Duration::from_secs(10)).expect("told");
    assert!(matches!(err, ServeError::Source(_)), "{err}");
    assert!(nothing_asked(&world.stream), "it was answered");
    assert!(!answerer.exists(PageIndex(1)).expect("told"));
    await_it(|| answerer.pushed().ended == PUSHERS);
    assert!(!answerer.pushing_done(), "a window is left");
}

/// Nobody knows which page its predecessor owes an answer for.
#[test]
fn a_pager_that_takes_over_says_nothing_before_it_has_what_could_not_be_written_ahead() {
    let world = World::new();
    let (answerer, gate, _told) = world.spoilt(1);
    answerer.start(true).expect("started");
    gate.wait();
    assert!(nothing_asked(&world.stream), "it was answered");
    gate.wait();
    world.await_answer();
    assert_eq!(world.page(0), [1; 4096]);
    assert!(answerer.pushing_done());

    let world = World::new();
    let (answerer, gate, told) = world.spoilt(2);
    answerer.start(true).expect("started");
    gate.wait();
    gate.wait();
    let err = told.recv_timeout(Duration::from_secs(10)).expect("told");
    assert!(matches!(err, ServeError::Source(_)), "{err}");
    assert!(nothing_asked(&world.stream), "it was answered");
}

#[test]
fn a_vmm_that_needs_no_more_is_left() {
    let world = World::new();
    let answerer = world.answerer();
    drop(world.stream);
    answerer.answer_all(false).expect("it ends");
}

#[test]
fn what_is_no_question_about_a_page_of_the_guest_is_refused() {
    let of = |gpa, bytes| page_in(&question(gpa, bytes), &SLOTS);
    assert_eq!(of(0x7_f000, 4096), Ok(PageIndex(127)));
    assert_eq!(of((4 << 30) + 4096, 4096), Ok(PageIndex(129)));
    for (gpa, bytes) in [
        (0x8_0000, 4096),
        (u64::MAX - 4095, 4096),
        (1, 4096),
        (0, 2 << 20),
    ] {
        assert!(of(gpa, bytes).is_err(), "{gpa:#x}");
    }
    let mut other = question(0, 4096);
    other[0] = 3;
    assert!(page_in(&other, &SLOTS).is_err());
}

proptest! {
    /// Whatever is asked: a page of the guest, or a refusal.
    #[test]
    fn no_question_leads_out_of_the_guest(bytes: [u8; QUESTION_BYTES], gpa: u64) {
        let region = Region::new(MEMORY);
        for question in [bytes, question(gpa & !4095, 4096)] {
            if let Ok(page) = page_in(&question, &SLOTS) {
                prop_assert!(page.0 < region.pages());
            }
        }
    }
}
