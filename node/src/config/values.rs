//! Values that are written as text: networks, periods and choices.

use std::fmt;
use std::net::Ipv4Addr;
use std::ops::Deref;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Why a text is not a value of its kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadText(pub(super) String);

/// Which driver runs guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmChoice {
    /// The best one that works here.
    #[default]
    Auto,
    /// QEMU.
    Qemu,
    /// Cloud Hypervisor. Known by name and refused until it exists.
    CloudHypervisor,
}

/// What executes guest code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AcceleratorChoice {
    /// The best one that really boots a guest here.
    #[default]
    Auto,
    /// The processor itself.
    Kvm,
    /// Emulation.
    Tcg,
}

impl FromStr for VmmChoice {
    type Err = BadText;

    fn from_str(text: &str) -> Result<Self, BadText> {
        match text {
            "auto" => Ok(Self::Auto),
            "qemu" => Ok(Self::Qemu),
            "cloud-hypervisor" => Ok(Self::CloudHypervisor),
            _ => Err(BadText("expected auto, qemu or cloud-hypervisor".into())),
        }
    }
}

impl FromStr for AcceleratorChoice {
    type Err = BadText;

    fn from_str(text: &str) -> Result<Self, BadText> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            _ => Err(BadText("expected auto, kvm or tcg".into())),
        }
    }
}

/// An IPv4 network, written `10.0.0.0/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    /// Its first address.
    pub network: Ipv4Addr,
    /// How many leading bits its addresses share.
    pub prefix: u8,
}

impl FromStr for Cidr {
    type Err = BadText;

    fn from_str(text: &str) -> Result<Self, BadText> {
        let bad = || BadText("expected an IPv4 network such as 10.0.0.0/8".into());
        let (address, prefix) = text.split_once('/').unwrap_or((text, "32"));
        let network: Ipv4Addr = address.parse().map_err(|_| bad())?;
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        let host_bits = 32_u32.checked_sub(prefix.into()).ok_or_else(bad)?;
        let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
        let first = Ipv4Addr::from_bits(network.to_bits() & mask);
        if first != network {
            return Err(BadText(format!(
                "{address} is not the first address of its network, which is {first}/{prefix}"
            )));
        }
        Ok(Self { network, prefix })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl TryFrom<String> for Cidr {
    type Error = BadText;

    fn try_from(text: String) -> Result<Self, BadText> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

/// The token of a cluster to join. Whoever has it may join, so it is never shown: neither by
/// `Debug` nor when a configuration is printed.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct JoinToken(String);

/// What stands in the place of a token where one would be shown.
const NOT_SHOWN: &str = "(not shown)";

impl FromStr for JoinToken {
    type Err = BadText;

    fn from_str(text: &str) -> Result<Self, BadText> {
        let text = text.trim();
        if text.is_empty() || text.contains(char::is_whitespace) {
            return Err(BadText("expected one word without spaces".into()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl Deref for JoinToken {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NOT_SHOWN)
    }
}

impl Serialize for JoinToken {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(NOT_SHOWN)
    }
}

/// A tag of a node, written `key=value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Letters, digits, `.`, `_`, `-` and `/`; `zone` is what fails together.
    pub key: String,
    /// The same characters.
    pub value: String,
}

/// Longest key and longest value of a tag: tags are replicated to every node.
const TAG_CHARS: usize = 64;

impl Tag {
    /// A tag, if both texts fit one.
    ///
    /// # Errors
    /// [`BadText`] says what fits.
    pub fn new(key: &str, value: &str) -> Result<Self, BadText> {
        let plain = |it: char| it.is_ascii_alphanumeric() || matches!(it, '.' | '_' | '-' | '/');
        let fits =
            |text: &str| !text.is_empty() && text.len() <= TAG_CHARS && text.chars().all(plain);
        if fits(key) && fits(value) {
            let (key, value) = (key.to_owned(), value.to_owned());
            return Ok(Self { key, value });
        }
        let why = "expected key=value, each of up to 64 letters, digits, '.', '_', '-' and '/'";
        Err(BadText(why.into()))
    }

    /// Key and value.
    #[must_use]
    pub fn into_pair(self) -> (String, String) {
        (self.key, self.value)
    }
}

impl FromStr for Tag {
    type Err = BadText;

    fn from_str(text: &str) -> Result<Self, BadText> {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        Self::new(key, value)
    }
}

/// A length of time, written `500ms`, `90s`, `5m`, `24h` or `7d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Period(pub Duration);

/// Units of a period with their milliseconds, the largest first.
const UNITS: [(&str, u64); 5] = [
    ("d", 24 * 3600 * 1000),
    ("h", 3600 * 1000),
    ("m", 60 * 1000),
    ("s", 1000),
    ("ms", 1),
];

impl FromStr for Period {
    type Err = BadText;

    fn from_str(text: &str) -> Result<Self, BadText> {
        let bad = || BadText("expected a time such as 500ms, 90s, 5m, 24h or 7d".into());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| bad())?;
        let unit = UNITS.iter().find(|(name, _)| *name == unit);
        let (_, unit_ms) = unit.ok_or_else(bad)?;
        let ms = number.checked_mul(*unit_ms).ok_or_else(bad)?;
        Ok(Self(Duration::from_millis(ms)))
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        let fits = |unit_ms: u64| ms.is_multiple_of(u128::from(unit_ms));
        // The last unit fits always.
        let unit = UNITS.iter().find(|(_, unit_ms)| ms > 0 && fits(*unit_ms));
        let (name, unit_ms) = unit.unwrap_or(&UNITS[3]);
        write!(f, "{}{name}", ms / u128::from(*unit_ms))
    }
}

impl TryFrom<String> for Period {
    type Error = BadText;

    fn try_from(text: String) -> Result<Self, BadText> {
        text.parse()
    }
}

impl From<Period> for String {
    fn from(period: Period) -> Self {
        period.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn networks_with_host_bits_are_refused_with_the_network_meant() {
        let err = "10.1.2.3/8".parse::<Cidr>().expect_err("it was accepted");
        assert!(err.to_string().contains("10.0.0.0/8"), "{err}");
        for bad in [
            "",
            "/",
            "10.0.0.0/33",
            "10.0.0.0/-1",
            "10.0.0/8",
            "::/0",
            "a/8",
        ] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
        for good in ["0.0.0.0/0", "192.0.2.1", "255.255.255.255/32"] {
            assert!(good.parse::<Cidr>().is_ok(), "{good}");
        }
    }

    #[test]
    fn periods_need_a_number_and_a_unit() {
        for bad in [
            "",
            "s",
            "10",
            "-1s",
            "1.5h",
            "1w",
            "99999999999999999d",
            "1 s",
        ] {
            assert!(bad.parse::<Period>().is_err(), "{bad}");
        }
        assert_eq!("24h".parse(), Ok(Period(Duration::from_secs(86_400))));
        assert_eq!(Period(Duration::ZERO).to_string(), "0s");
    }

    #[test]
    fn a_join_token_shows_nothing_of_itself() {
        let token: JoinToken = " wj1.secret\n".parse().expect("a token");
        assert_eq!(&*token, "wj1.secret");
        assert!(!format!("{token:?}").contains("secret"));
        assert!(
            !serde_json::to_string(&token)
                .expect("JSON")
                .contains("secret")
        );
        assert!("".parse::<JoinToken>().is_err() && "a b".parse::<JoinToken>().is_err());
    }

    #[test]
    fn tags_need_a_key_and_a_value_of_plain_characters() {
        let tag: Tag = "zone=eu/1".parse().expect("a tag");
        assert_eq!(tag.into_pair(), ("zone".into(), "eu/1".into()));
        for bad in ["", "zone", "=a", "zone=", "a=b=c", "a b=c", "zone=\u{e4}"] {
            assert!(bad.parse::<Tag>().is_err(), "{bad}");
        }
        assert!(Tag::new(&"k".repeat(65), "v").is_err());
    }

    proptest! {
        #[test]
        fn periods_survive_being_written_and_read(ms in 0..u64::from(u32::MAX)) {
            let period = Period(Duration::from_millis(ms));
            prop_assert_eq!(period.to_string().parse(), Ok(period));
        }

        #[test]
        fn networks_survive_being_written_and_read(bits: u32, prefix in 0..=32_u8) {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            let cidr = Cidr { network: Ipv4Addr::from_bits(bits & mask), prefix };
            prop_assert_eq!(cidr.to_string().parse(), Ok(cidr));
        }

        #[test]
        fn no_text_makes_a_reader_panic(text in ".{0,30}") {
            let _ = (text.parse::<Cidr>(), text.parse::<Period>(), text.parse::<Tag>());
        }
    }
}
