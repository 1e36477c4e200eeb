//! Which encoding an answer may have. Pure.

/// How a body is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As it is.
    Identity,
    /// Compressed.
    Gzip,
}

/// Weights the client gave, in thousandths.
#[derive(Debug, Default)]
struct Weights {
    gzip: Option<u16>,
    identity: Option<u16>,
    any: Option<u16>,
}

/// Chooses by an `Accept-Encoding` header; `None` when the client excludes both. The heavier
/// weight wins. With equal weights compression does, when it was asked for by name.
#[must_use]
pub fn choose(header: Option<&str>) -> Option<Encoding> {
    let Some(header) = header.filter(|header| !header.trim().is_empty()) else {
        return Some(Encoding::Identity);
    };
    let weights = Weights::parse(header);
    let gzip = weights
        .gzip
        .or(weights.any.map(|any| any.min(1)))
        .unwrap_or(0);
    // Unnamed, identity is acceptable, but less than anything that was named.
    let identity = weights
        .identity
        .or(weights.any)
        .unwrap_or(u16::from(gzip == 0 || weights.gzip.is_some()));
    match (gzip, identity) {
        (0, 0) => None,
        (gzip, identity) if gzip >= identity && (weights.gzip.is_some() || identity == 0) => {
            Some(Encoding::Gzip)
        }
        _ => Some(Encoding::Identity),
    }
}

/// Whether the client takes an answer as it is: the only choice for parts of a file.
#[must_use]
pub fn accepts_identity(header: Option<&str>) -> bool {
    let weights = Weights::parse(header.unwrap_or_default());
    weights.identity.or(weights.any) != Some(0)
}

impl Weights {
    fn parse(header: &str) -> Self {
        let mut weights = Self::default();
        for item in header.split(',') {
            let mut parts = item.split(';').map(str::trim);
            let coding = parts.next().unwrap_or_default().to_ascii_lowercase();
            let weight = parts.find_map(|part| part.strip_prefix("q=").or(part.strip_prefix("Q=")));
            let weight = Some(weight.map_or(1000, thousandths));
            match coding.as_str() {
                "gzip" | "x-gzip" => weights.gzip = weight,
                "identity" => weights.identity = weight,
                "*" => weights.any = weight,
                _ => {}
            }
        }
        weights
    }
}

/// A weight between 0 and 1; what is no number counts as not acceptable.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // clamped to 0..=1000
fn thousandths(text: &str) -> u16 {
    text.parse::<f64>()
        .map_or(0, |weight| (weight.clamp(0.0, 1.0) * 1000.0) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn heavier_weight_wins_and_gzip_is_the_normal_case() {
        use Encoding::{Gzip, Identity};
        for (header, expected) in [
            (None, Some(Identity)),
            (Some(""), Some(Identity)),
            (Some("gzip, deflate"), Some(Gzip)),
            (Some("gzip, deflate, br, zstd"), Some(Gzip)),
            (Some("gzip"), Some(Gzip)),
            (Some("identity"), Some(Identity)),
            (Some("br"), Some(Identity)),
            (Some("*"), Some(Identity)),
            (Some("gzip;q=0.5, identity"), Some(Identity)),
            (Some("gzip;q=0.5, identity;q=0.2"), Some(Gzip)),
            (Some("gzip;q=0"), Some(Identity)),
            (Some("identity;q=0"), None),
            (Some("identity;q=0, gzip"), Some(Gzip)),
            (Some("identity;q=0, *"), Some(Gzip)),
            (Some("gzip;q=0, identity;q=0"), None),
            (Some("*;q=0"), None),
            (Some("br, *;q=0"), None),
        ] {
            assert_eq!(choose(header), expected, "{header:?}");
        }
    }

    #[test]
    fn identity_is_excluded_only_by_weight_zero() {
        assert!(accepts_identity(None) && accepts_identity(Some("gzip")));
        assert!(!accepts_identity(Some("identity;q=0")) && !accepts_identity(Some("*;q=0")));
        assert!(accepts_identity(Some("*;q=0, identity;q=0.1")));
    }

    proptest! {
        #[test]
        fn any_header_is_parsed_without_panic(header in ".{0,40}") {
            let _ = choose(Some(&header));
            let _ = accepts_identity(Some(&header));
        }
    }
}
