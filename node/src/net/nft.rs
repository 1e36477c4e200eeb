//! nftables in its own language: one table, replaced or removed in one transaction.
//!
//! A [`Batch`] is the bytes of one netlink send: batch begin, messages, batch end. The kernel
//! carries out all of it or nothing, and packets see the old table until they see the new one.
//! Only what [`super::rules`] needs is here; numbers are those of `<linux/netfilter/nf_tables.h>`.

use std::io;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST};

use super::cidr::Cidr;
use super::netlink::{Conversation, HEADER_BYTES};

/// nftables among the netfilter subsystems, and the high byte of its message types.
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const GET_TABLE: u16 = SUBSYSTEM << 8 | 1;
const DEL_TABLE: u16 = SUBSYSTEM << 8 | 2;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
const NEW_SET: u16 = SUBSYSTEM << 8 | 9;
const NEW_ELEMENTS: u16 = SUBSYSTEM << 8 | 12;

/// The family that sees IPv4 and IPv6 alike.
const FAMILY_INET: u8 = 1;
const FAMILY_NONE: u8 = 0;
/// Marks an attribute that holds attributes.
const NESTED: u16 = 1 << 15;

/// The register everything is loaded into: no rule here compares two things at once.
const REGISTER: u32 = 1;
/// The register that a verdict is put in.
const VERDICT: u32 = 0;
/// Size of an interface name in a register.
const IFNAME_BYTES: usize = 16;

/// Where in a packet's way a chain sits. Priorities are those of iptables' tables of that name.
#[derive(Clone, Copy, Debug)]
pub(super) enum Hook {
    /// On arrival, before connections are looked up.
    PreroutingRaw,
    /// On arrival, with the connection known, before addresses are translated.
    PreroutingMangle,
    /// On arrival, where destinations are translated.
    PreroutingNat,
    /// On the way to this machine's own sockets.
    Input,
    /// On the way through.
    Forward,
    /// On the way out of this machine's own sockets.
    Output,
    /// On departure, where sources are translated.
    PostroutingNat,
}

impl Hook {
    const fn number(self) -> u32 {
        match self {
            Self::PreroutingRaw | Self::PreroutingMangle | Self::PreroutingNat => 0,
            Self::Input => 1,
            Self::Forward => 2,
            Self::Output => 3,
            Self::PostroutingNat => 4,
        }
    }

    const fn priority(self) -> i32 {
        match self {
            Self::PreroutingRaw => -300,
            Self::PreroutingMangle => -150,
            Self::PreroutingNat => -100,
            Self::Input | Self::Forward | Self::Output => 0,
            Self::PostroutingNat => 100,
        }
    }

    const fn kind(self) -> &'static str {
        match self {
            Self::PreroutingNat | Self::PostroutingNat => "nat",
            _ => "filter",
        }
    }
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It never was.
    Drop,
    /// This chain lets it pass; another one may still drop it.
    Accept,
}

impl Verdict {
    const fn number(self) -> u32 {
        match self {
            Self::Drop => 0,
            Self::Accept => 1,
        }
    }
}

/// One test or act of a rule.
#[derive(Clone, Debug)]
pub(super) enum Term<'a> {
    /// It arrived on this interface.
    From(Name<'a>),
    /// It leaves on this interface.
    To(Name<'a>),
    /// It is not IPv4.
    NotIpv4,
    /// It comes from this address.
    Source(Ipv4Addr),
    /// It comes from another address than this.
    NotSource(Ipv4Addr),
    /// It comes from this network.
    SourceIn(Cidr),
    /// It comes from outside this network.
    NotSourceIn(Cidr),
    /// It goes to this address.
    Destination(Ipv4Addr),
    /// It goes to this network.
    DestinationIn(Cidr),
    /// It goes out of this network.
    NotDestinationIn(Cidr),
    /// It goes to a member of this set of the table.
    DestinationInSet(&'a str),
    /// It goes to an address of this machine.
    DestinationIsOurs,
    /// It belongs to a connection that was let through, or reports an error of one.
    Reply,
    /// It belongs to no connection and begins none.
    Invalid,
    /// Its destination was translated.
    Translated,
    /// Count what got here.
    Count,
    /// Decide.
    Do(Verdict),
    /// Replace its destination.
    TranslateTo(Ipv4Addr),
    /// Replace its source.
    TranslateFrom(Ipv4Addr),
    /// Replace its source by the address of the interface it leaves on.
    Masquerade,
}

/// An interface by name.
#[derive(Clone, Copy, Debug)]
pub(super) enum Name<'a> {
    /// This very interface.
    Is(&'a str),
    /// Every interface whose name begins so.
    Begins(&'a str),
}

const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const NFPROTO_IPV4: u8 = 2;
const CT_STATE: u32 = 0;
const CT_STATUS: u32 = 2;
const CT_STATE_INVALID: u32 = 1;
const CT_STATE_REPLY: u32 = 2 | 4;
const CT_STATUS_DNAT: u32 = 1 << 5;
const FIB_RESULT_ADDRTYPE: u32 = 3;
const FIB_OF_DESTINATION: u32 = 1 << 1;
const ROUTE_LOCAL: u32 = 2;
const CMP_EQ: u32 = 0;
const CMP_NEQ: u32 = 1;
const NETWORK_HEADER: u32 = 1;
const IPV4_SOURCE: u32 = 12;
const IPV4_DESTINATION: u32 = 16;
const NAT_SOURCE: u32 = 0;
const NAT_DESTINATION: u32 = 1;
/// The nf_tables type number of an IPv4 address: tells `nft list` how to print a set.
const TYPE_IPV4_ADDR: u32 = 7;
const SET_INTERVAL: u32 = 4;
const ELEMENT_INTERVAL_END: u32 = 1;

/// One transaction on one table.
pub(super) struct Batch {
    table: String,
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    /// Makes the table, which must not be there yet, with what is added to this batch.
    pub(super) fn creating(table: &str) -> Self {
        let mut batch = Self::empty(table);
        batch.table_message(NEW_TABLE);
        batch
    }

    /// Replaces the table, whatever was in it, by what is added to this batch.
    pub(super) fn replacing(table: &str) -> Self {
        let mut batch = Self::removing(table);
        batch.table_message(NEW_TABLE);
        batch
    }

    /// Removes the table; one that is not there is made first, so that removal cannot fail.
    pub(super) fn removing(table: &str) -> Self {
        let mut batch = Self::empty(table);
        batch.table_message(NEW_TABLE);
        batch.table_message(DEL_TABLE);
        batch
    }

    fn empty(table: &str) -> Self {
        let mut batch = Self {
            table: table.to_owned(),
            bytes: Vec::new(),
            sequence: 0,
        };
        batch.message(BATCH_BEGIN, 0, |_| {});
        batch
    }

    /// Adds a chain on a hook; `otherwise` is what becomes of packets no rule decides on.
    pub(super) fn chain(&mut self, name: &str, hook: Hook, otherwise: Verdict) {
        let table = self.table.clone();
        self.message(NEW_CHAIN, NLM_F_CREATE, |out| {
            out.text(1, &table);
            out.text(3, name);
            out.nested(4, |out| {
                out.number(1, hook.number());
                out.number(2, hook.priority().cast_unsigned());
            });
            out.number(5, otherwise.number());
            out.text(7, hook.kind());
        });
    }

    /// Adds a named set of address ranges, which must be disjoint and ascending.
    pub(super) fn set(&mut self, name: &str, id: u32, ranges: &[RangeInclusive<u32>]) {
        let table = self.table.clone();
        self.message(NEW_SET, NLM_F_CREATE, |out| {
            out.text(1, &table);
            out.text(2, name);
            out.number(3, SET_INTERVAL);
            out.number(4, TYPE_IPV4_ADDR);
            out.number(5, 4);
            out.number(10, id);
        });
        if !ranges.is_empty() {
            self.message(NEW_ELEMENTS, NLM_F_CREATE, |out| {
                out.text(1, &table);
                out.text(2, name);
                out.nested(3, |out| ranges.iter().for_each(|range| out.range(range)));
            });
        }
    }

    /// Adds a rule at the end of `chain`; `why` is shown by `nft list`.
    pub(super) fn rule(&mut self, chain: &str, why: &str, terms: &[Term<'_>]) {
        let table = self.table.clone();
        self.message(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, |out| {
            out.text(1, &table);
            out.text(2, chain);
            out.nested(4, |out| terms.iter().for_each(|term| out.term(term)));
            out.comment(7, why);
        });
    }

    /// Hands the transaction to the kernel, for the calling thread's namespace.
    pub(super) fn commit(mut self) -> io::Result<()> {
        // The kernel carries messages out in order, and answers in order: the last one asks.
        let last = self.sequence;
        self.message(BATCH_END, 0, |_| {});
        Conversation::about_netfilter()?.send(&self.bytes, last)
    }

    fn table_message(&mut self, kind: u16) {
        let table = self.table.clone();
        self.message(kind, NLM_F_CREATE, |out| out.text(1, &table));
    }

    fn message(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Attributes<'_>)) {
        self.sequence += 1;
        put_message(&mut self.bytes, kind, flags, self.sequence, body);
    }
}

/// Whether the calling thread's namespace has the table.
pub(super) fn has_table(table: &str) -> io::Result<bool> {
    let mut bytes = Vec::new();
    put_message(&mut bytes, GET_TABLE, 0, 1, |out| out.text(1, table));
    match Conversation::about_netfilter()?.send(&bytes, 1) {
        Ok(()) => Ok(true),
        Err(err) if err.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(err) => Err(err),
    }
}

fn put_message(
    bytes: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    body: impl FnOnce(&mut Attributes<'_>),
) {
    let start = bytes.len();
    let edge = matches!(kind, BATCH_BEGIN | BATCH_END);
    let (ask, family, resource) = match edge {
        true => (0, FAMILY_NONE, SUBSYSTEM),
        false => (NLM_F_ACK, FAMILY_INET, 0),
    };
    bytes.extend([0; 4]);
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | ask | flags).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    debug_assert_eq!(bytes.len() - start, HEADER_BYTES);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    body(&mut Attributes(bytes));
    let length = u32::try_from(bytes.len() - start).expect("a message is a few hundred bytes");
    bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
}

/// Writes netlink attributes: length, kind, value, padding to four bytes.
struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    fn raw(&mut self, kind: u16, write: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        write(self);
        let length = u16::try_from(self.0.len() - start).expect("an attribute is far below 64 KiB");
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn nested(&mut self, kind: u16, write: impl FnOnce(&mut Self)) {
        self.raw(kind | NESTED, write);
    }

    fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.raw(kind, |out| out.0.extend(value));
    }

    fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    fn text(&mut self, kind: u16, value: &str) {
        self.raw(kind, |out| {
            out.0.extend(value.as_bytes());
            out.0.push(0);
        });
    }

    /// A comment as the `nft` program writes them: type, length, text.
    fn comment(&mut self, kind: u16, text: &str) {
        debug_assert!(text.len() < 128, "nft shows no longer comments");
        let length = u8::try_from(text.len() + 1).expect("comments are ours and short");
        self.raw(kind, |out| {
            out.0.extend([0, length]);
            out.0.extend(text.as_bytes());
            out.0.push(0);
        });
    }

    /// A value to compare with or to load.
    fn value(&mut self, kind: u16, value: &[u8]) {
        self.nested(kind, |out| out.bytes(1, value));
    }

    /// A range as two elements: where it begins, and where it no longer is.
    fn range(&mut self, range: &RangeInclusive<u32>) {
        self.nested(1, |out| out.value(1, &range.start().to_be_bytes()));
        if let Some(beyond) = range.end().checked_add(1) {
            self.nested(1, |out| {
                out.value(1, &beyond.to_be_bytes());
                out.number(3, ELEMENT_INTERVAL_END);
            });
        }
    }

    fn expression(&mut self, name: &str, write: impl FnOnce(&mut Self)) {
        self.nested(1, |out| {
            out.text(1, name);
            out.nested(2, write);
        });
    }

    fn term(&mut self, term: &Term<'_>) {
        match *term {
            Term::From(name) => self.interface(META_IIFNAME, name),
            Term::To(name) => self.interface(META_OIFNAME, name),
            Term::NotIpv4 => {
                self.meta(META_NFPROTO);
                self.compare(CMP_NEQ, &[NFPROTO_IPV4]);
            }
            Term::Source(address) => self.address(IPV4_SOURCE, CMP_EQ, address),
            Term::NotSource(address) => self.address(IPV4_SOURCE, CMP_NEQ, address),
            Term::SourceIn(net) => self.network(IPV4_SOURCE, CMP_EQ, net),
            Term::NotSourceIn(net) => self.network(IPV4_SOURCE, CMP_NEQ, net),
            Term::Destination(address) => self.address(IPV4_DESTINATION, CMP_EQ, address),
            Term::DestinationIn(net) => self.network(IPV4_DESTINATION, CMP_EQ, net),
            Term::NotDestinationIn(net) => self.network(IPV4_DESTINATION, CMP_NEQ, net),
            Term::DestinationInSet(set) => self.member(set),
            Term::DestinationIsOurs => self.local(),
            Term::Reply => self.connection(CT_STATE, CT_STATE_REPLY),
            Term::Invalid => self.connection(CT_STATE, CT_STATE_INVALID),
            Term::Translated => self.connection(CT_STATUS, CT_STATUS_DNAT),
            Term::Count => self.expression("counter", |_| {}),
            Term::Do(verdict) => self.verdict(verdict),
            Term::TranslateTo(address) => self.nat(NAT_DESTINATION, address),
            Term::TranslateFrom(address) => self.nat(NAT_SOURCE, address),
            Term::Masquerade => self.expression("masq", |_| {}),
        }
    }

    fn meta(&mut self, key: u32) {
        self.expression("meta", |out| {
            out.number(1, REGISTER);
            out.number(2, key);
        });
    }

    fn compare(&mut self, operator: u32, with: &[u8]) {
        self.expression("cmp", |out| {
            out.number(1, REGISTER);
            out.number(2, operator);
            out.value(3, with);
        });
    }

    fn interface(&mut self, key: u32, name: Name<'_>) {
        self.meta(key);
        match name {
            // Names in registers are padded with zeros; comparing all of it is "is".
            Name::Is(name) => {
                let mut padded = name.as_bytes().to_vec();
                padded.resize(IFNAME_BYTES, 0);
                self.compare(CMP_EQ, &padded);
            }
            Name::Begins(name) => self.compare(CMP_EQ, name.as_bytes()),
        }
    }

    fn load_address(&mut self, offset: u32) {
        self.expression("payload", |out| {
            out.number(1, REGISTER);
            out.number(2, NETWORK_HEADER);
            out.number(3, offset);
            out.number(4, 4);
        });
    }

    /// Addresses mean IPv4 ones: where the family is not known, this checks it first.
    fn ipv4(&mut self) {
        self.meta(META_NFPROTO);
        self.compare(CMP_EQ, &[NFPROTO_IPV4]);
    }

    fn address(&mut self, offset: u32, operator: u32, address: Ipv4Addr) {
        self.ipv4();
        self.load_address(offset);
        self.compare(operator, &address.octets());
    }

    fn network(&mut self, offset: u32, operator: u32, net: Cidr) {
        self.ipv4();
        self.load_address(offset);
        self.mask(&net.mask().octets());
        self.compare(operator, &net.network().octets());
    }

    fn mask(&mut self, mask: &[u8]) {
        self.expression("bitwise", |out| {
            out.number(1, REGISTER);
            out.number(2, REGISTER);
            out.number(3, 4);
            out.value(4, mask);
            out.value(5, &[0; 4]);
        });
    }

    fn member(&mut self, set: &str) {
        self.ipv4();
        self.load_address(IPV4_DESTINATION);
        self.expression("lookup", |out| {
            out.text(1, set);
            out.number(2, REGISTER);
        });
    }

    fn local(&mut self) {
        self.expression("fib", |out| {
            out.number(1, REGISTER);
            out.number(2, FIB_RESULT_ADDRTYPE);
            out.number(3, FIB_OF_DESTINATION);
        });
        self.compare(CMP_EQ, &ROUTE_LOCAL.to_ne_bytes());
    }

    /// True if the connection has any of `bits` in what `key` tells of it.
    fn connection(&mut self, key: u32, bits: u32) {
        self.expression("ct", |out| {
            out.number(1, REGISTER);
            out.number(2, key);
        });
        self.mask(&bits.to_ne_bytes());
        self.compare(CMP_NEQ, &[0; 4]);
    }

    fn verdict(&mut self, verdict: Verdict) {
        self.expression("immediate", |out| {
            out.number(1, VERDICT);
            out.nested(2, |out| {
                out.nested(2, |out| out.number(1, verdict.number()))
            });
        });
    }

    fn nat(&mut self, kind: u32, address: Ipv4Addr) {
        self.expression("immediate", |out| {
            out.number(1, REGISTER);
            out.value(2, &address.octets());
        });
        self.expression("nat", |out| {
            out.number(1, kind);
            out.number(2, u32::from(NFPROTO_IPV4));
            out.number(3, REGISTER);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_and_attribute_begins_on_four_bytes() {
        let mut batch = Batch::replacing("odd");
        batch.set("a", 1, &[7..=9, 11..=u32::MAX]);
        batch.chain("b", Hook::Forward, Verdict::Drop);
        batch.rule(
            "b",
            "c",
            &[Term::From(Name::Begins("wx-")), Term::Do(Verdict::Accept)],
        );
        let mut rest = batch.bytes.as_slice();
        let mut count = 0;
        while let Some(length) = rest.first_chunk::<4>() {
            let length = u32::from_ne_bytes(*length) as usize;
            assert_eq!(length % 4, 0);
            rest = &rest[length..];
            count += 1;
        }
        assert_eq!(count, batch.sequence);
    }

    #[test]
    fn an_attribute_length_excludes_its_padding() {
        let mut bytes = Vec::new();
        Attributes(&mut bytes).text(3, "abcd");
        assert_eq!(bytes, [9, 0, 3, 0, b'a', b'b', b'c', b'd', 0, 0, 0, 0]);
    }

    #[test]
    fn a_range_to_the_last_address_has_no_end_element() {
        let mut open = Vec::new();
        Attributes(&mut open).range(&(5..=u32::MAX));
        let mut closed = Vec::new();
        Attributes(&mut closed).range(&(5..=6));
        assert!(closed.starts_with(&open));
        assert!(closed.len() > open.len());
    }
}
