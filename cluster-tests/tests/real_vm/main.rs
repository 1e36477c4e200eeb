//! One node, real guests: what a person does with a capsule, and everything that goes wrong.
//!
//! Needs root, QEMU and the guest images; `deploy/test real-vm` sees to all of it. Every world
//! checks at its end that it left nothing on the host.

mod life;
