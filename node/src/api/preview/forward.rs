//! Passing a request on to a port of a guest, and its answer back: bodies stream, upgrades become pipes.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{
    CONNECTION, COOKIE, HOST, HeaderName, HeaderValue, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE,
    TRANSFER_ENCODING, UPGRADE,
};
use axum::http::{HeaderMap, StatusCode, Uri, Version};
use axum::response::Response;
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use proto::epoch::Epoch;
use proto::ids::SandboxId;
use tokio::io;
use tracing::debug;

use super::super::auth;
use super::super::grants::Grant;
use super::super::streams::Sessions;
use super::address::Address;
use super::pass::LINK;
use crate::guest::{Guest, PortClient};

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
const FORWARDED_FOR: &str = "x-forwarded-for";
const FORWARDED_HOST: &str = "x-forwarded-host";
const FORWARDED_PROTO: &str = "x-forwarded-proto";

/// Which clients are kept: the guest of one ownership, and its port.
type PortOf = (SandboxId, Epoch, u16);

/// The connections to ports that were visited last.
#[derive(Debug, Default)]
pub(in crate::api) struct Kept {
    /// The last used is last.
    clients: Mutex<Vec<(PortOf, PortClient)>>,
}

impl Kept {
    /// The client of a port of `guest`, which runs under `epoch`.
    pub(super) fn client(&self, to: Address, epoch: Epoch, guest: &Guest) -> PortClient {
        let wanted = (to.id, epoch, to.port);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let known = clients.iter().position(|(of, _)| *of == wanted);
        let client = known.map_or_else(
            || PortClient::new(&guest.dial().at_port(to.port)),
            |at| clients.remove(at).1,
        );
        // Clients of former owners are of no use any more.
        clients.retain(|((id, of, _), _)| *id != to.id || *of == epoch);
        if clients.len() >= KEPT_PORTS {
            clients.remove(0);
        }
        clients.push((wanted, client.clone()));
        client
    }
}

/// Sends `request` to the port behind `client`.
pub(super) async fn forward(
    client: &PortClient,
    to: Address,
    from: Option<IpAddr>,
    (sessions, grant): (&Sessions, Option<Arc<Grant>>),
    mut request: Request,
) -> Result<Response, hyper_util::client::legacy::Error> {
    let upgrade = wants_upgrade(request.headers()).cloned();
    let visitor = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    let (mut parts, body) = request.into_parts();
    parts.uri = inner_uri(&parts.uri, to.port);
    // Inside, it is spoken as most programs do.
    parts.version = Version::HTTP_11;
    parts.extensions.clear();
    dress(&mut parts.headers, from);
    if let Some(protocol) = upgrade {
        parts
            .headers
            .insert(CONNECTION, HeaderValue::from_static("upgrade"));
        parts.headers.insert(UPGRADE, protocol);
    }
    let body = body.map_err(Into::into).boxed_unsync();
    let mut answer = client.send(Request::from_parts(parts, body)).await?;
    let switched = answer.status() == StatusCode::SWITCHING_PROTOCOLS;
    let protocol = wants_upgrade(answer.headers()).cloned();
    if let Some(visitor) = visitor.filter(|_| switched) {
        let guest = hyper::upgrade::on(&mut answer);
        sessions.spawn(async move {
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
        });
    }
    let (mut parts, body) = answer.into_parts();
    strip_hops(&mut parts.headers);
    if let Some(protocol) = protocol.filter(|_| switched) {
        parts
            .headers
            .insert(CONNECTION, HeaderValue::from_static("upgrade"));
        parts.headers.insert(UPGRADE, protocol);
    }
    parts.extensions.clear();
    Ok(Response::from_parts(parts, Body::new(body)))
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

/// Path and query as they came, without a link's word.
fn inner_uri(uri: &Uri, port: u16) -> Uri {
    let path = Some(uri.path())
        .filter(|path| path.starts_with('/'))
        .unwrap_or("/");
    let query = uri.query().map(without_link).filter(|it| !it.is_empty());
    let query = query.map(|it| format!("?{it}")).unwrap_or_default();
    let whole = format!("http://guest:{port}{path}{query}");
    // Both parts come out of a URI.
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

/// Takes our cookie out and leaves the others.
fn strip_cookie(headers: &mut HeaderMap) {
    let texts: Vec<String> = headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|it| it.to_str().ok())
        .filter(|text| text.contains(LINK))
        .map(str::to_owned)
        .collect();
    if texts.is_empty() {
        return;
    }
    let is_ours = |pair: &&str| {
        pair.trim()
            .split_once('=')
            .is_some_and(|(name, _)| name == LINK)
    };
    let kept = texts
        .iter()
        .flat_map(|text| text.split(';'))
        .filter(|pair| !is_ours(pair));
    let kept = kept.map(str::trim).collect::<Vec<_>>().join("; ");
    headers.remove(COOKIE);
    if !kept.is_empty()
        && let Ok(kept) = HeaderValue::from_str(&kept)
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
        let inner = |uri: &str| inner_uri(&uri.parse().expect("a URI"), 80).to_string();
        assert_eq!(
            inner("/a//b/%2e/?x=%20&y"),
            "http://guest:80/a//b/%2e/?x=%20&y"
        );
        assert_eq!(inner("/?wrenn_link=word"), "http://guest:80/");
        assert_eq!(inner("/?a=1&wrenn_link=word&b"), "http://guest:80/?a=1&b");
        assert_eq!(inner("http://80-cl-1.localhost/a"), "http://guest:80/a");
        assert_eq!(inner("*"), "http://guest:80/");
    }
}
