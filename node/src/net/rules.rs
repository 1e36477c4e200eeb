//! Who may talk to whom: the rules in a slot's namespace, and those on the host.
//!
//! # Which rule lives where, and why
//!
//! **In the namespace** (`table inet wrenn`): all that can be said without knowing the host. The
//! guest cannot change it, it lives as long as the namespace, and neither the death of the
//! daemon nor `nft flush ruleset` on the host (a firewall's reload does that) opens it:
//! spoofed sources, IPv6, every denied range, other slots, and who may dial the guest.
//!
//! **On the host** (`table inet wrenn_<tag>`, one per node): what only the host knows. Its own
//! addresses, private or public; that nothing is forwarded into a slot; masquerading. No element of it
//! names a single slot (interfaces match by prefix), so making a slot does not touch it, a crash
//! leaves nothing in it, and the death of the daemon changes nothing. The pool puts it back
//! within seconds if someone flushes it; until then guests have no way out, as nothing
//! masquerades them, but can reach sockets of the host that listen on a public address.
//!
//! # What a guest may open, in this order (first match decides)
//!
//! 1. replies to what the host opened: yes
//! 2. any slot of any node on this host, that is [`SLOT_NET`]: no, whatever the operator allows
//! 3. `egress_allow`: yes, all ports. It may name private ranges, and addresses of the host
//!    itself; for the latter it opens exactly that address, on the host as it is, with all
//!    that listens there. It never opens other slots nor loopback, nor anything to IPv6.
//! 4. the ranges of [`DENIED`]: no
//! 5. any address of the host: no, even where a port of it is forwarded elsewhere
//! 6. everything else: yes, from the host's address
//!
//! What is refused is dropped in silence. A change of `egress_allow` reaches new slots, and
//! running ones when the pool adopts them at the next start of the daemon; connections that
//! were open stay open.
//!
//! # Beside other firewalls
//!
//! Each table decides for itself: a packet has to pass every one of them, so our accepts never
//! override the drops of others. **Docker sets the policy of `ip filter FORWARD` to drop**, and so may ufw and
//! firewalld; then guests have no way out. `doctor` should look for a base chain on the
//! forward hook with policy drop in a table that is not ours, and name the remedy: accept
//! `w<tag>-*` both ways there (for docker: `iptables -I DOCKER-USER -i w<tag>-+ -j ACCEPT`, and
//! the same with `-o`). It should also check that `net.ipv4.ip_forward` is 1 and that
//! `198.18.0.0/15` is routed nowhere else.

use std::io;

use super::cidr::{Cidr, merged};
use super::nft::{self, Batch, Hook, Name, Term, Verdict};
use super::slot::{GUEST_ADDR, SLOT_NET, Slot, SlotTag, TAP, UPLINK};

/// Where no guest may open a connection unless the operator allows it.
pub const DENIED: [Cidr; 11] = [
    Cidr::new([0, 0, 0, 0], 8),      // this network
    Cidr::new([10, 0, 0, 0], 8),     // private
    Cidr::new([100, 64, 0, 0], 10),  // carriers and overlay networks
    Cidr::new([127, 0, 0, 0], 8),    // loopback
    Cidr::new([169, 254, 0, 0], 16), // link-local, metadata services
    Cidr::new([172, 16, 0, 0], 12),  // private
    Cidr::new([192, 0, 0, 0], 24),   // protocol assignments
    Cidr::new([192, 168, 0, 0], 16), // private
    SLOT_NET,                        // other slots, and benchmarking
    Cidr::new([224, 0, 0, 0], 4),    // multicast
    Cidr::new([240, 0, 0, 0], 4),    // reserved, broadcast
];

/// The table in every slot's namespace.
const NAMESPACE_TABLE: &str = "wrenn";
/// Names of the two sets; their numbers only tell them apart within one transaction.
const ALLOWED_SET: (&str, u32) = ("allowed", 1);
const DENIED_SET: (&str, u32) = ("denied", 2);

const DROP: Term<'_> = Term::Do(Verdict::Drop);
const ACCEPT: Term<'_> = Term::Do(Verdict::Accept);

/// Puts the rules of `slot` in force in the calling thread's namespace, which is new.
///
/// Not the same as replacing nothing: a transaction that removes something makes the kernel wait
/// for all its processors, which would make 20 ms of a slot's 2.
pub(super) fn install_in_namespace(slot: &Slot, allow: &[Cidr]) -> io::Result<()> {
    namespace_rules(Batch::creating(NAMESPACE_TABLE), slot, allow).commit()
}

/// Replaces the rules of `slot` in the calling thread's namespace, without a gap.
pub(super) fn renew_in_namespace(slot: &Slot, allow: &[Cidr]) -> io::Result<()> {
    namespace_rules(Batch::replacing(NAMESPACE_TABLE), slot, allow).commit()
}

fn namespace_rules(mut batch: Batch, slot: &Slot, allow: &[Cidr]) -> Batch {
    batch.set(ALLOWED_SET.0, ALLOWED_SET.1, &merged(allow));
    batch.set(DENIED_SET.0, DENIED_SET.1, &merged(&DENIED));
    namespace_guard(&mut batch);
    namespace_forward(&mut batch, slot);
    namespace_nat(&mut batch, slot);
    namespace_own(&mut batch);
    batch
}

/// Nothing from the guest but IPv4 from its own address, before it costs a connection entry.
fn namespace_guard(batch: &mut Batch) {
    let tap = Term::From(Name::Is(TAP));
    batch.chain("guard", Hook::PreroutingRaw, Verdict::Accept);
    batch.rule("guard", "IPv4 only", &[Term::NotIpv4, Term::Count, DROP]);
    batch.rule(
        "guard",
        "spoofed source",
        &[tap, Term::NotSource(GUEST_ADDR), Term::Count, DROP],
    );
}

fn namespace_forward(batch: &mut Batch, slot: &Slot) {
    let out = [Term::From(Name::Is(TAP)), Term::To(Name::Is(UPLINK))];
    let outward = |more: &[Term<'static>]| [&out[..], more].concat();
    let dialled = [
        Term::From(Name::Is(UPLINK)),
        Term::To(Name::Is(TAP)),
        Term::Source(slot.host_addr),
        Term::Translated,
        ACCEPT,
    ];
    batch.chain("forward", Hook::Forward, Verdict::Drop);
    let mut rule = |why, terms: &[Term<'_>]| batch.rule("forward", why, terms);
    rule("replies", &[Term::Reply, ACCEPT]);
    rule("no connection", &[Term::Invalid, DROP]);
    rule("the host dials the guest", &dialled);
    rule(
        "other slots",
        &outward(&[Term::DestinationIn(SLOT_NET), Term::Count, DROP]),
    );
    rule(
        "allowed by the operator",
        &outward(&[Term::DestinationInSet(ALLOWED_SET.0), ACCEPT]),
    );
    rule(
        "private and special ranges",
        &outward(&[Term::DestinationInSet(DENIED_SET.0), Term::Count, DROP]),
    );
    rule("the internet", &outward(&[ACCEPT]));
}

fn namespace_nat(batch: &mut Batch, slot: &Slot) {
    batch.chain("dialled", Hook::PreroutingNat, Verdict::Accept);
    batch.rule(
        "dialled",
        "all ports are the guest's",
        &[
            Term::From(Name::Is(UPLINK)),
            Term::Destination(slot.guest_addr),
            Term::TranslateTo(GUEST_ADDR),
        ],
    );
    batch.chain("leaving", Hook::PostroutingNat, Verdict::Accept);
    batch.rule(
        "leaving",
        "the address the host knows",
        &[
            Term::To(Name::Is(UPLINK)),
            Term::TranslateFrom(slot.guest_addr),
        ],
    );
}

/// The namespace has no sockets of its own; a VMM that breaks out of its role gets none either.
fn namespace_own(batch: &mut Batch) {
    batch.chain("input", Hook::Input, Verdict::Drop);
    batch.chain("output", Hook::Output, Verdict::Drop);
    batch.rule("output", "error reports", &[Term::Reply, ACCEPT]);
}

/// Puts the node's rules in force in the calling thread's namespace, replacing earlier ones.
pub(super) fn install_on_host(tag: &SlotTag, allow: &[Cidr]) -> io::Result<()> {
    let prefix = tag.veth_prefix();
    let slots = Name::Begins(&prefix);
    let mut batch = Batch::replacing(&tag.host_table());
    batch.set(ALLOWED_SET.0, ALLOWED_SET.1, &merged(allow));
    host_guard(&mut batch, slots);
    host_input(&mut batch, slots);
    host_forward(&mut batch, slots);
    host_nat(&mut batch);
    batch.commit()
}

/// The host's own addresses, before port forwarding of others (docker) can rename them.
fn host_guard(batch: &mut Batch, slots: Name<'_>) {
    batch.chain("guard", Hook::PreroutingMangle, Verdict::Accept);
    let mut rule = |why, terms: &[Term<'_>]| {
        batch.rule("guard", why, &[&[Term::From(slots)], terms].concat());
    };
    rule("IPv4 only", &[Term::NotIpv4, Term::Count, DROP]);
    rule(
        "not a slot's address",
        &[Term::NotSourceIn(SLOT_NET), Term::Count, DROP],
    );
    rule("replies", &[Term::Reply, ACCEPT]);
    rule(
        "slots reach no slot",
        &[Term::DestinationIn(SLOT_NET), Term::Count, DROP],
    );
    rule(
        "allowed by the operator",
        &[Term::DestinationInSet(ALLOWED_SET.0), ACCEPT],
    );
    rule(
        "the host itself",
        &[Term::DestinationIsOurs, Term::Count, DROP],
    );
}

fn host_input(batch: &mut Batch, slots: Name<'_>) {
    batch.chain("input", Hook::Input, Verdict::Accept);
    let mut rule = |why, terms: &[Term<'_>]| {
        batch.rule("input", why, &[&[Term::From(slots)], terms].concat());
    };
    rule("replies", &[Term::Reply, ACCEPT]);
    rule(
        "slots reach no slot",
        &[Term::DestinationIn(SLOT_NET), Term::Count, DROP],
    );
    rule(
        "allowed by the operator",
        &[Term::DestinationInSet(ALLOWED_SET.0), ACCEPT],
    );
    rule("the host itself", &[Term::Count, DROP]);
}

fn host_forward(batch: &mut Batch, slots: Name<'_>) {
    batch.chain("forward", Hook::Forward, Verdict::Accept);
    let mut rule = |why, terms: &[Term<'_>]| batch.rule("forward", why, terms);
    rule("replies", &[Term::To(slots), Term::Reply, ACCEPT]);
    rule(
        "nobody is routed into a slot",
        &[Term::To(slots), Term::Count, DROP],
    );
    rule(
        "slots reach no slot",
        &[
            Term::From(slots),
            Term::DestinationIn(SLOT_NET),
            Term::Count,
            DROP,
        ],
    );
}

fn host_nat(batch: &mut Batch) {
    batch.chain("leaving", Hook::PostroutingNat, Verdict::Accept);
    batch.rule(
        "leaving",
        "guests leave as the host",
        &[
            Term::SourceIn(SLOT_NET),
            Term::NotDestinationIn(SLOT_NET),
            Term::Masquerade,
        ],
    );
}

/// Whether the node's table is in force in the calling thread's namespace.
pub(super) fn on_host(tag: &SlotTag) -> io::Result<bool> {
    nft::has_table(&tag.host_table())
}

/// Removes the node's table from the calling thread's namespace; guests then have no way out.
pub(super) fn remove_from_host(tag: &SlotTag) -> io::Result<()> {
    Batch::removing(&tag.host_table()).commit()
}
