//! What a guest's agent answers, as fuzz targets: a guest may be taken over by its workload.

use http::StatusCode;
use proto::epoch::Epoch;
use proto::fuzzing::Target;

use super::error::GuestError;
use super::quiesce;
use super::ready::Health;
use super::restore;

/// The targets of this room.
pub(crate) const TARGETS: &[Target] = &[Target {
    name: "guest-answers",
    samples,
    run: answer,
}];

/// A status as two bytes, and the text with it.
fn samples() -> Vec<Vec<u8>> {
    let texts = [
        (
            200,
            r#"{"workload":"frozen","diskFrozen":false,"streams":2,"unfinished":0,"stillForUs":1500,"tookUs":9000}"#,
        ),
        (
            200,
            r#"{"held":true,"cut":3,"warnings":["no /dev/rtc"],"tookUs":100}"#,
        ),
        (200, r#"{"undone":true}"#),
        (200, r#"{"version":"0.1.0","ready":true}"#),
        (409, r#"{"code":9,"message":"of an older epoch"}"#),
        (503, r#"{"code":14,"message":"busy"}"#),
    ];
    let framed = texts
        .map(|(status, text): (u16, &str)| [&status.to_be_bytes()[..], text.as_bytes()].concat());
    framed.into()
}

fn answer(bytes: &[u8]) {
    let Some((&status, text)) = bytes.split_first_chunk() else {
        return;
    };
    let status = u16::from_be_bytes(status) % 400 + 200;
    let status = StatusCode::from_u16(status).expect("between 200 and 599");
    quiesce::try_answers(status, text, Epoch(7));
    restore::try_answer(status, text, Epoch(7));
    let _refused = serde_json::from_slice::<Health>(text);
    // What it says goes into logs and to clients: with a bound.
    let _words = GuestError::from_http(status, text).to_string();
}
