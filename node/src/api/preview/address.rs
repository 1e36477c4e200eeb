//! Which port of which capsule a request is meant for, by its host name or its headers.

use axum::http::HeaderMap;
use axum::http::header::HOST;
use axum::http::request::Parts;
use proto::ids::SandboxId;

/// Headers that name capsule and port where no host name can.
const BY_HEADER: [(&str, &str); 2] = [
    ("wrenn-capsule-id", "wrenn-capsule-port"),
    ("e2b-sandbox-id", "e2b-sandbox-port"),
];

/// A port of a capsule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) id: SandboxId,
    pub(super) port: u16,
}

/// Where a request wants to go; `None` for the interface itself, and words for what is neither.
pub(super) fn address(parts: &Parts) -> Option<Result<Address, String>> {
    let label = host(parts).and_then(|host| host.split(['.', ':']).next());
    if let Some((port, id)) = label.and_then(capsule_label) {
        return Some(parse(port, id));
    }
    BY_HEADER
        .iter()
        .find_map(|names| by_header(&parts.headers, *names))
}

/// The host that a request names, with its port.
pub(super) fn host(parts: &Parts) -> Option<&str> {
    let named = parts
        .uri
        .authority()
        .map(axum::http::uri::Authority::as_str);
    named.or_else(|| parts.headers.get(HOST)?.to_str().ok())
}

/// `label` in two, if it is `<digits>-cl-<letters and digits>`.
fn capsule_label(label: &str) -> Option<(&str, &str)> {
    let (port, id) = label.split_once('-')?;
    let is_port = !port.is_empty() && port.bytes().all(|it| it.is_ascii_digit());
    (is_port && id.starts_with("cl-")).then_some((port, id))
}

fn by_header(headers: &HeaderMap, names: (&str, &str)) -> Option<Result<Address, String>> {
    let text = |name| Some(headers.get(name)?.to_str().unwrap_or_default());
    match (text(names.0), text(names.1)) {
        (None, None) => None,
        (Some(id), Some(port)) => Some(parse(port, id)),
        (None, Some(_)) => Some(Err(format!("the header {} is missing", names.0))),
        (Some(_), None) => Some(Err(format!("the header {} is missing", names.1))),
    }
}

fn parse(port: &str, id: &str) -> Result<Address, String> {
    let in_range = port.parse().ok().filter(|port| *port != 0);
    let port = in_range.ok_or_else(|| format!("{port:?} is not a port: 1 to 65535"))?;
    let id = id
        .parse()
        .map_err(|err: proto::ids::ParseIdError| err.to_string())?;
    Ok(Address { id, port })
}

#[cfg(test)]
mod tests {
    use axum::http::Request;
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "cl-0000000000000000000000001";

    fn of(headers: &[(&str, &str)]) -> Option<Result<Address, String>> {
        let mut request = Request::get("/path");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        address(&request.body(()).expect("a request").into_parts().0)
    }

    #[test]
    fn a_host_name_and_either_pair_of_headers_name_a_port() {
        let there = Some(Ok(Address {
            id: ID.parse().expect("an id"),
            port: 80,
        }));
        for host in [
            "example.com",
            "example.com:8080",
            "localhost",
            "localhost:1",
        ] {
            assert_eq!(of(&[("host", &format!("80-{ID}.{host}"))]), there);
        }
        assert_eq!(of(&[("host", &format!("80-{ID}"))]), there);
        let by_header = [("wrenn-capsule-id", ID), ("wrenn-capsule-port", "80")];
        assert_eq!(of(&by_header), there);
        let by_other = [("e2b-sandbox-id", ID), ("e2b-sandbox-port", "80")];
        assert_eq!(of(&by_other), there);
        let host = format!("80-{ID}.localhost");
        let both = [("host", &*host), ("e2b-sandbox-id", "x")];
        assert_eq!(of(&both), there, "the host name decides");
    }

    #[test]
    fn other_hosts_are_the_interface() {
        for host in [
            "",
            "localhost:80",
            "127.0.0.1",
            "80-x.localhost",
            "a-cl-1.x",
            "-cl-1.x",
        ] {
            assert_eq!(of(&[("host", host)]), None, "{host}");
        }
        assert_eq!(of(&[]), None);
    }

    #[test]
    fn what_names_no_port_or_no_capsule_is_told_in_words() {
        for host in ["0-cl-1.x", "65536-cl-1.x", "99999999999999999999-cl-1.x"] {
            let refused = of(&[("host", host)]).expect("for a capsule");
            assert!(refused.expect_err(host).contains("is not a port"));
        }
        assert!(
            of(&[("host", "80-cl-1.x")])
                .expect("for a capsule")
                .is_err()
        );
        assert!(
            of(&[("wrenn-capsule-id", ID)])
                .expect("for a capsule")
                .is_err()
        );
    }

    proptest! {
        #[test]
        fn no_host_makes_it_panic(host in "[ -~]*", port in "[0-9]{0,8}") {
            let _any = of(&[("host", &host)]);
            let _near = of(&[("host", &format!("{port}-cl-{}", host.replace(' ', "")))]);
        }
    }
}
