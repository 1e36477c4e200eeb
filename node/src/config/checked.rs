//! A configuration as used: complete, in its own types, and free of contradictions.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::units::Mib;
use serde::{Serialize, Serializer};

use super::defaults;
use super::error::ConfigError;
use super::file::{Written, WrittenCapacity};
use super::machine::Machine;
use super::peering;
use super::values::{AcceleratorChoice, Cidr, JoinToken, Period, VmmChoice};

/// Network slots that the address plan has in all.
const SLOTS: u32 = 1 << 16;
/// Longest name of a node.
const NAME_CHARS: usize = 64;
/// Bounds of the boot timeout: below, not even a fast guest makes it; above, nobody waits.
const BOOT_TIMEOUTS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));
/// Clients read the record of a capsule right after they ended it.
const MIN_RETENTION: Duration = Duration::from_secs(60);
/// The smallest guest must fit.
const MIN_MEMORY: Mib = Mib(128);

/// The configuration of a node, checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Config {
    /// Where the node keeps its state.
    pub data_dir: PathBuf,
    /// Where kernel, initramfs and templates lie.
    pub images_dir: PathBuf,
    /// What people call the node.
    pub name: String,
    /// Where the API listens (TCP).
    pub listen: SocketAddr,
    /// Where the node listens for peers (UDP).
    pub cluster_listen: SocketAddr,
    /// Where bulk transfers arrive (UDP).
    pub bulk_listen: SocketAddr,
    /// Where peers dial the node.
    pub advertise: SocketAddr,
    /// Where peers dial it for bulk transfers.
    pub advertise_bulk: SocketAddr,
    /// The token of a cluster to join; a member of one has no use for it.
    pub join: Option<JoinToken>,
    /// What placement may ask for; `zone` is what fails together.
    pub tags: BTreeMap<String, String>,
    /// Where clients reach the API, without a slash at the end.
    pub public_url: String,
    /// Which driver runs guests.
    pub vmm: VmmChoice,
    /// What executes guest code.
    pub accelerator: AcceleratorChoice,
    /// The QEMU program; a bare name is looked up in `PATH`.
    pub qemu: PathBuf,
    /// The Cloud Hypervisor program.
    pub cloud_hypervisor: PathBuf,
    /// Index of the first network slot.
    pub slot_base: u16,
    /// How many network slots there are.
    pub slot_count: u16,
    /// How many slots are made in advance.
    pub slot_pool: u16,
    /// Networks (first address, prefix length) that capsules may reach although they are private.
    #[serde(serialize_with = "as_networks")]
    pub egress_allow: Vec<(Ipv4Addr, u8)>,
    /// Networks that webhooks may reach although they are not public.
    #[serde(serialize_with = "as_networks")]
    pub webhook_allow: Vec<(Ipv4Addr, u8)>,
    /// What the node offers to capsules.
    pub capacity: Capacity,
    /// Longest a guest may take to boot.
    #[serde(serialize_with = "as_period")]
    pub boot_timeout: Duration,
    /// How long records of ended capsules are kept.
    #[serde(serialize_with = "as_period")]
    pub ended_retention: Duration,
    /// Guests that start from one that had just booted.
    pub warm: Warm,
}

/// When a new capsule skips its boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Warm {
    /// Whether it starts from a guest that had just booted, where there is one.
    pub create: bool,
}

/// What a node offers to capsules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Capacity {
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory.
    #[serde(rename = "memory_mib", serialize_with = "as_mib")]
    pub memory: Mib,
    /// Root disks.
    #[serde(rename = "disk_mib", serialize_with = "as_mib")]
    pub disk: Mib,
}

impl Config {
    /// The configuration of this machine: `flags` over the environment over the file `file` over
    /// the defaults.
    ///
    /// # Errors
    /// [`ConfigError`] names the setting, or the two that contradict each other.
    pub fn load(flags: Written, file: Option<&Path>) -> Result<Self, ConfigError> {
        let env = Written::from_env(|name| std::env::var(name).ok())?;
        let file = file.map(Written::from_file).transpose()?;
        let written = flags.over(env).over(file.unwrap_or_default());
        let machine = Machine::measure(&data_dir(&written))?;
        Self::check(written, &machine)
    }

    /// The complete configuration that `written` means on `machine`.
    ///
    /// # Errors
    /// [`ConfigError::Value`] and [`ConfigError::Relation`].
    pub fn check(written: Written, machine: &Machine) -> Result<Self, ConfigError> {
        let data_dir = absolute("data_dir", data_dir(&written))?;
        let images = written.images_dir.clone();
        let images_dir = images.unwrap_or_else(|| data_dir.join(defaults::IMAGES_SUBDIR));
        let listen = fixed_port("listen", written.listen.unwrap_or(defaults::LISTEN))?;
        let peering = peering::check(&written, machine)?;
        let (slot_base, slot_count, slot_pool) = slots(&written)?;
        let networks = written.egress_allow.iter().flatten();
        let webhooks = written.webhook_allow.iter().flatten();
        Ok(Self {
            images_dir: absolute("images_dir", images_dir)?,
            name: name(written.name, machine)?,
            cluster_listen: peering.listen,
            bulk_listen: peering.bulk_listen,
            advertise: peering.advertise,
            advertise_bulk: peering.advertise_bulk,
            join: peering::token(written.join, &data_dir)?,
            tags: peering::tags(written.tags)?,
            public_url: public_url(written.public_url, listen, machine)?,
            vmm: vmm(written.vmm, written.accelerator)?,
            accelerator: written.accelerator.unwrap_or_default(),
            qemu: written.qemu.unwrap_or_else(|| defaults::QEMU.into()),
            cloud_hypervisor: written
                .cloud_hypervisor
                .unwrap_or_else(|| defaults::CLOUD_HYPERVISOR.into()),
            egress_allow: networks.map(|it| (it.network, it.prefix)).collect(),
            webhook_allow: webhooks.map(|it| (it.network, it.prefix)).collect(),
            capacity: capacity(written.capacity, machine)?,
            boot_timeout: boot_timeout(written.boot_timeout)?,
            ended_retention: retention(written.ended_retention)?,
            warm: Warm {
                create: written.warm.create.unwrap_or(defaults::WARM_CREATE),
            },
            data_dir,
            listen,
            slot_base,
            slot_count,
            slot_pool,
        })
    }
}

fn data_dir(written: &Written) -> PathBuf {
    let given = written.data_dir.clone();
    given.unwrap_or_else(|| defaults::DATA_DIR.into())
}

/// The path from the root: the daemon and what it starts need not share a working directory.
fn absolute(setting: &'static str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    std::path::absolute(&path).map_err(|err| value(setting, path.display(), err))
}

pub(super) fn fixed_port(
    setting: &'static str,
    address: SocketAddr,
) -> Result<SocketAddr, ConfigError> {
    if address.port() == 0 {
        return Err(value(setting, address, "the port must be chosen"));
    }
    Ok(address)
}

fn name(given: Option<String>, machine: &Machine) -> Result<String, ConfigError> {
    let name = given.unwrap_or_else(|| machine.hostname.clone());
    let plain = |it: char| it.is_ascii_alphanumeric() || matches!(it, '.' | '_' | '-');
    let starts = name.starts_with(|first: char| first.is_ascii_alphanumeric());
    if starts && name.chars().all(plain) && name.len() <= NAME_CHARS {
        return Ok(name);
    }
    let why = "expected up to 64 letters, digits, '.', '_' and '-'";
    Err(value("name", name, why))
}

fn public_url(
    given: Option<String>,
    listen: SocketAddr,
    machine: &Machine,
) -> Result<String, ConfigError> {
    let Some(url) = given else {
        // An API on all addresses is reached by the machine's name.
        return Ok(if listen.ip().is_unspecified() {
            format!("http://{}:{}", machine.hostname, listen.port())
        } else {
            format!("http://{listen}")
        });
    };
    let trimmed = url.trim_end_matches('/');
    let rest = trimmed
        .strip_prefix("http://")
        .or_else(|| trimmed.strip_prefix("https://"));
    let is_plain = |rest: &str| !rest.is_empty() && !rest.contains(char::is_whitespace);
    if rest.is_some_and(is_plain) && trimmed.parse::<http::Uri>().is_ok() {
        return Ok(trimmed.to_owned());
    }
    Err(value("public_url", url, "expected http://… or https://…"))
}

fn vmm(
    choice: Option<VmmChoice>,
    accelerator: Option<AcceleratorChoice>,
) -> Result<VmmChoice, ConfigError> {
    let choice = choice.unwrap_or_default();
    let emulated = accelerator == Some(AcceleratorChoice::Tcg);
    if choice == VmmChoice::CloudHypervisor && emulated {
        return Err(value(
            "vmm",
            "cloud-hypervisor",
            "it cannot emulate; use accelerator = \"kvm\" or \"auto\", or vmm = \"qemu\"",
        ));
    }
    Ok(choice)
}

fn slots(written: &Written) -> Result<(u16, u16, u16), ConfigError> {
    let base = written.slot_base.unwrap_or(defaults::SLOT_BASE);
    let count = written.slot_count.unwrap_or(defaults::SLOT_COUNT);
    // A range smaller than the default pool means that the pool is smaller too.
    let pool = written.slot_pool.unwrap_or(defaults::SLOT_POOL.min(count));
    if count == 0 {
        return Err(value("slot_count", count, "a node needs one slot at least"));
    }
    if u32::from(base) + u32::from(count) > SLOTS {
        return Err(ConfigError::Relation {
            first: ("slot_base", base.to_string()),
            second: ("slot_count", count.to_string()),
            why: "the range must end within the 65536 slots there are",
        });
    }
    if pool > count {
        return Err(ConfigError::Relation {
            first: ("slot_pool", pool.to_string()),
            second: ("slot_count", count.to_string()),
            why: "no more slots can be made in advance than there are",
        });
    }
    Ok((base, count, pool))
}

fn capacity(written: WrittenCapacity, machine: &Machine) -> Result<Capacity, ConfigError> {
    let vcpus = machine.cores.saturating_mul(defaults::VCPUS_PER_CORE);
    let memory = percent(machine.memory, defaults::MEMORY_PERCENT);
    let disk = percent(machine.disk_free, defaults::DISK_PERCENT);
    let capacity = Capacity {
        vcpus: written.vcpus.unwrap_or(vcpus),
        memory: Mib(written.memory_mib.unwrap_or(memory)),
        disk: Mib(written.disk_mib.unwrap_or(disk)),
    };
    if capacity.vcpus == 0 {
        return Err(value("capacity.vcpus", 0, "nothing could run"));
    }
    if capacity.memory < MIN_MEMORY {
        let memory = capacity.memory.0;
        let why = "the smallest guest needs 128 MiB";
        return Err(value("capacity.memory_mib", memory, why));
    }
    Ok(capacity)
}

fn percent(of: Mib, percent: u64) -> u32 {
    // A share of a u32 fits a u32.
    u32::try_from(u64::from(of.0) * percent / 100).unwrap_or(of.0)
}

fn boot_timeout(given: Option<Period>) -> Result<Duration, ConfigError> {
    let timeout = given.map_or(defaults::BOOT_TIMEOUT, |it| it.0);
    let (least, most) = BOOT_TIMEOUTS;
    if (least..=most).contains(&timeout) {
        return Ok(timeout);
    }
    Err(value("boot_timeout", Period(timeout), "expected 1s to 1h"))
}

fn retention(given: Option<Period>) -> Result<Duration, ConfigError> {
    let kept = given.map_or(defaults::ENDED_RETENTION, |it| it.0);
    if kept >= MIN_RETENTION {
        return Ok(kept);
    }
    Err(value(
        "ended_retention",
        Period(kept),
        "expected 1m or more",
    ))
}

pub(super) fn value(
    setting: &'static str,
    value: impl ToString,
    why: impl ToString,
) -> ConfigError {
    ConfigError::Value {
        setting,
        value: value.to_string(),
        why: why.to_string(),
    }
}

fn as_period<S: Serializer>(period: &Duration, to: S) -> Result<S::Ok, S::Error> {
    Period(*period).serialize(to)
}

fn as_mib<S: Serializer>(size: &Mib, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u32(size.0)
}

fn as_networks<S: Serializer>(networks: &[(Ipv4Addr, u8)], to: S) -> Result<S::Ok, S::Error> {
    let cidrs = networks.iter();
    to.collect_seq(cidrs.map(|&(network, prefix)| Cidr { network, prefix }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            hostname: "box".into(),
            address: None,
            cores: 4,
            memory: Mib(10_000),
            disk_free: Mib(1000),
        }
    }

    fn check(toml: &str) -> Result<Config, String> {
        let written: Written = toml::from_str(toml).map_err(|err| err.to_string())?;
        Config::check(written, &machine()).map_err(|err| err.to_string())
    }

    #[test]
    fn nothing_written_means_the_defaults_of_this_machine() {
        let config = check("").expect("defaults");
        assert_eq!(config.data_dir, Path::new("/var/lib/wrenn"));
        assert_eq!(config.images_dir, Path::new("/var/lib/wrenn/images"));
        assert_eq!(config.public_url, "http://127.0.0.1:7320");
        assert_eq!(config.bulk_listen.port(), 7322);
        assert_eq!((config.name.as_str(), config.capacity.vcpus), ("box", 32));
        assert_eq!(config.capacity.memory, Mib(8000));
        assert_eq!(config.capacity.disk, Mib(800));
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let err = check("listne = \"1.2.3.4:1\"").expect_err("it was accepted");
        assert!(err.contains("listne"), "{err}");
        let err = check("[capacity]\nmemory = 1").expect_err("it was accepted");
        assert!(err.contains("memory"), "{err}");
    }

    #[test]
    fn a_broken_relation_names_both_settings_and_their_values() {
        for (toml, wanted) in [
            (
                "slot_pool = 9\nslot_count = 8",
                ["slot_pool = 9", "slot_count = 8"],
            ),
            (
                "slot_base = 65500\nslot_count = 64",
                ["slot_base = 65500", "slot_count = 64"],
            ),
        ] {
            let err = check(toml).expect_err("it was accepted");
            assert!(wanted.iter().all(|it| err.contains(it)), "{err}");
        }
    }

    #[test]
    fn values_that_make_no_sense_are_refused_with_their_setting() {
        for (toml, setting) in [
            ("vmm = \"cloud-hypervisor\"\naccelerator = \"tcg\"", "vmm"),
            ("listen = \"127.0.0.1:0\"", "listen"),
            ("cluster_listen = \"127.0.0.1:65535\"", "cluster_listen"),
            ("name = \"../x\"", "name"),
            ("name = \"\"", "name"),
            ("public_url = \"ftp://x\"", "public_url"),
            ("public_url = \"http://\"", "public_url"),
            ("slot_count = 0", "slot_count"),
            ("boot_timeout = \"0s\"", "boot_timeout"),
            ("ended_retention = \"59s\"", "ended_retention"),
            ("egress_allow = [\"10.0.0.1/8\"]", "egress_allow"),
            ("[capacity]\nvcpus = 0", "capacity.vcpus"),
            ("[capacity]\nmemory_mib = 64", "capacity.memory_mib"),
        ] {
            let err = check(toml).expect_err("it was accepted");
            assert!(err.contains(setting), "{toml}: {err}");
        }
    }

    #[test]
    fn flags_win_over_the_environment_and_that_over_the_file() {
        let file: Written = toml::from_str("slot_base = 1\nslot_count = 1\nslot_pool = 1")
            .expect("a configuration");
        let env = Written::from_env(|name| match name {
            "WRENN_SLOT_COUNT" | "WRENN_SLOT_POOL" => Some("2".into()),
            "WRENN_EGRESS_ALLOW" => Some("10.0.0.0/8, 192.0.2.1".into()),
            "WRENN_NODE_NAME" => Some(String::new()),
            _ => None,
        });
        let flags = Written {
            slot_pool: Some(0),
            ..Written::default()
        };
        let sum = flags.over(env.expect("an environment")).over(file);
        let config = Config::check(sum, &machine()).expect("a configuration");
        assert_eq!(
            (config.slot_base, config.slot_count, config.slot_pool),
            (1, 2, 0)
        );
        assert_eq!(config.egress_allow.len(), 2);
        assert_eq!(config.name, "box");
    }

    #[test]
    fn a_bad_variable_is_named() {
        let read = Written::from_env(|name| (name == "WRENN_LISTEN").then(|| "here".into()));
        let err = read.expect_err("it was accepted").to_string();
        assert!(
            err.contains("WRENN_LISTEN") && err.contains("here"),
            "{err}"
        );
    }

    #[test]
    fn an_api_on_all_addresses_is_reached_by_the_name_of_the_machine() {
        let config = check("listen = \"0.0.0.0:80\"").expect("a configuration");
        assert_eq!(config.public_url, "http://box:80");
    }

    #[test]
    fn the_checked_form_can_be_printed() {
        let config = check("egress_allow = [\"10.0.0.0/8\"]").expect("a configuration");
        let json = serde_json::to_value(config).expect("JSON");
        assert_eq!(json["egress_allow"][0], "10.0.0.0/8");
        assert_eq!(json["boot_timeout"], "2m");
        assert_eq!(json["capacity"]["memory_mib"], 8000);
    }
}
