//! QEMU's argument list, as a pure function of the spec.
//!
//! The machine is `q35` with everything taken off that can be: no disk controller, USB, SMBus,
//! keyboard controller, HPET or display. What the guest sees on its bus is the host bridge, the
//! ISA bridge, and one virtio function each for disk, network and entropy. `microvm` would have
//! fewer still, and under TCG its kernels hang at the TSC calibration in one boot of seven
//! (docs/internals/vmm.md has the figures).
//!
//! A guest that was saved is built the same way, but for its kernel, which is in its memory. Each
//! device has its place on the bus written down: an optional one must not move the others. What
//! a saved guest knows of is the *layout* of the machine; see [`machine`] before changing it. Not
//! part of it are paths, descriptors, the tap and the translation cache.

use std::path::Path;

use serde_json::json;

use crate::vmm::error::SpecError;
use crate::vmm::qemu::machine;
use crate::vmm::{Accelerator, Hardware, NetworkSpec, VmmSpec, check, cmdline};

/// The options of [`machine::MACHINE_TYPE`].
const MACHINE_OPTIONS: &str = "usb=off,sata=off,smbus=off,i8042=off,hpet=off,vmport=off,\
                               dump-guest-core=off,mem-merge=off,memory-backend=ram";
/// The devices' places on the bus, as they were when QEMU still chose them.
const RNG_SLOT: u32 = 1;
/// See [`RNG_SLOT`].
const DISK_SLOT: u32 = 2;
/// See [`RNG_SLOT`].
const CARD_SLOT: u32 = 3;
/// The balloon only takes back pages that the guest reports as free, so that they need not be
/// kept when it is saved; a guest without its driver does not notice it.
const BALLOON_SLOT: u32 = 4;
/// The translation cache of one guest in MiB. QEMU's own default is a gigabyte; the hot code of
/// a kernel and a shell fits into a tenth of this.
const TRANSLATION_MIB: u32 = 64;
/// System calls that QEMU's own filter takes away: old ones, gaining rights, starting other
/// programs, and changing priorities.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// What the machine needs of the kernel. The serial port is the console; a panic ends the VMM
/// at once (as a reset, which `-no-reboot` turns into an exit); and the only console lines are
/// warnings, because each costs emulated I/O. One serial port is looked for instead of four, and
/// the ciphers do not test themselves at each boot (a developer's check, off in an upstream
/// kernel, and a tenth of the boot under TCG). The kernel counts a few ticks of its timer to see
/// that it works, against a loop; an emulated processor that the host lets wait fails that, and the
/// kernel panics 0.02 s into its boot (under KVM it does not look). Nothing here takes a protection
/// from the guest.
const KERNEL_WORDS: &str =
    "console=ttyS0 panic=-1 quiet 8250.nr_uarts=1 cryptomgr.notests no_timer_check";

/// Descriptors that QEMU inherits, under the numbers given here.
#[derive(Clone, Copy, Debug)]
pub struct Inherited {
    /// The memfd that is the guest's memory.
    pub ram: i32,
    /// The management socket.
    pub qmp: i32,
    /// The serial console.
    pub console: i32,
}

/// Where the guest comes from.
#[derive(Clone, Copy, Debug)]
pub enum Origin<'a> {
    /// It boots its kernel.
    Boot,
    /// It was saved on this hardware, and its state is yet to come.
    Saved(&'a Hardware),
}

/// The arguments after the program's name.
///
/// # Errors
/// The spec asks for what cannot be built.
pub fn arguments(
    spec: &VmmSpec,
    origin: Origin<'_>,
    name: &str,
    fds: Inherited,
) -> Result<Vec<String>, SpecError> {
    check::numbers(spec)?;
    let mut args = Args::default();
    args.flag("-nodefaults");
    args.flag("-no-user-config");
    args.flag("-no-reboot");
    args.option("-display", "none");
    args.option("-name", &escape(name));
    args.option("-sandbox", SANDBOX);
    let machine_type = machine::MACHINE_TYPE;
    args.option("-machine", &format!("{machine_type},{MACHINE_OPTIONS}"));
    processor(&mut args, spec, origin)?;
    memory(&mut args, spec, fds.ram);
    channels(&mut args, fds);
    match origin {
        Origin::Boot => kernel(&mut args, spec)?,
        Origin::Saved(_) => incoming(&mut args),
    }
    always_there(&mut args);
    if let Some(disk) = &spec.root_disk {
        root_disk(&mut args, disk)?;
    }
    if let Some(network) = &spec.network {
        network_card(&mut args, network)?;
    }
    Ok(args.list)
}

#[derive(Default)]
struct Args {
    list: Vec<String>,
}

impl Args {
    fn flag(&mut self, name: &str) {
        self.list.push(name.to_owned());
    }

    fn option(&mut self, name: &str, value: &str) {
        self.flag(name);
        self.flag(value);
    }
}

fn processor(args: &mut Args, spec: &VmmSpec, origin: Origin<'_>) -> Result<(), SpecError> {
    let accelerator = spec.accelerator;
    match accelerator {
        Accelerator::Kvm => args.option("-accel", "kvm"),
        Accelerator::Tcg => {
            // One thread for each virtual CPU, as KVM has.
            let tcg = format!("tcg,thread=multi,tb-size={TRANSLATION_MIB}");
            args.option("-accel", &tcg);
        }
    }
    let model = match origin {
        Origin::Boot => machine::processor(&machine::of_new_guests(accelerator), accelerator)?,
        Origin::Saved(hardware) => machine::processor(hardware, accelerator)?,
    };
    args.option("-cpu", model);
    args.option("-smp", &spec.vcpus.to_string());
    Ok(())
}

fn memory(args: &mut Args, spec: &VmmSpec, ram: i32) {
    let size = spec.memory.0;
    args.option("-m", &format!("{size}M"));
    // Shared, so that its owner sees what the guest writes; never touched ahead, so that it
    // costs what the guest uses.
    let backend = format!(
        "memory-backend-file,id=ram,size={size}M,mem-path=/proc/self/fd/{ram},share=on,\
         prealloc=off,merge=off,dump=off"
    );
    args.option("-object", &backend);
}

fn channels(args: &mut Args, fds: Inherited) {
    args.option("-chardev", &format!("socket,id=qmp,fd={}", fds.qmp));
    args.option("-mon", "chardev=qmp,mode=control");
    args.option("-chardev", &format!("socket,id=console,fd={}", fds.console));
    args.option("-serial", "chardev:console");
}

fn kernel(args: &mut Args, spec: &VmmSpec) -> Result<(), SpecError> {
    args.option("-kernel", check::utf8("kernel", &spec.kernel)?);
    args.option("-initrd", check::utf8("initramfs", &spec.initramfs)?);
    args.option("-append", &cmdline::join(KERNEL_WORDS, &spec.cmdline)?);
    Ok(())
}

/// The state comes by the management socket. `-S`: whatever it says of the virtual CPUs, they
/// stand still until told to run.
fn incoming(args: &mut Args) {
    args.option("-incoming", "defer");
    args.flag("-S");
}

fn always_there(args: &mut Args) {
    let rng = format!("virtio-rng-pci,id=rng,addr={RNG_SLOT}");
    args.option("-device", &rng);
    let balloon =
        format!("virtio-balloon-pci,id=balloon,addr={BALLOON_SLOT},free-page-reporting=on");
    args.option("-device", &balloon);
}

fn root_disk(args: &mut Args, disk: &Path) -> Result<(), SpecError> {
    // JSON, because a comma in a path would end an option of the other form.
    let node = json!({
        "driver": "qcow2",
        "node-name": "root",
        "discard": "unmap",
        "file": { "driver": "file", "filename": check::utf8("root disk", disk)?, "discard": "unmap" },
    });
    args.option("-blockdev", &node.to_string());
    let device =
        format!("virtio-blk-pci,id=disk,addr={DISK_SLOT},drive=root,werror=report,rerror=report");
    args.option("-device", &device);
    Ok(())
}

fn network_card(args: &mut Args, network: &NetworkSpec) -> Result<(), SpecError> {
    let tap = &network.tap;
    check::tap(tap)?;
    let mac = check::mac(network.mac);
    let backend = format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost=off");
    args.option("-netdev", &backend);
    // No boot ROM: the guest never boots from the network.
    let card = format!("virtio-net-pci,id=card,addr={CARD_SLOT},netdev=net,mac={mac},romfile=");
    args.option("-device", &card);
    Ok(())
}

/// A comma ends a value in an option list unless it is doubled.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use proto::units::Mib;

    use super::*;
    use crate::vmm::{Confinement, Driver};

    const NAME: &str = "/data/sandboxes/cl-1,a";
    const FDS: Inherited = Inherited {
        ram: 9,
        qmp: 10,
        console: 11,
    };

    fn spec() -> VmmSpec {
        VmmSpec {
            driver: Driver::Qemu,
            program: "/usr/bin/qemu-system-x86_64".into(),
            accelerator: Accelerator::Tcg,
            kernel: "/images/vmlinuz".into(),
            initramfs: "/images/initramfs".into(),
            cmdline: "wrenn.probe=1".into(),
            vcpus: 2,
            memory: Mib(512),
            root_disk: Some("/data/sandboxes/cl-1/root,1.qcow2".into()),
            network: Some(NetworkSpec {
                netns: "/run/netns/wr1".into(),
                tap: "tap0".into(),
                mac: [2, 0, 0xa9, 0xfe, 0, 0x15],
            }),
            confinement: Confinement::default(),
        }
    }

    fn boot(spec: &VmmSpec) -> Result<Vec<String>, SpecError> {
        arguments(spec, Origin::Boot, NAME, FDS)
    }

    fn value<'a>(args: &'a [String], option: &str, containing: &str) -> &'a str {
        args.windows(2)
            .find(|pair| pair[0] == option && pair[1].contains(containing))
            .map_or_else(
                || panic!("no {option} {containing} in {args:?}"),
                |pair| &pair[1],
            )
    }

    #[test]
    fn tcg_emulates_a_cpu_that_is_spelled_out_with_a_bounded_cache() {
        let args = boot(&spec()).expect("valid spec");
        assert!(value(&args, "-cpu", "").starts_with("qemu64-v1,"));
        assert_eq!(value(&args, "-accel", ""), "tcg,thread=multi,tb-size=64");
    }

    #[test]
    fn kvm_shows_the_hosts_own_cpu() {
        let kvm = VmmSpec {
            accelerator: Accelerator::Kvm,
            ..spec()
        };
        let args = boot(&kvm).expect("valid spec");
        assert_eq!(value(&args, "-cpu", ""), "host");
        assert_eq!(value(&args, "-accel", ""), "kvm");
    }

    #[test]
    fn memory_is_the_inherited_descriptor_shared() {
        let args = boot(&spec()).expect("valid spec");
        let backend = value(&args, "-object", "memory-backend");
        assert!(
            backend.contains("mem-path=/proc/self/fd/9,share=on"),
            "{backend}"
        );
        assert!(backend.contains("size=512M"), "{backend}");
        assert_eq!(value(&args, "-m", ""), "512M");
    }

    #[test]
    fn a_path_with_a_comma_stays_one_path() {
        let args = boot(&spec()).expect("valid spec");
        let node: serde_json::Value =
            serde_json::from_str(value(&args, "-blockdev", "")).expect("JSON");
        assert_eq!(
            node["file"]["filename"],
            "/data/sandboxes/cl-1/root,1.qcow2"
        );
    }

    #[test]
    fn the_name_survives_its_commas() {
        let args = boot(&spec()).expect("valid spec");
        assert_eq!(value(&args, "-name", ""), "/data/sandboxes/cl-1,,a");
    }

    #[test]
    fn a_guest_without_disk_and_network_has_no_such_devices() {
        let bare = VmmSpec {
            root_disk: None,
            network: None,
            ..spec()
        };
        let args = boot(&bare).expect("valid spec").join(" ");
        assert!(
            !args.contains("virtio-blk") && !args.contains("virtio-net"),
            "{args}"
        );
    }

    #[test]
    fn the_kernel_line_keeps_every_protection() {
        let args = boot(&spec()).expect("valid spec");
        let line = value(&args, "-append", "");
        assert!(line.starts_with("console=ttyS0 panic=-1 "), "{line}");
        assert!(line.ends_with(" wrenn.probe=1"), "{line}");
        assert!(
            !line.contains("mitigations") && !line.contains("kaslr"),
            "{line}"
        );
    }

    #[test]
    fn a_saved_guest_is_built_like_a_new_one_but_for_its_kernel() {
        let hardware = machine::of_new_guests(Accelerator::Tcg);
        let args = arguments(&spec(), Origin::Saved(&hardware), NAME, FDS).expect("valid spec");
        assert_eq!(value(&args, "-incoming", ""), "defer");
        let text = args.join(" ");
        for booted in ["-kernel", "-initrd", "-append"] {
            assert!(!text.contains(booted), "{text}");
        }
        let booting = boot(&spec()).expect("valid spec");
        for option in ["-machine", "-cpu", "-smp", "-m", "-object", "-device"] {
            let values = |args: &[String]| -> Vec<String> {
                let pairs = args.windows(2).filter(|pair| pair[0] == option);
                pairs.map(|pair| pair[1].clone()).collect()
            };
            assert_eq!(values(&args), values(&booting), "{option}");
        }
    }

    #[test]
    fn every_device_has_its_own_place_that_no_other_can_take() {
        let args = boot(&spec()).expect("valid spec");
        for (device, place) in [
            ("virtio-rng-pci", "id=rng,addr=1"),
            ("virtio-blk-pci", "id=disk,addr=2"),
            ("virtio-net-pci", "id=card,addr=3"),
            ("virtio-balloon-pci", "id=balloon,addr=4"),
        ] {
            let value = value(&args, "-device", device);
            assert!(value.contains(place), "{value}");
        }
    }

    #[test]
    fn a_guest_saved_on_other_hardware_is_refused() {
        let other = Hardware {
            machine: "pc-q35-8.0/1".into(),
            ..machine::of_new_guests(Accelerator::Tcg)
        };
        let refused = arguments(&spec(), Origin::Saved(&other), NAME, FDS);
        assert!(
            matches!(refused, Err(SpecError::UnknownHardware { .. })),
            "{refused:?}"
        );
    }

    #[test]
    fn sizes_that_cannot_be_built_are_refused_by_name() {
        for (vcpus, memory) in [(0, 512), (65, 512), (1, 0), (1, 63), (1, u32::MAX)] {
            let bad = VmmSpec {
                vcpus,
                memory: Mib(memory),
                ..spec()
            };
            let refused = boot(&bad);
            assert!(
                matches!(refused, Err(SpecError::OutOfRange { .. })),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn names_that_would_become_options_are_refused() {
        for tap in ["", "tap0,script=/bin/sh", "a-name-past-sixteen", "tap 0"] {
            let mut bad = spec();
            bad.network.as_mut().expect("has one").tap = tap.into();
            assert!(boot(&bad).is_err(), "{tap:?} was accepted");
        }
        let relative = VmmSpec {
            kernel: "vmlinuz".into(),
            ..spec()
        };
        assert!(matches!(boot(&relative), Err(SpecError::Path { .. })));
    }
}
