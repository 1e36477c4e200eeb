//! What a shim shall run, as `shim.json`: written by the daemon, read once by the shim.
//!
//! The file and the type in memory are apart, so that the type may change while shims of an older
//! release still start from what a newer daemon wrote, or say by name that they cannot. So the file
//! has the oldest version that says all of it: 1 for a guest that boots, 2 for one whose memory is copied
//! before it runs, 3 for one whose memory comes as it is touched.

use std::io;
use std::path::{Path, PathBuf};

use proto::epoch::Epoch;
use proto::ids::SandboxId;
use proto::units::Mib;
use serde::{Deserialize, Serialize};

use crate::shim::error::ReadFileError;
use crate::shim::exit::check_version;
use crate::shim::files;
use crate::shim::state::StateFile;
use crate::vmm::{Accelerator, Confinement, Driver, Hardware, NetworkSpec, VmmSpec};

/// The layout of `shim.json` for a guest that boots.
const VERSION: u32 = 1;
/// The layout for a guest that is restored: a release that knows only the first would boot it.
const RESTORE_VERSION: u32 = 2;
/// The layout for a guest whose memory a pager brings.
const PAGED_VERSION: u32 = 3;
/// The layout for a guest whose VMM asks for its memory.
const ASKED_VERSION: u32 = 4;

/// One sandbox as its shim is told to run it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShimSpec {
    /// Whose guest it is.
    pub sandbox: SandboxId,
    /// The ownership under which it runs.
    pub epoch: Epoch,
    /// The lease file that the guest obeys ([`super::lease`]); `None` for a guest that runs
    /// whether its node has a lease or not.
    pub lease: Option<PathBuf>,
    /// The guest.
    pub vmm: VmmSpec,
    /// What it goes on from; `None` for a guest that boots its kernel.
    pub restore: Option<RestoreSpec>,
}

/// A saved guest. Of its [`VmmSpec`] the kernel, the initramfs and the command line mean nothing
/// any more; the rest must describe the guest that was saved, on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreSpec {
    /// Its device state.
    pub state: StateFile,
    /// What it ran on.
    pub hardware: Hardware,
    /// Where its memory comes from.
    pub memory: MemoryImage,
}

/// Where the memory of a saved guest comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryImage {
    /// A file as long as the memory, with holes for zeros; all of it is copied before the guest
    /// runs. For hosts on which no pager can serve.
    Flat(PathBuf),
    /// A pager brings each page when it is touched, by the page map in the sandbox's directory
    /// ([`crate::pager::page_map::PAGES`]).
    Paged {
        /// Where the daemon answers for what is not on this node.
        daemon: PathBuf,
    },
    /// As [`Self::Paged`], by the VMM's own questions: for hosts on which no pager may watch over its
    /// page faults, and a VMM that does so itself.
    Asked {
        /// Where the daemon answers for what is not on this node.
        daemon: PathBuf,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    version: u32,
    sandbox: String,
    epoch: u64,
    /// Left out where it is QEMU, which it always was: a release that knows no other then refuses
    /// the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    driver: Option<String>,
    program: PathBuf,
    accelerator: String,
    kernel: PathBuf,
    initramfs: PathBuf,
    cmdline: String,
    vcpus: u8,
    memory_mib: u32,
    root_disk: Option<PathBuf>,
    network: Option<WrittenNetwork>,
    /// Left out where there is none: a release that knows no leases then reads the file, and
    /// refuses one that it could not obey.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lease: Option<PathBuf>,
    /// Left out where there are none, as was once always so: a release that knows neither refuses a
    /// file with one, which it could not obey.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    user: Option<u32>,
    /// See `user`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group: Option<PathBuf>,
    /// From version 2 on, and only there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    restore: Option<WrittenRestore>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenRestore {
    state: PathBuf,
    state_bytes: u64,
    state_digest: String,
    machine: String,
    cpu: String,
    memory: WrittenMemory,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum WrittenMemory {
    Flat(PathBuf),
    Paged { daemon: PathBuf },
    Asked { daemon: PathBuf },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenNetwork {
    netns: PathBuf,
    tap: String,
    mac: [u8; 6],
}

impl ShimSpec {
    /// Writes it into `dir`, durably.
    ///
    /// # Errors
    /// The disk refused, or a path is not UTF-8.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let content = serde_json::to_vec_pretty(&self.as_written())?;
        files::write_durably(dir, files::SPEC, &content)
    }

    /// Reads it from `dir`.
    ///
    /// # Errors
    /// It is not there, not readable, or of another version.
    pub fn read(dir: &Path) -> Result<Self, ReadFileError> {
        let name = files::SPEC;
        let content = files::read(dir, name)
            .map_err(|source| ReadFileError::Disk { name, source })?
            .ok_or(ReadFileError::Missing { name })?;
        check_version(name, &content, VERSION)
            .or_else(|_| check_version(name, &content, RESTORE_VERSION))
            .or_else(|_| check_version(name, &content, PAGED_VERSION))
            .or_else(|_| check_version(name, &content, ASKED_VERSION))?;
        let written: Written = serde_json::from_slice(&content)
            .map_err(|source| ReadFileError::Malformed { name, source })?;
        Self::from_written(written)
    }

    fn as_written(&self) -> Written {
        let vmm = self.vmm.clone();
        Written {
            version: self.version(),
            sandbox: self.sandbox.to_string(),
            epoch: self.epoch.0,
            driver: (vmm.driver != Driver::Qemu).then(|| vmm.driver.name().to_owned()),
            program: vmm.program,
            accelerator: vmm.accelerator.name().to_owned(),
            kernel: vmm.kernel,
            initramfs: vmm.initramfs,
            cmdline: vmm.cmdline,
            vcpus: vmm.vcpus,
            memory_mib: vmm.memory.0,
            root_disk: vmm.root_disk,
            network: vmm.network.map(|network| WrittenNetwork {
                netns: network.netns,
                tap: network.tap,
                mac: network.mac,
            }),
            lease: self.lease.clone(),
            user: vmm.confinement.user,
            group: vmm.confinement.group,
            restore: self.restore.as_ref().map(RestoreSpec::as_written),
        }
    }

    fn version(&self) -> u32 {
        match self.restore.as_ref().map(|restore| &restore.memory) {
            None => VERSION,
            Some(MemoryImage::Flat(_)) => RESTORE_VERSION,
            Some(MemoryImage::Paged { .. }) => PAGED_VERSION,
            Some(MemoryImage::Asked { .. }) => ASKED_VERSION,
        }
    }

    fn from_written(written: Written) -> Result<Self, ReadFileError> {
        let restore = written.restore.map(RestoreSpec::from_written);
        let restore = restore.transpose()?;
        let spec = Self {
            sandbox: written
                .sandbox
                .parse()
                .map_err(|_| bad("sandbox", &written.sandbox))?,
            epoch: Epoch(written.epoch),
            lease: written.lease,
            vmm: VmmSpec {
                driver: driver_in(written.driver.as_deref())?,
                program: written.program,
                accelerator: Accelerator::from_name(&written.accelerator)
                    .ok_or_else(|| bad("accelerator", &written.accelerator))?,
                kernel: written.kernel,
                initramfs: written.initramfs,
                cmdline: written.cmdline,
                vcpus: written.vcpus,
                memory: Mib(written.memory_mib),
                root_disk: written.root_disk,
                network: written.network.map(|network| NetworkSpec {
                    netns: network.netns,
                    tap: network.tap,
                    mac: network.mac,
                }),
                confinement: Confinement {
                    user: written.user,
                    group: written.group,
                },
            },
            restore,
        };
        if written.version == spec.version() {
            return Ok(spec);
        }
        Err(bad("version", &written.version.to_string()))
    }
}

impl RestoreSpec {
    fn as_written(&self) -> WrittenRestore {
        WrittenRestore {
            state: self.state.path.clone(),
            state_bytes: self.state.bytes,
            state_digest: self.state.digest.to_hex().to_string(),
            machine: self.hardware.machine.clone(),
            cpu: self.hardware.cpu.clone(),
            memory: match &self.memory {
                MemoryImage::Flat(path) => WrittenMemory::Flat(path.clone()),
                MemoryImage::Paged { daemon } => WrittenMemory::Paged {
                    daemon: daemon.clone(),
                },
                MemoryImage::Asked { daemon } => WrittenMemory::Asked {
                    daemon: daemon.clone(),
                },
            },
        }
    }

    fn from_written(written: WrittenRestore) -> Result<Self, ReadFileError> {
        let digest = blake3::Hash::from_hex(&written.state_digest);
        Ok(Self {
            state: StateFile {
                path: written.state,
                bytes: written.state_bytes,
                digest: digest.map_err(|_| bad("state_digest", &written.state_digest))?,
            },
            hardware: Hardware {
                machine: written.machine,
                cpu: written.cpu,
            },
            memory: match written.memory {
                WrittenMemory::Flat(path) => MemoryImage::Flat(path),
                WrittenMemory::Paged { daemon } => MemoryImage::Paged { daemon },
                WrittenMemory::Asked { daemon } => MemoryImage::Asked { daemon },
            },
        })
    }
}

fn driver_in(name: Option<&str>) -> Result<Driver, ReadFileError> {
    let Some(name) = name else {
        return Ok(Driver::Qemu);
    };
    // It has one way to be written.
    let driver = Driver::from_name(name).filter(|driver| *driver != Driver::Qemu);
    driver.ok_or_else(|| bad("driver", name))
}

fn bad(field: &'static str, value: &str) -> ReadFileError {
    ReadFileError::BadValue {
        name: files::SPEC,
        field,
        value: value.chars().take(64).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> ShimSpec {
        ShimSpec {
            sandbox: SandboxId([7; 16]),
            epoch: Epoch(3),
            lease: Some("/data/lease".into()),
            vmm: VmmSpec {
                driver: Driver::Qemu,
                program: "/usr/bin/qemu-system-x86_64".into(),
                accelerator: Accelerator::Tcg,
                kernel: "/k".into(),
                initramfs: "/i".into(),
                cmdline: "wrenn.probe=1".into(),
                vcpus: 2,
                memory: Mib(512),
                root_disk: Some("/d".into()),
                network: Some(NetworkSpec {
                    netns: "/run/netns/n".into(),
                    tap: "tap0".into(),
                    mac: [1, 2, 3, 4, 5, 6],
                }),
                confinement: Confinement::default(),
            },
            restore: None,
        }
    }

    fn restoring() -> ShimSpec {
        let restore = RestoreSpec {
            state: StateFile {
                path: "/d/state".into(),
                bytes: 17,
                digest: blake3::hash(b"state"),
            },
            hardware: Hardware {
                machine: "pc-q35-7.2/1".into(),
                cpu: "tcg-1".into(),
            },
            memory: MemoryImage::Flat("/d/memory".into()),
        };
        ShimSpec {
            restore: Some(restore),
            ..spec()
        }
    }

    fn read_changed(from: &str, to: &str) -> Result<ShimSpec, ReadFileError> {
        read_changed_of(&spec(), from, to)
    }

    fn read_changed_of(spec: &ShimSpec, from: &str, to: &str) -> Result<ShimSpec, ReadFileError> {
        let dir = tempfile::tempdir().expect("tempdir");
        spec.write(dir.path()).expect("written");
        let content = files::read(dir.path(), files::SPEC)
            .expect("read")
            .expect("there");
        let text = String::from_utf8(content).expect("UTF-8");
        assert!(text.contains(from), "{text}");
        files::write_durably(dir.path(), files::SPEC, text.replace(from, to).as_bytes())
            .expect("rewritten");
        ShimSpec::read(dir.path())
    }

    #[test]
    fn a_spec_survives_the_file() {
        assert_eq!(read_changed("\n", "\n").expect("read"), spec());
    }

    #[test]
    fn the_driver_is_written_where_it_is_not_qemu_and_then_refused_by_older_releases() {
        let mut other = spec();
        other.vmm.driver = Driver::CloudHypervisor;
        let line = "  \"driver\": \"cloud-hypervisor\",\n";
        assert_eq!(read_changed_of(&other, line, line).expect("read"), other);
        assert_eq!(read_changed_of(&other, line, "").expect("read"), spec());
        for bad in ["firecracker", "qemu", ""] {
            let changed = format!("  \"driver\": \"{bad}\",\n");
            assert!(read_changed_of(&other, line, &changed).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_confined_guest_is_written_so_that_older_releases_refuse_it() {
        let mut confined = spec();
        confined.vmm.confinement = Confinement {
            user: Some(0x7000_0001),
            group: Some("/sys/fs/cgroup/wrenn/a/cl-1".into()),
        };
        let line = "  \"user\": 1879048193,\n";
        assert_eq!(
            read_changed_of(&confined, line, line).expect("read"),
            confined
        );
        let dir = tempfile::tempdir().expect("tempdir");
        spec().write(dir.path()).expect("written");
        let plain = files::read(dir.path(), files::SPEC)
            .expect("read")
            .expect("there");
        let plain = String::from_utf8(plain).expect("UTF-8");
        assert!(
            !plain.contains("user") && !plain.contains("group"),
            "{plain}"
        );
    }

    #[test]
    fn another_version_is_refused_by_name_even_with_unknown_fields() {
        let err = read_changed("\"version\": 1", "\"version\": 5, \"new\": 0").expect_err("no");
        assert!(
            matches!(err, ReadFileError::UnknownVersion { found: 5, .. }),
            "{err}"
        );
    }

    /// So that a release that only boots guests refuses to, instead of booting a saved one.
    #[test]
    fn only_a_guest_that_is_restored_has_the_second_version() {
        let read = read_changed_of(&restoring(), "\"version\": 2", "\"version\": 2");
        assert_eq!(read.expect("read"), restoring());
        read_changed("\"version\": 1", "\"version\": 1").expect("a guest that boots has the first");
        let posing = read_changed_of(&restoring(), "\"version\": 2", "\"version\": 1");
        assert!(
            matches!(
                posing,
                Err(ReadFileError::BadValue {
                    field: "version",
                    ..
                })
            ),
            "{posing:?}"
        );
        assert!(read_changed("\"version\": 1", "\"version\": 2").is_err());
    }

    /// So that a release that knows no pager says so, instead of running a guest without memory.
    #[test]
    fn only_a_guest_that_is_paged_has_the_third_version() {
        let mut paged = restoring();
        if let Some(restore) = &mut paged.restore {
            restore.memory = MemoryImage::Paged {
                daemon: "/data/pager.sock".into(),
            };
        }
        let read = read_changed_of(&paged, "\"version\": 3", "\"version\": 3");
        assert_eq!(read.expect("read"), paged);
        assert!(read_changed_of(&paged, "\"version\": 3", "\"version\": 2").is_err());
        assert!(read_changed_of(&restoring(), "\"version\": 2", "\"version\": 3").is_err());
    }

    #[test]
    fn a_restore_that_is_not_understood_is_refused() {
        for (from, to) in [
            ("\"flat\"", "\"knitted\""),
            ("\"state_digest\": \"", "\"state_digest\": \"x"),
            ("\"state_bytes\"", "\"state_byte\""),
        ] {
            assert!(read_changed_of(&restoring(), from, to).is_err(), "{to}");
        }
    }

    #[test]
    fn a_spec_of_before_there_were_leases_is_of_an_unbound_guest() {
        let with_lease = ",\n  \"lease\": \"/data/lease\"";
        let read = read_changed(with_lease, "").expect("read");
        assert_eq!(read.lease, None);
        let dir = tempfile::tempdir().expect("tempdir");
        read.write(dir.path()).expect("written");
        let written = files::read(dir.path(), files::SPEC).expect("read");
        let written = String::from_utf8(written.expect("there")).expect("UTF-8");
        assert!(!written.contains("lease"), "{written}");
    }

    #[test]
    fn words_that_mean_nothing_are_refused_by_name() {
        for (from, to) in [("\"tcg\"", "\"xen\""), ("cl-", "vm-")] {
            let err = read_changed(from, to).expect_err("refused");
            assert!(matches!(err, ReadFileError::BadValue { .. }), "{err}");
        }
        let err = read_changed("\"epoch\"", "\"epoc\"").expect_err("refused");
        assert!(matches!(err, ReadFileError::Malformed { .. }), "{err}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let dir = tempfile::tempdir().expect("tempdir");
        let err = ShimSpec::read(dir.path()).expect_err("not there");
        assert_eq!(err.to_string(), "there is no shim.json");
    }
}
