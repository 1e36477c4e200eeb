//! The daemon's half of asking for chunks, as far as a pager sees it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use tokio::net::UnixListener;
use tokio::sync::oneshot;
use wrenn_node::pager::ask::{self, Answer, Question};
use wrenn_node::pager::page_map::{Encoding, Place};
use wrenn_node::store::chunk::ChunkId;

use super::Image;

/// What the daemon says.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    Finds,
    SaysNotNow,
    SaysGone,
    /// It hears, and never answers.
    SaysNothing,
}

/// A daemon on a thread of its own. Dropping it is its death: connections break.
pub struct Daemon {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    asked: Arc<Mutex<Vec<Question>>>,
}

impl Daemon {
    /// Answers on `pager.sock` in `dir` for what `image` lacks.
    pub fn start(dir: &Path, image: &Image, mood: Mood) -> Self {
        let socket = dir.join("pager.sock");
        let _old = fs::remove_file(&socket);
        let places = Arc::new(places(&dir.join("fetched.pack"), image));
        let asked = Arc::new(Mutex::default());
        let (stop, stopped) = oneshot::channel();
        let seen = Arc::clone(&asked);
        let (up, is_up) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                let listener = UnixListener::bind(socket).expect("listening");
                up.send(()).expect("somebody waits");
                tokio::select! {
                    () = accept(listener, places, seen, mood) => {}
                    _ = stopped => {}
                }
            });
        });
        is_up.recv().expect("it is up");
        Self {
            stop: Some(stop),
            thread: Some(thread),
            asked,
        }
    }

    pub fn asked(&self) -> Vec<Question> {
        self.asked.lock().expect("whole").clone()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

fn places(pack: &PathBuf, image: &Image) -> HashMap<ChunkId, Place> {
    let mut packed = Vec::new();
    let places = image.elsewhere.iter().map(|(id, bytes)| {
        let place = Place {
            pack: pack.as_path().into(),
            offset: packed.len() as u64,
            stored_bytes: u32::try_from(bytes.len()).expect("small"),
            encoding: Encoding::Raw,
        };
        packed.extend(bytes);
        (*id, place)
    });
    let places = places.collect();
    fs::write(pack, packed).expect("written");
    places
}

async fn accept(
    listener: UnixListener,
    places: Arc<HashMap<ChunkId, Place>>,
    asked: Arc<Mutex<Vec<Question>>>,
    mood: Mood,
) {
    let mut served = tokio::task::JoinSet::new();
    loop {
        let (mut stream, _) = listener.accept().await.expect("a pager");
        let (places, asked) = (Arc::clone(&places), Arc::clone(&asked));
        served.spawn(async move {
            let find = |question: Question| {
                let place = places.get(&question.chunk).cloned();
                asked.lock().expect("whole").push(question);
                async move {
                    match (mood, place) {
                        (Mood::Finds, Some(place)) => Answer::At(place),
                        (Mood::Finds, None) => Answer::Gone("never heard of it".to_owned()),
                        (Mood::SaysNotNow, _) => Answer::NotNow("no holder answers".to_owned()),
                        (Mood::SaysGone, _) => Answer::Gone("no holder is left".to_owned()),
                        (Mood::SaysNothing, _) => std::future::pending().await,
                    }
                }
            };
            let _broken = ask::serve(&mut stream, find).await;
        });
    }
}
