//! Watching directories: what happens in them, told as it happens or kept until asked for.
//!
//! ```text
//! kernel queue (inotify) ──> watcher: names, new directories, entries ──> buffer ─┬─> WatchDir stream
//!                                                                                └─> GetWatcherEvents
//! ```
//!
//! | file | what it answers for |
//! |---|---|
//! | [`event`] | what one event of the kernel comes to (pure) |
//! | [`table`] | which directory each kernel watch stands for (pure) |
//! | [`watcher`] | one watched directory: reads the kernel's queue, follows new directories |
//! | [`watching`] | the same from the side of the runtime: waits, reads where it may block |
//! | [`polled`] | watchers that are asked for their events by name |
//! | [`service`] | the four calls of `filesystem.Filesystem` |
//!
//! The kernel queues an event before the call that caused it returns, so whoever asks after a write
//! finds the write. Nothing is lost in silence: where the kernel's queue or ours runs over, the
//! watcher delivers what it has, and then says so for as long as it exists.

pub mod event;
pub mod polled;
pub mod service;
pub mod table;
pub mod watcher;
pub mod watching;
