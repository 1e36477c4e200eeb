//! Passing a request on to a port of a guest, and its answer back: bodies stream, upgrades become pipes.
//!
//! Whatever a visitor speaks, the program is spoken to in HTTP/1.1, as nearly all programs there understand. A call
//! by gRPC is the exception: it is nothing without HTTP/2, so its server is known to speak that, and it goes on as
//! it came, with its trailers.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{
    CONNECTION, CONTENT_TYPE, COOKIE, HOST, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, Uri, Version};
use axum::response::Response;
use http_body_util::BodyExt as _;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use proto::epoch::Epoch;
use proto::ids::SandboxId;
use tokio::io;
use tracing::debug;

use super::super::auth;
use super::super::grants::Grant;
use super::super::streams::Sessions;
use super::address::{Address, host};
use super::pass::LINK;
use crate::guest::{Dial, PortClient};

/// Ports whose connections are kept for the next request: as many pages as people look at at once.
const KEPT_PORTS: usize = 256;
/// Headers that concern one connection and not the request (RFC 9110, 7.6.1), beside those that `Connection` names.
const HOP_BY_HOP: [HeaderName; 7] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRANSFER_ENCODING,
];
/// What a client of HTTP/2 says of itself that reads what comes behind a body.
const TRAILERS: &str = "trailers";
const FORWARDED_FOR: &str = "x-forwarded-for";
const FORWARDED_HOST: &str = "x-forwarded-host";
const FORWARDED_PROTO: &str = "x-forwarded-proto";

/// What a program is spoken to in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Speech {
    Http1,
    /// From the first byte on.
    Http2,
}

impl Speech {
    /// As `request` wants it.
    pub(super) fn of(request: &Parts) -> Self {
        let says = |name, what: &dyn Fn(&str) -> bool| {
            let text = request.headers.get(name).and_then(|it| it.to_str().ok());
            text.is_some_and(what)
        };
        // Its variant for browsers is made for HTTP/1.1 and is another word.
        let is_grpc = says(CONTENT_TYPE, &|text| {
            let rest = text.strip_prefix("application/grpc");
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', ';']))
        });
        let reads_trailers = says(TE, &|text| text.eq_ignore_ascii_case(TRAILERS));
        if request.version == Version::HTTP_2 && is_grpc && reads_trailers {
            Self::Http2
        } else {
            Self::Http1
        }
    }
}

/// Which clients are kept: the guest of one ownership, its port, and what is spoken there.
type PortOf = (SandboxId, Epoch, u16, Speech);

/// The connections to ports that were visited last.
#[derive(Debug, Default)]
pub(in crate::api) struct Kept {
    /// The last used is last.
    clients: Mutex<Vec<(PortOf, PortClient)>>,
}

impl Kept {
    /// The client of a port of a guest that runs under `epoch`; `dial` leads there.
    pub(super) fn client(
        &self,
        to: Address,
        epoch: Epoch,
        dial: &Arc<dyn Dial>,
        speech: Speech,
    ) -> Program {
        let wanted = (to.id, epoch, to.port, speech);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let known = clients.iter().position(|(of, _)| *of == wanted);
        let client = known.map_or_else(
            || match speech {
                Speech::Http1 => PortClient::new(dial),
                Speech::Http2 => PortClient::http2(dial),
            },
            |at| clients.remove(at).1,
        );
        // Clients of former owners are of no use any more.
        clients.retain(|((id, of, ..), _)| *id != to.id || *of == epoch);
        if clients.len() >= KEPT_PORTS {
            clients.remove(0);
        }
        clients.push((wanted, client.clone()));
        Program { client, speech, to }
    }
}

/// A port of a guest, as a request wants to speak to it.
#[derive(Clone, Debug)]
pub(super) struct Program {
    client: PortClient,
    speech: Speech,
    to: Address,
}

/// Sends `request` to `program`.
pub(super) async fn forward(
    program: &Program,
    from: Option<IpAddr>,
    (sessions, grant): (&Sessions, Option<Arc<Grant>>),
    mut request: Request,
) -> Result<Response, hyper_util::client::legacy::Error> {
    let upgrade = wants_upgrade(request.headers()).filter(|it| passes(it));
    let upgrade = upgrade.cloned();
    let visitor = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    let (mut parts, body) = request.into_parts();
    prepare(&mut parts, program, from);
    if let Some(protocol) = upgrade {
        announce(&mut parts.headers, protocol);
    }
    let body = body.map_err(Into::into).boxed_unsync();
    let request = Request::from_parts(parts, body);
    let mut answer = program.client.send(request).await?;
    let switched = answer.status() == StatusCode::SWITCHING_PROTOCOLS;
    let protocol = wants_upgrade(answer.headers()).cloned();
    if let Some(visitor) = visitor.filter(|_| switched) {
        let guest = hyper::upgrade::on(&mut answer);
        sessions.spawn(pipe(visitor, guest, grant));
    }
    let (mut parts, body) = answer.into_parts();
    strip_hops(&mut parts.headers);
    if let Some(protocol) = protocol.filter(|_| switched) {
        announce(&mut parts.headers, protocol);
    }
    // The visitor is answered in its own version, whatever the program speaks.
    parts.version = Version::default();
    parts.extensions.clear();
    Ok(Response::from_parts(parts, Body::new(body)))
}

/// Makes the head of a request the program's.
fn prepare(parts: &mut Parts, program: &Program, from: Option<IpAddr>) {
    if let Some(host) = host(parts).and_then(|it| HeaderValue::from_str(it).ok()) {
        // HTTP/2 has it beside the headers, and whoever has it there means that (RFC 9112, 3.2.2).
        parts.headers.insert(HOST, host);
    }
    dress(&mut parts.headers, from);
    parts.extensions.clear();
    let port = program.to.port;
    match program.speech {
        Speech::Http1 => {
            parts.version = Version::HTTP_11;
            parts.uri = inner_uri(&parts.uri, &format!("guest:{port}"));
        }
        Speech::Http2 => {
            parts.version = Version::HTTP_2;
            let named = parts.headers.remove(HOST);
            let named = named.as_ref().and_then(|it| it.to_str().ok());
            parts.uri = inner_uri(&parts.uri, named.unwrap_or("guest"));
            let trailers = HeaderValue::from_static(TRAILERS);
            parts.headers.insert(TE, trailers);
        }
    }
}

/// Carries bytes both ways until either side, or the visitor's key, comes to its end.
async fn pipe(visitor: OnUpgrade, guest: OnUpgrade, grant: Option<Arc<Grant>>) {
    let (Ok(visitor), Ok(guest)) = (visitor.await, guest.await) else {
        return;
    };
    let (mut visitor, mut guest) = (TokioIo::new(visitor), TokioIo::new(guest));
    let copied = io::copy_bidirectional(&mut visitor, &mut guest);
    let over = async {
        match &grant {
            Some(grant) => grant.ended().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        copied = copied => if let Err(err) = copied {
            debug!(%err, "an upgraded connection to a port broke");
        },
        () = over => debug!("an upgraded connection to a port ended with its key"),
    }
}

/// Says on one connection that it is to become one of another protocol.
fn announce(headers: &mut HeaderMap, protocol: HeaderValue) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, protocol);
}

/// Whether a change to this protocol is passed on. HTTP/2 would be one with the next hop alone, and nobody
/// needs the change any more (RFC 9113, 3.1): the request goes on as it is.
fn passes(protocol: &HeaderValue) -> bool {
    let words = protocol.to_str().unwrap_or_default().split(',');
    !words
        .map(str::trim)
        .any(|word| word.eq_ignore_ascii_case("h2c"))
}

/// The protocol that the sender would change to.
fn wants_upgrade(headers: &HeaderMap) -> Option<&HeaderValue> {
    let mut words = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|it| it.to_str().ok());
    let asked = words.any(|text| {
        text.split(',')
            .any(|it| it.trim().eq_ignore_ascii_case("upgrade"))
    });
    headers.get(UPGRADE).filter(|_| asked)
}

/// Path and query as they came, without a link's word, at `authority`.
fn inner_uri(uri: &Uri, authority: &str) -> Uri {
    let path = Some(uri.path())
        .filter(|path| path.starts_with('/'))
        .unwrap_or("/");
    let query = uri.query().map(without_link).filter(|it| !it.is_empty());
    let query = query.map(|it| format!("?{it}")).unwrap_or_default();
    let whole = format!("http://{authority}{path}{query}");
    // All of it comes out of a URI, or is one of ours.
    whole.parse().unwrap_or_default()
}

/// A query without a link's word, and else unchanged.
pub(super) fn without_link(query: &str) -> String {
    let is_link = |pair: &&str| pair.split_once('=').is_some_and(|(name, _)| name == LINK);
    let kept: Vec<&str> = query.split('&').filter(|pair| !is_link(pair)).collect();
    kept.join("&")
}

/// Headers as the guest shall see them: without what is between the visitor and us.
fn dress(headers: &mut HeaderMap, from: Option<IpAddr>) {
    strip_hops(headers);
    auth::strip(headers);
    headers.remove("wrenn-link");
    strip_cookie(headers);
    if let Some(from) = from {
        let before = headers.get(FORWARDED_FOR).and_then(|it| it.to_str().ok());
        let way = before.map_or_else(|| from.to_string(), |way| format!("{way}, {from}"));
        if let Ok(way) = HeaderValue::from_str(&way) {
            headers.insert(FORWARDED_FOR, way);
        }
    }
    if let Some(host) = headers.get(HOST).cloned() {
        headers.entry(FORWARDED_HOST).or_insert(host);
    }
    let proto = HeaderValue::from_static("http");
    headers.entry(FORWARDED_PROTO).or_insert(proto);
}

fn strip_hops(headers: &mut HeaderMap) {
    let named = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|it| it.to_str().ok());
    let named: Vec<HeaderName> = named
        .flat_map(|text| text.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP).chain([&UPGRADE]) {
        headers.remove(name);
    }
}

/// Takes our cookie out and leaves the others, in one header: of HTTP/2 each may come in its own, which is not for
/// programs of HTTP/1.1 (RFC 9113, 8.2.3).
fn strip_cookie(headers: &mut HeaderMap) {
    let all = headers.get_all(COOKIE);
    let pairs = all
        .iter()
        .flat_map(|it| it.as_bytes().split(|it| *it == b';'));
    let pairs: Vec<&[u8]> = pairs.map(<[u8]>::trim_ascii).collect();
    let is_ours = |pair: &&[u8]| {
        let rest = pair.strip_prefix(LINK.as_bytes());
        rest.is_some_and(|rest| rest.starts_with(b"="))
    };
    if all.iter().count() < 2 && !pairs.iter().any(is_ours) {
        return;
    }
    let kept: Vec<&[u8]> = pairs.into_iter().filter(|it| !is_ours(it)).collect();
    let kept = HeaderValue::from_bytes(&kept.join(&b"; "[..]));
    headers.remove(COOKIE);
    if let Ok(kept) = kept
        && !kept.is_empty()
    {
        headers.insert(COOKIE, kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let parsed = pairs.iter().map(|(name, value)| {
            let name: HeaderName = name.parse().expect("a name");
            (name, value.parse().expect("a value"))
        });
        let mut headers = HeaderMap::new();
        for (name, value) in parsed {
            headers.append(name, value);
        }
        headers
    }

    #[test]
    fn a_guest_sees_no_word_of_ours_and_no_header_of_the_last_hop() {
        let mut seen = headers(&[
            ("host", "80-cl-1.localhost"),
            ("connection", "close, X-Mine"),
            ("x-mine", "1"),
            ("te", "trailers"),
            ("x-api-key", "wrn_00000000000000000000000000000001"),
            ("cookie", "a=1; wrenn_link=word; b=2"),
            ("wrenn-link", "word"),
            ("x-forwarded-for", "10.0.0.1"),
            ("accept", "*/*"),
        ]);
        dress(&mut seen, Some("10.0.0.2".parse().expect("an address")));
        let left = headers(&[
            ("host", "80-cl-1.localhost"),
            ("cookie", "a=1; b=2"),
            ("x-forwarded-for", "10.0.0.1, 10.0.0.2"),
            ("x-forwarded-host", "80-cl-1.localhost"),
            ("x-forwarded-proto", "http"),
            ("accept", "*/*"),
        ]);
        assert_eq!(seen, left);
    }

    #[test]
    fn a_key_of_somebody_else_and_cookies_of_others_are_passed_on() {
        let same = [
            ("x-api-key", "theirs"),
            ("authorization", "Bearer theirs"),
            ("cookie", "a=1"),
        ];
        let mut seen = headers(&same);
        dress(&mut seen, None);
        for (name, value) in same {
            assert_eq!(seen[name], value);
        }
    }

    #[test]
    fn path_and_query_pass_unchanged_but_for_the_link() {
        let inner = |uri: &str| inner_uri(&uri.parse().expect("a URI"), "guest:80").to_string();
        assert_eq!(
            inner("/a//b/%2e/?x=%20&y"),
            "http://guest:80/a//b/%2e/?x=%20&y"
        );
        assert_eq!(inner("/?wrenn_link=word"), "http://guest:80/");
        assert_eq!(inner("/?a=1&wrenn_link=word&b"), "http://guest:80/?a=1&b");
        assert_eq!(inner("http://80-cl-1.localhost/a"), "http://guest:80/a");
        assert_eq!(inner("*"), "http://guest:80/");
    }

    #[test]
    fn cookies_that_come_one_by_one_go_on_as_one_and_ours_does_not() {
        let mut seen = headers(&[
            ("cookie", "a=1"),
            ("cookie", "wrenn_link=word"),
            ("cookie", "b=2; wrenn_links=3"),
        ]);
        strip_cookie(&mut seen);
        assert_eq!(seen, headers(&[("cookie", "a=1; b=2; wrenn_links=3")]));
        let mut ours = headers(&[("cookie", "wrenn_link=word")]);
        strip_cookie(&mut ours);
        assert_eq!(ours, HeaderMap::new());
    }

    #[test]
    fn grpc_alone_is_spoken_to_in_http_2() {
        let speech = |version, pairs: &[(&str, &str)]| {
            let mut request = Request::new(());
            *request.version_mut() = version;
            *request.headers_mut() = headers(pairs);
            Speech::of(&request.into_parts().0)
        };
        let te = ("te", "trailers");
        for kind in [
            "application/grpc",
            "application/grpc+proto",
            "application/grpc;x",
        ] {
            let asked = [te, ("content-type", kind)];
            assert_eq!(speech(Version::HTTP_2, &asked), Speech::Http2, "{kind}");
            assert_eq!(speech(Version::HTTP_11, &asked), Speech::Http1, "{kind}");
            assert_eq!(speech(Version::HTTP_2, &asked[1..]), Speech::Http1);
        }
        for kind in ["application/grpc-web+proto", "text/html"] {
            let asked = [te, ("content-type", kind)];
            assert_eq!(speech(Version::HTTP_2, &asked), Speech::Http1, "{kind}");
        }
    }

    #[test]
    fn a_change_to_http_2_goes_no_further() {
        for (protocol, passed) in [
            ("websocket", true),
            ("h2c", false),
            ("H2C, websocket", false),
        ] {
            let protocol = protocol.parse().expect("a value");
            assert_eq!(passes(&protocol), passed, "{protocol:?}");
        }
    }
}
