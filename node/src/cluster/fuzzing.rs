//! What other nodes say of themselves, and join tokens, as fuzz targets.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use prost::Message;
use proto::fuzzing::Target;
use proto::ids::{ClusterId, NodeId, NodeKey, TokenId};
use proto::units::Stamp;
use proto::wire::cluster as pb;
use proto::wire::mesh as wire;

use super::calls;
use super::lease::Tick;
use super::liveness::{self, MAX_NODES, Report, Table};
use super::token::{JoinTicket, MAX_CONTACTS, TokenContact, TokenRole};

/// The targets of this room.
pub(crate) const TARGETS: &[Target] = &[
    Target {
        name: "load-report",
        samples: reports,
        run: report,
    },
    Target {
        name: "load-table",
        samples: tables,
        run: table,
    },
    Target {
        name: "join-token",
        samples: tokens,
        run: token,
    },
    Target {
        name: "cluster-calls",
        samples: requests,
        run: request,
    },
];

fn a_report(node: u64) -> Report {
    Report {
        node: NodeId(node),
        incarnation: 3,
        seq: 4000,
        running: 7,
        applied: 99,
        membership: 12,
        ..Report::default()
    }
}

fn reports() -> Vec<Vec<u8>> {
    vec![a_report(1).encode(), a_report(u64::MAX).encode()]
}

fn report(bytes: &[u8]) {
    let Ok(read) = Report::decode(bytes) else {
        return;
    };
    let again = Report::decode(&read.encode());
    assert_eq!(again.as_ref(), Ok(&read), "it changed on its way");
    let mut table = Table::default();
    table.heard(read, Tick::default());
}

fn tables() -> Vec<Vec<u8>> {
    let heard = (1..4).map(|node| pb::HeardReport {
        report: Some((&a_report(node)).into()),
        age_ms: node * 1000,
    });
    let table = pb::LoadTable {
        heard: heard.collect(),
    };
    vec![table.encode_to_vec()]
}

/// However many rows somebody sends, a table holds no more than it may.
fn table(bytes: &[u8]) {
    let Ok(hints) = liveness::decode_table(bytes) else {
        return;
    };
    let nodes = hints.len();
    let mut table = Table::default();
    table.merge(hints, Tick::default());
    let listed = table.hints(Tick::default()).count();
    assert!(listed <= nodes.min(MAX_NODES));
}

fn tokens() -> Vec<Vec<u8>> {
    let contact = |n: u8| TokenContact {
        key: NodeKey([n; 32]),
        control: ([10, 0, 0, n], 7321).into(),
        bulk: ([10, 0, 0, n], 7322).into(),
    };
    let ticket = JoinTicket {
        role: TokenRole::Member,
        cluster: ClusterId([1; 16]),
        token: TokenId([2; 16]),
        seed: [3; 32],
        expires_at: Stamp(1_700_000_000_000),
        contacts: vec![contact(1), contact(2)],
    };
    vec![ticket.to_text().into_bytes()]
}

/// Reads the text as it is, and what is damaged below its encoding with the checksum made right.
fn token(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    check_token(&text);
    if let Some(mended) = mended(&text) {
        check_token(&mended);
    }
}

/// The text with the checksum inside it made right.
fn mended(text: &str) -> Option<String> {
    const PREFIX: &str = "wrj1_";
    let bytes = URL_SAFE_NO_PAD.decode(text.strip_prefix(PREFIX)?).ok()?;
    let (body, _) = bytes.split_last_chunk::<4>()?;
    let sum = blake3::hash(body);
    let whole = URL_SAFE_NO_PAD.encode([body, &sum.as_bytes()[..4]].concat());
    Some(format!("{PREFIX}{whole}"))
}

fn check_token(text: &str) {
    let Ok(read) = JoinTicket::from_text(text) else {
        return;
    };
    assert!(!read.contacts.is_empty() && read.contacts.len() <= MAX_CONTACTS);
    let again = JoinTicket::from_text(&read.to_text());
    assert!(
        again.is_ok_and(|again| again == read),
        "it changed on its way"
    );
}

fn requests() -> Vec<Vec<u8>> {
    vec![
        wire::ProposeRequest {
            proposal: vec![7; 20],
            last_hop: true,
        }
        .encode_to_vec(),
        wire::RenewRequest {
            node: 1,
            incarnation: 2,
            seq: 3,
            last_hop: false,
        }
        .encode_to_vec(),
        wire::VouchRequest { key: vec![7; 32] }.encode_to_vec(),
    ]
}

/// Requests of every kind, as a member reads them off a call.
fn request(bytes: &[u8]) {
    fn read<M: Message + Default>(bytes: &[u8]) {
        let _refused = calls::request::<M>(Bytes::copy_from_slice(bytes));
    }
    read::<wire::ProposeRequest>(bytes);
    read::<wire::ReadRequest>(bytes);
    read::<wire::RenewRequest>(bytes);
    read::<wire::VouchRequest>(bytes);
    read::<wire::PullRequest>(bytes);
    read::<wire::PullAnswer>(bytes);
}
