//! Who was heard when, and how much room there is: the table of load reports. Pure.
//!
//! Each node tells each voter once a second, by a datagram that may be lost, late or doubled. So
//! every voter holds the whole table and a new leader starts warm. Nothing of it goes through the
//! log, and no decision of safety rests on it: it hints at placement, shows in lists, and keeps one
//! bad link from calling a node missing ([`Table::merge`] asks the others first).
//!
//! The table is bounded by the number of nodes it may hold and forgets those the caller drops.

use std::collections::BTreeMap;
use std::time::Duration;

use prost::Message as _;
use proto::ids::NodeId;
use proto::units::Mib;
use proto::wire::cluster as pb;
use raft::state::Resources;

use super::lease::Tick;

/// How often a node reports.
pub const REPORT_EVERY: Duration = Duration::from_secs(1);
/// A node unheard for this long is suspect: three reports in a row are rarely lost.
pub const SUSPECT_AFTER: Duration = Duration::from_secs(3);
/// The longest report that is read. One whose every field is at its largest has 100 bytes.
pub const MAX_REPORT_BYTES: usize = 120;
/// The most nodes a table holds, which is some 400 KiB. Only members report, and a cluster this
/// large has other limits long before.
pub const MAX_NODES: usize = 4096;

/// What a node says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Who says so.
    pub node: NodeId,
    /// Rises whenever the node begins anew.
    pub incarnation: u64,
    /// Counts up within the incarnation.
    pub seq: u64,
    /// What no sandbox holds there.
    pub free: Resources,
    /// Guests that run there.
    pub running: u32,
    /// The last log entry applied there.
    pub applied: u64,
    /// The log entry of the newest membership known there.
    pub membership: u64,
    /// 95 of 100 recent creates took at most this long.
    pub create_p95: Duration,
}

/// Bytes that are not a report.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadReport {
    /// No report is as long.
    #[error("a load report of {len} bytes is too long")]
    TooLong {
        /// As received.
        len: usize,
    },
    /// It does not parse.
    #[error("read a load report")]
    Malformed(#[source] prost::DecodeError),
}

/// What became of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// It is the newest of its node.
    Newest,
    /// A newer one is known.
    Old,
    /// The table is full and the node is not in it.
    Full,
}

/// A node as placement and lists see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hint {
    /// Its newest report.
    pub report: Report,
    /// How long ago it was heard.
    pub age: Duration,
}

impl Hint {
    /// Whether the node may be gone.
    #[must_use]
    pub fn is_suspect(&self) -> bool {
        self.age >= SUSPECT_AFTER
    }
}

/// The newest report of each node and when it was heard.
#[derive(Clone, Debug, Default)]
pub struct Table {
    entries: BTreeMap<NodeId, Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    report: Report,
    at: Tick,
}

impl Report {
    /// The report as a datagram.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        pb::LoadReport::from(self).encode_to_vec()
    }

    /// Reads a datagram.
    ///
    /// # Errors
    /// [`BadReport`]; the bytes are a stranger's.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadReport> {
        if bytes.len() > MAX_REPORT_BYTES {
            return Err(BadReport::TooLong { len: bytes.len() });
        }
        let wire = pb::LoadReport::decode(bytes).map_err(BadReport::Malformed)?;
        Ok(wire.into())
    }

    /// Whether the report speaks of the node whose key its connection has. The caller drops any
    /// other: a member must not speak for a neighbour.
    #[must_use]
    pub fn is_from(&self, peer: NodeId) -> bool {
        self.node == peer
    }

    const fn order(&self) -> (u64, u64) {
        (self.incarnation, self.seq)
    }
}

impl Table {
    /// Takes a report heard at `at`. One that is not newer than what is known changes nothing.
    pub fn heard(&mut self, report: Report, at: Tick) -> Heard {
        let known = self.entries.get(&report.node);
        if known.is_some_and(|known| known.report.order() >= report.order()) {
            return Heard::Old;
        }
        if known.is_none() && self.entries.len() >= MAX_NODES {
            return Heard::Full;
        }
        // Heard at an earlier instant through somebody else, perhaps, but of a newer report.
        let at = known.map_or(at, |known| known.at.max(at));
        self.entries.insert(report.node, Entry { report, at });
        Heard::Newest
    }

    /// Takes what another voter has heard, received at `now`.
    ///
    /// Its word counts like a report of that age, so it can make a node look more alive, and never
    /// less. It may know of nodes that this one has never heard.
    pub fn merge(&mut self, others: impl IntoIterator<Item = Hint>, now: Tick) {
        for Hint { report, age } in others {
            let at = now.less(age);
            let node = report.node;
            let order = report.order();
            if self.heard(report, at) == Heard::Old
                && let Some(known) = self.entries.get_mut(&node)
                && known.report.order() == order
            {
                // The same report, which reached the other voter later.
                known.at = known.at.max(at);
            }
        }
    }

    /// How long ago a node was heard; `None` for never.
    #[must_use]
    pub fn age(&self, node: NodeId, now: Tick) -> Option<Duration> {
        let entry = self.entries.get(&node)?;
        Some(now.since(entry.at))
    }

    /// The newest report of a node and its age.
    #[must_use]
    pub fn hint(&self, node: NodeId, now: Tick) -> Option<Hint> {
        self.entries.get(&node).map(|entry| entry.hint(now))
    }

    /// All nodes by id, suspect ones included.
    pub fn hints(&self, now: Tick) -> impl Iterator<Item = Hint> {
        self.entries.values().map(move |entry| entry.hint(now))
    }

    /// The nodes that placement should rather not choose, by id.
    pub fn suspects(&self, now: Tick) -> impl Iterator<Item = NodeId> {
        let suspects = self.hints(now).filter(Hint::is_suspect);
        suspects.map(|hint| hint.report.node)
    }

    /// Forgets every node for which `keep` says no: those that left the node table.
    pub fn keep_only(&mut self, mut keep: impl FnMut(NodeId) -> bool) {
        self.entries.retain(|id, _| keep(*id));
    }

    /// The whole table for another voter.
    #[must_use]
    pub fn encode(&self, now: Tick) -> Vec<u8> {
        let heard = self.hints(now).map(|hint| pb::HeardReport {
            report: Some((&hint.report).into()),
            age_ms: millis(hint.age),
        });
        pb::LoadTable {
            heard: heard.collect(),
        }
        .encode_to_vec()
    }
}

impl Entry {
    fn hint(&self, now: Tick) -> Hint {
        Hint {
            report: self.report.clone(),
            age: now.since(self.at),
        }
    }
}

/// Reads another voter's table, for [`Table::merge`].
///
/// # Errors
/// [`BadReport`]; the bytes are a stranger's.
pub fn decode_table(bytes: &[u8]) -> Result<Vec<Hint>, BadReport> {
    // Ten bytes a row are its age and the framing.
    if bytes.len() > MAX_NODES * (MAX_REPORT_BYTES + 16) {
        return Err(BadReport::TooLong { len: bytes.len() });
    }
    let table = pb::LoadTable::decode(bytes).map_err(BadReport::Malformed)?;
    let hint = |row: pb::HeardReport| Hint {
        report: row.report.unwrap_or_default().into(),
        age: Duration::from_millis(row.age_ms),
    };
    Ok(table.heard.into_iter().map(hint).collect())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl From<&Report> for pb::LoadReport {
    fn from(report: &Report) -> Self {
        Self {
            node: report.node.0,
            incarnation: report.incarnation,
            seq: report.seq,
            free_vcpus: report.free.vcpus,
            free_memory_mib: report.free.memory.0,
            free_disk_mib: report.free.disk.0,
            free_sandboxes: report.free.sandboxes,
            running: report.running,
            applied: report.applied,
            membership: report.membership,
            create_p95_ms: u32::try_from(report.create_p95.as_millis()).unwrap_or(u32::MAX),
        }
    }
}

impl From<pb::LoadReport> for Report {
    fn from(wire: pb::LoadReport) -> Self {
        Self {
            node: NodeId(wire.node),
            incarnation: wire.incarnation,
            seq: wire.seq,
            free: Resources {
                vcpus: wire.free_vcpus,
                memory: Mib(wire.free_memory_mib),
                disk: Mib(wire.free_disk_mib),
                sandboxes: wire.free_sandboxes,
            },
            running: wire.running,
            applied: wire.applied,
            membership: wire.membership,
            create_p95: Duration::from_millis(wire.create_p95_ms.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(secs: u64) -> Tick {
        Tick(Duration::from_secs(secs))
    }

    fn report(node: u64, incarnation: u64, seq: u64) -> Report {
        Report {
            node: NodeId(node),
            incarnation,
            seq,
            ..Report::default()
        }
    }

    #[test]
    fn the_largest_report_fits_a_datagram() {
        let most = Resources {
            vcpus: u32::MAX,
            memory: Mib(u32::MAX),
            disk: Mib(u32::MAX),
            sandboxes: u32::MAX,
        };
        let largest = Report {
            node: NodeId(u64::MAX),
            incarnation: u64::MAX,
            seq: u64::MAX,
            free: most,
            running: u32::MAX,
            applied: u64::MAX,
            membership: u64::MAX,
            create_p95: Duration::from_millis(u32::MAX.into()),
        };
        let bytes = largest.encode();
        assert!(bytes.len() <= MAX_REPORT_BYTES, "{}", bytes.len());
        assert_eq!(Report::decode(&bytes), Ok(largest));
    }

    #[test]
    fn reports_out_of_order_and_of_older_incarnations_change_nothing() {
        let mut table = Table::default();
        assert_eq!(table.heard(report(1, 2, 5), at(10)), Heard::Newest);
        for old in [report(1, 2, 5), report(1, 2, 4), report(1, 1, 99)] {
            assert_eq!(table.heard(old, at(11)), Heard::Old);
        }
        assert_eq!(table.age(NodeId(1), at(11)), Some(Duration::from_secs(1)));
        assert_eq!(table.heard(report(1, 3, 1), at(12)), Heard::Newest);
    }

    #[test]
    fn a_node_is_suspect_after_three_missed_reports() {
        let mut table = Table::default();
        table.heard(report(1, 1, 1), at(10));
        table.heard(report(2, 1, 1), at(12));
        assert_eq!(table.suspects(at(12)).count(), 0);
        assert_eq!(table.suspects(at(13)).collect::<Vec<_>>(), [NodeId(1)]);
    }

    #[test]
    fn another_voter_can_only_make_a_node_look_more_alive() {
        let (mut mine, mut theirs) = (Table::default(), Table::default());
        mine.heard(report(1, 1, 1), at(100));
        mine.heard(report(2, 1, 9), at(109));
        theirs.heard(report(1, 1, 8), at(7));
        theirs.heard(report(2, 1, 1), at(2));
        theirs.heard(report(3, 1, 1), at(8));
        let told = decode_table(&theirs.encode(at(8))).expect("own bytes are read");
        mine.merge(told, at(110));
        let age = |node| mine.age(NodeId(node), at(110)).map(|age| age.as_secs());
        assert_eq!((age(1), age(2), age(3)), (Some(1), Some(1), Some(0)));
    }

    #[test]
    fn the_table_is_bounded_and_forgets_who_left() {
        let mut table = Table::default();
        for node in 0..=MAX_NODES as u64 {
            table.heard(report(node, 1, 1), at(1));
        }
        assert_eq!(table.hints(at(1)).count(), MAX_NODES);
        assert_eq!(table.heard(report(5, 1, 2), at(2)), Heard::Newest);
        table.keep_only(|id| id.0 < 3);
        assert_eq!(table.hints(at(2)).count(), 3);
    }

    #[test]
    fn nobody_speaks_for_a_neighbour() {
        assert!(report(1, 1, 1).is_from(NodeId(1)));
        assert!(!report(1, 1, 1).is_from(NodeId(2)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_readers_panic(bytes: Vec<u8>) {
            let _ = Report::decode(&bytes);
            let _ = decode_table(&bytes);
        }

        /// In whatever order reports arrive, the newest stays.
        #[test]
        fn the_newest_report_wins(orders in prop::collection::vec((0_u64..4, 0_u64..9), 1..40)) {
            let mut table = Table::default();
            for (tick, (incarnation, seq)) in (0..).zip(&orders) {
                table.heard(report(1, *incarnation, *seq), at(tick));
            }
            let kept = table.hint(NodeId(1), at(99)).expect("something was heard");
            prop_assert_eq!(Some(&kept.report.order()), orders.iter().max());
        }
    }
}
