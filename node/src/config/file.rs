//! A configuration as written: in a file, the environment or arguments. Every setting may be
//! absent; unknown keys of a file are refused by name.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;

use super::error::ConfigError;
use super::values::{AcceleratorChoice, BadText, Cidr, JoinToken, Period, Tag, VmmChoice};

/// What one source says. In TOML every field is a key of the same name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Written {
    /// Where the node keeps its state.
    pub data_dir: Option<PathBuf>,
    /// Where kernel, initramfs and templates lie.
    pub images_dir: Option<PathBuf>,
    /// What people call the node.
    pub name: Option<String>,
    /// Where the API listens (TCP).
    pub listen: Option<SocketAddr>,
    /// Where the node listens for peers (UDP).
    pub cluster_listen: Option<SocketAddr>,
    /// Where bulk transfers arrive (UDP); the port after `cluster_listen` where absent.
    pub bulk_listen: Option<SocketAddr>,
    /// Where peers dial the node, if that differs.
    pub advertise: Option<SocketAddr>,
    /// The token of a cluster to join, or `@` and a file that holds it.
    pub join: Option<JoinToken>,
    /// What placement may ask for; `zone` is what fails together.
    pub tags: Option<BTreeMap<String, String>>,
    /// Where clients reach the API.
    pub public_url: Option<String>,
    /// Which driver runs guests.
    pub vmm: Option<VmmChoice>,
    /// What executes guest code.
    pub accelerator: Option<AcceleratorChoice>,
    /// The QEMU program.
    pub qemu: Option<PathBuf>,
    /// The Cloud Hypervisor program.
    pub cloud_hypervisor: Option<PathBuf>,
    /// Index of the first network slot; nodes on one host need ranges of their own.
    pub slot_base: Option<u16>,
    /// How many network slots, and so capsules, there can be.
    pub slot_count: Option<u16>,
    /// How many slots are made in advance.
    pub slot_pool: Option<u16>,
    /// Networks that capsules may reach although they are private.
    pub egress_allow: Option<Vec<Cidr>>,
    /// Networks that webhooks may reach although they are not public.
    pub webhook_allow: Option<Vec<Cidr>>,
    /// What the node offers to capsules.
    pub capacity: WrittenCapacity,
    /// Longest a guest may take to boot.
    pub boot_timeout: Option<Period>,
    /// How long records of ended capsules are kept.
    pub ended_retention: Option<Period>,
    /// Guests that start from one that had just booted.
    pub warm: WrittenWarm,
}

/// When a new capsule skips its boot, as far as it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WrittenWarm {
    /// Whether it starts from a guest that had just booted, where there is one.
    pub create: Option<bool>,
}

/// What a node offers, as far as it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WrittenCapacity {
    /// Virtual processors.
    pub vcpus: Option<u32>,
    /// Memory in MiB.
    pub memory_mib: Option<u32>,
    /// Root disks in MiB.
    pub disk_mib: Option<u32>,
}

impl Written {
    /// What a TOML file says.
    ///
    /// # Errors
    /// [`ConfigError::Read`] and [`ConfigError::Parse`] name the file.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    /// What the environment says; `lookup` finds a variable.
    ///
    /// # Errors
    /// [`ConfigError::Value`] names the variable.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let env = Env(lookup);
        let egress = env.parsed::<List<Cidr>>("WRENN_EGRESS_ALLOW")?;
        let webhooks = env.parsed::<List<Cidr>>("WRENN_WEBHOOK_ALLOW")?;
        let tags = env.parsed::<List<Tag>>("WRENN_NODE_TAGS")?;
        Ok(Self {
            data_dir: env.parsed("WRENN_DATA_DIR")?,
            images_dir: env.parsed("WRENN_IMAGES")?,
            name: env.parsed("WRENN_NODE_NAME")?,
            listen: env.parsed("WRENN_LISTEN")?,
            cluster_listen: env.parsed("WRENN_CLUSTER_LISTEN")?,
            bulk_listen: env.parsed("WRENN_BULK_LISTEN")?,
            advertise: env.parsed("WRENN_ADVERTISE")?,
            join: env.token("WRENN_JOIN_TOKEN")?,
            tags: tags.map(|list| list.0.into_iter().map(Tag::into_pair).collect()),
            public_url: env.parsed("WRENN_PUBLIC_URL")?,
            vmm: env.parsed("WRENN_VMM")?,
            accelerator: env.parsed("WRENN_ACCELERATOR")?,
            qemu: env.parsed("WRENN_QEMU")?,
            cloud_hypervisor: env.parsed("WRENN_CLOUD_HYPERVISOR")?,
            slot_base: env.parsed("WRENN_SLOT_BASE")?,
            slot_count: env.parsed("WRENN_SLOT_COUNT")?,
            slot_pool: env.parsed("WRENN_SLOT_POOL")?,
            egress_allow: egress.map(|list| list.0),
            webhook_allow: webhooks.map(|list| list.0),
            capacity: WrittenCapacity {
                vcpus: env.parsed("WRENN_VCPUS")?,
                memory_mib: env.parsed("WRENN_MEMORY_MIB")?,
                disk_mib: env.parsed("WRENN_DISK_MIB")?,
            },
            boot_timeout: env.parsed("WRENN_BOOT_TIMEOUT")?,
            ended_retention: env.parsed("WRENN_ENDED_RETENTION")?,
            warm: WrittenWarm {
                create: env.parsed("WRENN_WARM_CREATE")?,
            },
        })
    }

    /// What `self` says, and where it says nothing, what `below` says.
    #[must_use]
    pub fn over(self, below: Self) -> Self {
        Self {
            data_dir: self.data_dir.or(below.data_dir),
            images_dir: self.images_dir.or(below.images_dir),
            name: self.name.or(below.name),
            listen: self.listen.or(below.listen),
            cluster_listen: self.cluster_listen.or(below.cluster_listen),
            bulk_listen: self.bulk_listen.or(below.bulk_listen),
            advertise: self.advertise.or(below.advertise),
            join: self.join.or(below.join),
            tags: self.tags.or(below.tags),
            public_url: self.public_url.or(below.public_url),
            vmm: self.vmm.or(below.vmm),
            accelerator: self.accelerator.or(below.accelerator),
            qemu: self.qemu.or(below.qemu),
            cloud_hypervisor: self.cloud_hypervisor.or(below.cloud_hypervisor),
            slot_base: self.slot_base.or(below.slot_base),
            slot_count: self.slot_count.or(below.slot_count),
            slot_pool: self.slot_pool.or(below.slot_pool),
            egress_allow: self.egress_allow.or(below.egress_allow),
            webhook_allow: self.webhook_allow.or(below.webhook_allow),
            capacity: WrittenCapacity {
                vcpus: self.capacity.vcpus.or(below.capacity.vcpus),
                memory_mib: self.capacity.memory_mib.or(below.capacity.memory_mib),
                disk_mib: self.capacity.disk_mib.or(below.capacity.disk_mib),
            },
            boot_timeout: self.boot_timeout.or(below.boot_timeout),
            ended_retention: self.ended_retention.or(below.ended_retention),
            warm: WrittenWarm {
                create: self.warm.create.or(below.warm.create),
            },
        }
    }
}

/// The environment. An empty variable counts as absent.
struct Env<F>(F);

impl<F: Fn(&str) -> Option<String>> Env<F> {
    fn parsed<T>(&self, name: &'static str) -> Result<Option<T>, ConfigError>
    where
        T: FromStr,
        T::Err: std::fmt::Display,
    {
        let Some(text) = (self.0)(name).filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let parsed = text.parse().map_err(|err: T::Err| ConfigError::Value {
            setting: name,
            why: err.to_string(),
            value: text,
        })?;
        Ok(Some(parsed))
    }

    /// The same for what must not be quoted in a complaint.
    fn token(&self, name: &'static str) -> Result<Option<JoinToken>, ConfigError> {
        self.parsed(name).map_err(|err| match err {
            ConfigError::Value { setting, why, .. } => ConfigError::Value {
                setting,
                value: "(not shown)".into(),
                why,
            },
            other => other,
        })
    }
}

/// Values between commas.
struct List<T>(Vec<T>);

impl<T: FromStr<Err = BadText>> FromStr for List<T> {
    type Err = BadText;

    fn from_str(text: &str) -> Result<Self, BadText> {
        let parts = text.split(',').map(str::trim).filter(|it| !it.is_empty());
        parts.map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

#[cfg(test)]
mod example {
    use super::Written;

    #[test]
    fn the_example_file_parses_as_it_is_and_with_every_line_uncommented() {
        let example = include_str!("../../../deploy/wrenn.toml");
        let parse = |text: &str| toml::from_str::<Written>(text);
        assert_eq!(parse(example).expect("valid"), Written::default());
        // A setting has no space after its `#`, prose has.
        let is_setting = |line: &str| line.starts_with(|it: char| it.is_ascii_lowercase());
        let uncommented = |line: &str| match line.strip_prefix('#') {
            Some(setting) if is_setting(setting) => format!("{setting}\n"),
            _ => format!("{line}\n"),
        };
        let all: String = example.lines().map(uncommented).collect();
        let written = parse(&all).expect("valid with every line");
        assert!(written.slot_count.is_some() && written.capacity.disk_mib.is_some());
        assert!(written.tags.is_some_and(|tags| tags.contains_key("zone")));
    }
}
