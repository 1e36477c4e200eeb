//! Disks that are full, and disks that are slow.
//!
//! A full disk is a small one with a file that takes the rest. The log's segments are filled with
//! zeroes when they are made, so a full disk would show only after 64 MiB of entries; on file systems
//! that write elsewhere what is overwritten it shows at once. That is what holes dug into the segment
//! make of any file system.
//!
//! A slow disk is a file system of its own on a loop device that the kernel's block controller holds to
//! so many operations a second, for this daemon alone.

mod full;
mod slow;
