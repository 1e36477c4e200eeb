//! The machine that Cloud Hypervisor builds, as a pure function of the spec.
//!
//! Host bridge, serial port, and one virtio function each for entropy, disk, network and balloon,
//! each with a name and a place on the bus of its own: the state of a saved guest speaks of
//! devices by name, and an optional one must not move the others. That is the *layout*
//! ([`super::machine`]); not part of it are paths, descriptors and the tap.
//!
//! A guest that was saved gets the same machine, made anew from *this* host's spec. Nothing of the
//! old host's configuration is used: its paths, its tap and its console mean nothing here. What has
//! to come with the guest is the processors' features and the layout of its memory
//! ([`super::kept`]), and both are looked at first.

use serde::Serialize;

use crate::vmm::error::SpecError;
use crate::vmm::{NetworkSpec, VmmSpec, check, cmdline};

/// The one memory zone.
pub const ZONE: &str = "ram";
/// The devices' places on the bus.
const RNG_SLOT: u8 = 1;
/// See [`RNG_SLOT`].
const DISK_SLOT: u8 = 2;
/// See [`RNG_SLOT`].
const CARD_SLOT: u8 = 3;
/// The balloon only takes back pages that the guest reports as free; see the layout of QEMU.
const BALLOON_SLOT: u8 = 4;
/// Where the guest's entropy comes from.
const ENTROPY: &str = "/dev/urandom";
/// What the machine needs of the kernel: see the words for QEMU, which say why. A guest under KVM
/// does not look for its timer by itself, so one of them is not needed.
const KERNEL_WORDS: &str = "console=ttyS0 panic=-1 quiet 8250.nr_uarts=1 cryptomgr.notests";

/// A machine, as `vm.create` takes it, and as a hand-over carries it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VmConfig {
    cpus: Cpus,
    memory: Memory,
    payload: Payload,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    disks: Vec<Disk>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    net: Vec<Card>,
    rng: Rng,
    balloon: Balloon,
    serial: Console,
    console: Console,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Cpus {
    boot_vcpus: u8,
    max_vcpus: u8,
    nested: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Memory {
    size: u64,
    thp: bool,
    zones: [Zone; 1],
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Zone {
    id: &'static str,
    size: u64,
    shared: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Payload {
    kernel: String,
    initramfs: String,
    cmdline: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Place {
    id: &'static str,
    pci_segment: u16,
    pci_device_id: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Disk {
    #[serde(flatten)]
    place: Place,
    path: String,
    image_type: &'static str,
    backing_files: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Card {
    #[serde(flatten)]
    place: Place,
    tap: String,
    mac: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Rng {
    #[serde(flatten)]
    place: Place,
    src: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Balloon {
    #[serde(flatten)]
    place: Place,
    size: u64,
    free_page_reporting: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Console {
    mode: &'static str,
}

/// Where the guest's memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryFrom {
    /// A memfd that the process inherits under this number.
    Inherited(i32),
    /// Descriptors that come with the hand-over.
    HandOver,
}

/// The machine for `spec`.
///
/// # Errors
/// The spec asks for what cannot be built.
pub fn machine(spec: &VmmSpec, memory: MemoryFrom) -> Result<VmConfig, SpecError> {
    check::numbers(spec)?;
    let disk = |path| -> Result<Disk, SpecError> {
        Ok(Disk {
            place: place("disk", DISK_SLOT),
            path: check::utf8("root disk", path)?.to_owned(),
            image_type: "Qcow2",
            // Off unless asked for; an overlay is nothing without its base.
            backing_files: true,
        })
    };
    Ok(VmConfig {
        cpus: Cpus {
            boot_vcpus: spec.vcpus,
            max_vcpus: spec.vcpus,
            nested: false,
        },
        memory: memory_of(spec, memory),
        payload: Payload {
            kernel: check::utf8("kernel", &spec.kernel)?.to_owned(),
            initramfs: check::utf8("initramfs", &spec.initramfs)?.to_owned(),
            cmdline: cmdline::join(KERNEL_WORDS, &spec.cmdline)?,
        },
        disks: spec
            .root_disk
            .iter()
            .map(|it| disk(it))
            .collect::<Result<_, _>>()?,
        net: spec.network.iter().map(card).collect::<Result<_, _>>()?,
        rng: Rng {
            place: place("rng", RNG_SLOT),
            src: ENTROPY,
        },
        balloon: Balloon {
            place: place("balloon", BALLOON_SLOT),
            size: 0,
            free_page_reporting: true,
        },
        // The process's standard output, which is a socket of ours.
        serial: Console { mode: "Tty" },
        console: Console { mode: "Off" },
    })
}

fn memory_of(spec: &VmmSpec, from: MemoryFrom) -> Memory {
    let file = match from {
        MemoryFrom::Inherited(fd) => Some(format!("/proc/self/fd/{fd}")),
        MemoryFrom::HandOver => None,
    };
    Memory {
        // All of it is in the zone.
        size: 0,
        // A huge page would be brought for one missing page of 4 KiB.
        thp: false,
        zones: [Zone {
            id: ZONE,
            size: spec.memory.bytes(),
            // Its owner sees what the guest writes.
            shared: true,
            file,
        }],
    }
}

fn card(network: &NetworkSpec) -> Result<Card, SpecError> {
    check::tap(&network.tap)?;
    Ok(Card {
        place: place("card", CARD_SLOT),
        tap: network.tap.clone(),
        mac: check::mac(network.mac),
    })
}

fn place(id: &'static str, pci_device_id: u8) -> Place {
    Place {
        id,
        pci_segment: 0,
        pci_device_id,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use proto::units::Mib;
    use serde_json::{Value, json};

    use super::*;
    use crate::vmm::{Accelerator, Confinement, Driver};

    pub(in super::super) fn spec() -> VmmSpec {
        VmmSpec {
            driver: Driver::CloudHypervisor,
            program: "/usr/bin/cloud-hypervisor".into(),
            accelerator: Accelerator::Kvm,
            kernel: "/images/vmlinuz".into(),
            initramfs: "/images/initramfs".into(),
            cmdline: "wrenn.probe=1".into(),
            vcpus: 2,
            memory: Mib(512),
            root_disk: Some("/data/overlay.qcow2".into()),
            network: Some(NetworkSpec {
                netns: "/run/netns/n".into(),
                tap: "tap7".into(),
                mac: [2, 0, 0, 0, 0, 0x1f],
            }),
            confinement: Confinement::default(),
        }
    }

    fn document(spec: &VmmSpec, memory: MemoryFrom) -> Value {
        let machine = machine(spec, memory).expect("can be built");
        serde_json::to_value(machine).expect("JSON")
    }

    #[test]
    fn a_machine_is_what_its_spec_says() {
        let document = document(&spec(), MemoryFrom::Inherited(9));
        let zone = json!({
            "id": "ram", "size": 536_870_912, "shared": true, "file": "/proc/self/fd/9",
        });
        let memory = json!({ "size": 0, "thp": false, "zones": [zone] });
        assert_eq!(document["memory"], memory);
        let disk = json!({
            "id": "disk", "pci_segment": 0, "pci_device_id": 2,
            "path": "/data/overlay.qcow2", "image_type": "Qcow2", "backing_files": true,
        });
        assert_eq!(document["disks"], json!([disk]));
        let card = json!({
            "id": "card", "pci_segment": 0, "pci_device_id": 3,
            "tap": "tap7", "mac": "02:00:00:00:00:1f",
        });
        assert_eq!(document["net"], json!([card]));
        assert_eq!(document["serial"], json!({ "mode": "Tty" }));
    }

    #[test]
    fn an_optional_device_does_not_move_the_others() {
        let bare = VmmSpec {
            root_disk: None,
            network: None,
            ..spec()
        };
        let (bare, full) = (
            document(&bare, MemoryFrom::HandOver),
            document(&spec(), MemoryFrom::HandOver),
        );
        assert_eq!(bare.get("disks"), None);
        assert_eq!(bare.get("net"), None);
        assert_eq!(bare["balloon"], full["balloon"]);
        assert_eq!(bare["rng"], full["rng"]);
    }

    #[test]
    fn what_cannot_be_built_is_refused() {
        let zero = VmmSpec { vcpus: 0, ..spec() };
        let relative = VmmSpec {
            kernel: "vmlinuz".into(),
            ..spec()
        };
        let mut quoted = spec();
        if let Some(network) = &mut quoted.network {
            network.tap = "tap\"7".into();
        }
        for bad in [zero, relative, quoted] {
            assert!(machine(&bad, MemoryFrom::HandOver).is_err(), "{bad:?}");
        }
    }

    proptest! {
        /// On another host paths, tap and descriptors are others, and nothing else is.
        #[test]
        fn only_what_is_the_hosts_own_differs_between_two_hosts(
            disk in "/[a-z,\"]{1,20}", kernel in "/[a-z]{1,20}", tap in "[a-z0-9]{1,15}", fd in 3..99,
        ) {
            let here = document(&spec(), MemoryFrom::Inherited(9));
            let mut other = spec();
            other.root_disk = Some(disk.clone().into());
            other.kernel = kernel.clone().into();
            if let Some(network) = &mut other.network {
                network.tap.clone_from(&tap);
            }
            let mut there = document(&other, MemoryFrom::Inherited(fd));
            prop_assert_eq!(&there["disks"][0]["path"], &json!(disk));
            there["disks"][0]["path"] = here["disks"][0]["path"].clone();
            there["payload"]["kernel"] = here["payload"]["kernel"].clone();
            there["net"][0]["tap"] = here["net"][0]["tap"].clone();
            there["memory"]["zones"][0]["file"] = here["memory"]["zones"][0]["file"].clone();
            prop_assert_eq!(there, here);
        }
    }
}
