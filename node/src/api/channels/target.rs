//! Where a webhook may go. Pure, but for the question to the resolver.
//!
//! A channel's URL is a client's, and it is this node that goes there: to the host's own loopback, to
//! machines behind it, to the metadata service of a cloud, if nobody minds. So only public addresses
//! are taken, and what the operator names (`webhook_allow`). An address is looked at after its name
//! was resolved, and just that address is dialled: a name that means another one a moment later
//! changes nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use http::Uri;
use tokio::net::lookup_host;

use crate::net::Cidr;

/// IPv4 networks that are nobody's on the internet, or somebody's in particular.
const NOT_PUBLIC: [Cidr; 15] = [
    Cidr::new([0, 0, 0, 0], 8),
    Cidr::new([10, 0, 0, 0], 8),
    Cidr::new([100, 64, 0, 0], 10),
    Cidr::new([127, 0, 0, 0], 8),
    Cidr::new([169, 254, 0, 0], 16),
    Cidr::new([172, 16, 0, 0], 12),
    Cidr::new([192, 0, 0, 0], 24),
    Cidr::new([192, 0, 2, 0], 24),
    Cidr::new([192, 88, 99, 0], 24),
    Cidr::new([192, 168, 0, 0], 16),
    // Guests live here.
    Cidr::new([198, 18, 0, 0], 15),
    Cidr::new([198, 51, 100, 0], 24),
    Cidr::new([203, 0, 113, 0], 24),
    Cidr::new([224, 0, 0, 0], 4),
    Cidr::new([240, 0, 0, 0], 4),
];
/// Longest URL.
const MAX_URL_BYTES: usize = 2048;

/// Where a webhook goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) tls: bool,
    /// Path and query.
    pub(super) path: String,
    /// What the request says the host is.
    pub(super) authority: String,
}

/// Why nothing is sent there.
#[derive(Debug, thiserror::Error)]
pub(super) enum TargetError {
    /// It is no URL that can be posted to.
    #[error("the URL cannot be used: {0}")]
    Url(&'static str),
    /// Its name means no address.
    #[error("{host} has no address: {why}")]
    Unknown { host: String, why: String },
    /// It is not public.
    #[error(
        "{host} is {address}, which is not public; an operator may allow it with `webhook_allow`"
    )]
    Private { host: String, address: IpAddr },
}

impl Target {
    /// Reads a URL.
    pub(super) fn parse(url: &str) -> Result<Self, TargetError> {
        if url.len() > MAX_URL_BYTES {
            return Err(TargetError::Url("it is longer than 2048 bytes"));
        }
        let uri: Uri = url.parse().map_err(|_| TargetError::Url("it is none"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(TargetError::Url("it must begin with https:// or http://")),
        };
        let authority = uri
            .authority()
            .ok_or(TargetError::Url("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(TargetError::Url(
                "it holds a password; sign with the secret instead",
            ));
        }
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        if host.is_empty() {
            return Err(TargetError::Url("it names no host"));
        }
        let default_port = if tls { 443 } else { 80 };
        let path = uri.path_and_query().map_or("/", |it| it.as_str());
        Ok(Self {
            host,
            port: authority.port_u16().unwrap_or(default_port),
            tls,
            path: path.to_owned(),
            authority: authority.as_str().to_owned(),
        })
    }

    /// The address to dial; none that may not be.
    pub(super) async fn resolve(&self, allowed: &[Cidr]) -> Result<SocketAddr, TargetError> {
        let unknown = |why: String| TargetError::Unknown {
            host: self.host.clone(),
            why,
        };
        let found = lookup_host((self.host.as_str(), self.port)).await;
        let found: Vec<SocketAddr> = found.map_err(|err| unknown(err.to_string()))?.collect();
        let first = found
            .first()
            .ok_or_else(|| unknown("it names none".into()))?;
        // One that is not public condemns them all: which is dialled would be a matter of luck.
        let refused = found.iter().find(|it| !may_go(it.ip(), allowed));
        match refused {
            None => Ok(*first),
            Some(address) => Err(TargetError::Private {
                host: self.host.clone(),
                address: address.ip(),
            }),
        }
    }
}

/// Whether a webhook may go to `address`.
fn may_go(address: IpAddr, allowed: &[Cidr]) -> bool {
    match address {
        IpAddr::V4(address) => allowed.iter().any(|it| it.contains(address)) || is_public(address),
        IpAddr::V6(address) => match address.to_ipv4_mapped() {
            Some(mapped) => may_go(mapped.into(), allowed),
            None => is_public_v6(address),
        },
    }
}

fn is_public(address: Ipv4Addr) -> bool {
    !NOT_PUBLIC.iter().any(|it| it.contains(address))
}

/// Of IPv6 only 2000::/3 is given out to the public, and of that not the ways into IPv4 or examples.
fn is_public_v6(address: Ipv6Addr) -> bool {
    let [first, second, ..] = address.segments();
    let is_global = first & 0xe000 == 0x2000;
    let leads_elsewhere = first == 0x2002 || (first, second) == (0x2001, 0);
    is_global && !leads_elsewhere && (first, second) != (0x2001, 0x0db8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_are_gone_to() {
        let goes = |text: &str| may_go(text.parse().expect("an address"), &[]);
        for public in [
            "1.1.1.1",
            "93.184.216.34",
            "2606:4700::1111",
            "::ffff:1.1.1.1",
        ] {
            assert!(goes(public), "{public}");
        }
        for private in [
            "127.0.0.1",
            "10.1.2.3",
            "169.254.169.254",
            "192.168.0.1",
            "172.31.255.255",
            "100.64.0.1",
            "198.18.0.1",
            "0.0.0.0",
            "255.255.255.255",
            "224.0.0.1",
            "::1",
            "::",
            "::ffff:127.0.0.1",
            "::7f00:1",
            "fe80::1",
            "fd00::1",
            "ff02::1",
            "2002:7f00:1::",
            "64:ff9b::a9fe:a9fe",
        ] {
            assert!(!goes(private), "{private}");
        }
    }

    #[test]
    fn the_operator_may_allow_a_network() {
        let allowed = [Cidr::new([10, 0, 0, 0], 8)];
        assert!(may_go("10.9.9.9".parse().expect("an address"), &allowed));
        assert!(!may_go(
            "192.168.1.1".parse().expect("an address"),
            &allowed
        ));
    }

    #[test]
    fn a_url_says_whereto_and_how() {
        let target = Target::parse("https://hooks.example.org/a?b=c").expect("a URL");
        assert_eq!((target.port, target.tls), (443, true));
        assert_eq!(target.path, "/a?b=c");
        let target = Target::parse("http://[2606:4700::1]:8080").expect("a URL");
        assert_eq!((target.host.as_str(), target.port), ("2606:4700::1", 8080));
        assert_eq!(target.path, "/");
        let long = format!("http://a/{}", "x".repeat(3000));
        for bad in [
            "",
            "ftp://a",
            "/a",
            "http://",
            "http://u:p@a/",
            "file:///etc/passwd",
            &long,
        ] {
            assert!(Target::parse(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_number_that_hides_loopback_is_refused_too() {
        for url in ["http://127.1/", "http://2130706433/", "http://localhost/"] {
            let target = Target::parse(url).expect("a URL");
            let refused = target.resolve(&[]).await;
            assert!(refused.is_err(), "{url}: {refused:?}");
        }
    }
}
