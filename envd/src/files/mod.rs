//! Files of the guest: transfer over plain HTTP, and the service for everything else.
//!
//! | file | what it answers for |
//! |---|---|
//! | [`download`] | `GET /files`: encodings, ranges, conditions |
//! | [`upload`] | `POST /files`: multipart and plain bodies, compressed or not |
//! | [`compose`] | `POST /files/compose`: several files become one |
//! | [`write`] | one file written in place, piece by piece, owned by its user |
//! | [`reach`] | coming to a file with its user's rights, and along no link that leads astray |
//! | [`metadata`] | the user's key-value pairs, kept as extended attributes |
//! | [`service`] | `filesystem.Filesystem`, over [`tree`] (list, make, move, remove) and [`entry`] |
//! | [`range`] [`encoding`] [`content`] | rules of HTTP; pure |
//!
//! Nothing here holds a whole file: memory per transfer is bounded by a few pieces, whatever the
//! file's size. A crash in the middle of an upload leaves a shorter file, never another's bytes.

pub mod compose;
pub mod content;
pub mod download;
pub mod encoding;
pub mod entry;
pub mod inflate;
pub mod metadata;
pub mod range;
pub mod reach;
pub mod request;
pub mod service;
pub mod tree;
pub mod upload;
pub mod write;
