//! Our options on the kernel's command line. Pure.

use std::net::Ipv4Addr;

/// What the host may set; every option has a default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Block device of the root file system.
    pub root: String,
    /// The guest's address and the length of its network prefix.
    pub address: Ipv4Addr,
    /// See [`Self::address`].
    pub prefix: u8,
    /// Where everything else is reached through.
    pub gateway: Ipv4Addr,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// The guest's name.
    pub hostname: String,
    /// Only prove that guests run at all.
    pub probe: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            root: "/dev/vda".to_owned(),
            address: Ipv4Addr::new(169, 254, 0, 21),
            prefix: 30,
            gateway: Ipv4Addr::new(169, 254, 0, 22),
            dns: vec![Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(8, 8, 4, 4)],
            hostname: "capsule".to_owned(),
            probe: false,
        }
    }
}

impl Options {
    /// Reads the options out of `/proc/cmdline`; words that are not ours are skipped.
    ///
    /// # Errors
    /// The word that cannot be understood.
    pub fn parse(cmdline: &str) -> Result<Self, String> {
        let mut options = Self::default();
        for word in cmdline.split_ascii_whitespace() {
            let Some((name, value)) = word.strip_prefix("wrenn.").and_then(|w| w.split_once('='))
            else {
                continue;
            };
            options.set(name, value).ok_or_else(|| word.to_owned())?;
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &str) -> Option<()> {
        match name {
            "root" => self.root = Some(value.to_owned()).filter(|path| path.starts_with('/'))?,
            "ip" => {
                let (address, prefix) = value.split_once('/')?;
                self.address = address.parse().ok()?;
                self.prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
            }
            "gw" => self.gateway = value.parse().ok()?,
            "dns" => {
                let servers = value.split(',').filter(|server| !server.is_empty());
                self.dns = servers
                    .map(|server| server.parse().ok())
                    .collect::<Option<_>>()?;
            }
            "hostname" => value.clone_into(&mut self.hostname),
            "probe" => self.probe = value == "1",
            // An option of a newer host; this agent does not know what it misses.
            _ => {}
        }
        Some(())
    }

    /// The network mask of [`Self::prefix`].
    #[must_use]
    pub fn mask(&self) -> Ipv4Addr {
        let host_bits = 32 - u32::from(self.prefix);
        Ipv4Addr::from_bits(u32::MAX.checked_shl(host_bits).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn absent_options_have_their_defaults() {
        let options = Options::parse("console=ttyS0 quiet wrenn.future=1\n");
        assert_eq!(options, Ok(Options::default()));
        assert_eq!(Options::default().mask(), Ipv4Addr::new(255, 255, 255, 252));
    }

    #[test]
    fn every_option_is_read() {
        let text = "wrenn.root=/dev/vdb wrenn.ip=10.0.2.15/24 wrenn.gw=10.0.2.2 wrenn.dns=1.1.1.1 \
                    wrenn.hostname=box wrenn.probe=1";
        let options = Options::parse(text).expect("well formed");
        assert_eq!(
            (options.root.as_str(), options.hostname.as_str()),
            ("/dev/vdb", "box")
        );
        assert_eq!(
            (options.address, options.prefix),
            (Ipv4Addr::new(10, 0, 2, 15), 24)
        );
        assert_eq!(options.gateway, Ipv4Addr::new(10, 0, 2, 2));
        assert_eq!(options.dns, [Ipv4Addr::new(1, 1, 1, 1)]);
        assert!(options.probe);
    }

    #[test]
    fn malformed_option_is_named() {
        for word in [
            "wrenn.ip=10.0.2.15",
            "wrenn.ip=1.2.3.4/33",
            "wrenn.gw=x",
            "wrenn.root=vda",
        ] {
            assert_eq!(Options::parse(word), Err(word.to_owned()));
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_without_panic(text in "(wrenn\\.[a-z]{1,8}=.{0,20} ?){0,4}") {
            if let Ok(options) = Options::parse(&text) {
                let _ = options.mask();
            }
        }
    }
}
