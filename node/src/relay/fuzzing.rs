//! What two relays say to each other, as fuzz targets.

use bytes::Bytes;
use proto::epoch::Epoch;
use proto::fuzzing::Target;
use proto::ids::SandboxId;
use proto::wire::relay as pb;

use super::refusal::Refusal;
use super::wire::{self, Header, IDS_PER_QUESTION};
use crate::fuzzing::now;

/// The targets of this room.
pub(crate) const TARGETS: &[Target] = &[
    Target {
        name: "relay-header",
        samples: headers,
        run: header,
    },
    Target {
        name: "relay-question",
        samples: questions,
        run: question,
    },
    Target {
        name: "relay-answer",
        samples: answers,
        run: answer,
    },
];

fn headers() -> Vec<Vec<u8>> {
    let header = |port| Header {
        sandbox: SandboxId([3; 16]),
        epoch: Epoch(7),
        port,
    };
    [None, Some(8080)]
        .map(|port| header(port).encode().to_vec())
        .into()
}

fn header(bytes: &[u8]) {
    if let Ok(read) = Header::decode(&Bytes::copy_from_slice(bytes)) {
        assert_eq!(Header::decode(&read.encode()), Ok(read));
    }
}

fn questions() -> Vec<Vec<u8>> {
    let ask = pb::question::Ask::Activity(pb::Activity {
        sandboxes: vec![vec![3; 16], vec![4; 16]],
    });
    vec![wire::ask(ask).to_vec()]
}

/// No more ids are taken from one question than may be in it.
fn question(bytes: &[u8]) {
    let Ok(ask) = wire::question(&Bytes::copy_from_slice(bytes)) else {
        return;
    };
    if let pb::question::Ask::Activity(asked) = ask
        && let Ok(ids) = wire::sandbox_ids(&asked.sandboxes)
    {
        assert!(ids.len() <= IDS_PER_QUESTION);
    }
}

fn answers() -> Vec<Vec<u8>> {
    let refusals = [
        Refusal::StaleEpoch { newest: Epoch(9) },
        Refusal::Guest("it does not answer".into()),
    ];
    let answers = refusals
        .clone()
        .map(|refusal| wire::answer(Err(refusal)).to_vec());
    let verdicts = refusals.map(|refusal| {
        let mut bytes = Vec::new();
        now(wire::write_verdict(&mut bytes, Some(refusal))).expect("written");
        bytes
    });
    [answers, verdicts].concat()
}

fn answer(bytes: &[u8]) {
    let _refused = wire::answered(&Bytes::copy_from_slice(bytes));
    let _refused = now(wire::read_verdict(&mut &*bytes));
}
