//! QEMU's argument list, as a pure function of the spec.
//!
//! The machine is `q35` with everything taken off that can be: no disk controller, USB, SMBus,
//! keyboard controller, HPET or display. What the guest sees on its bus is the host bridge, the
//! ISA bridge, and one virtio function each for disk, network and entropy. `microvm` would have
//! fewer still, and under TCG its kernels hang at the TSC calibration in one boot of seven
//! (docs/internals/vmm.md has the figures).

use std::path::Path;

use serde_json::json;

use crate::vmm::error::SpecError;
use crate::vmm::{Accelerator, MAX_VCPUS, MIN_MEMORY, NetworkSpec, VmmSpec, cmdline};

/// The machine type, versioned: `q35` alone means another machine after an upgrade of QEMU, and
/// an old snapshot could not be resumed on it.
const MACHINE: &str = "pc-q35-7.2,usb=off,sata=off,smbus=off,i8042=off,hpet=off,vmport=off,\
                       dump-guest-core=off,mem-merge=off,memory-backend=ram";
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
/// The largest guest memory: what its type can hold, so that the sum below cannot overflow.
const MAX_MEMORY_MIB: u32 = 1 << 24;

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

/// The arguments after the program's name.
///
/// # Errors
/// The spec asks for what cannot be built.
pub fn arguments(spec: &VmmSpec, name: &str, fds: Inherited) -> Result<Vec<String>, SpecError> {
    check_range("vcpus", 1, u64::from(MAX_VCPUS), u64::from(spec.vcpus))?;
    let (least, most) = (u64::from(MIN_MEMORY.0), u64::from(MAX_MEMORY_MIB));
    check_range("memory in MiB", least, most, u64::from(spec.memory.0))?;
    let mut args = Args::default();
    args.flag("-nodefaults");
    args.flag("-no-user-config");
    args.flag("-no-reboot");
    args.option("-display", "none");
    args.option("-name", &escape(name));
    args.option("-sandbox", SANDBOX);
    args.option("-machine", MACHINE);
    processor(&mut args, spec);
    memory(&mut args, spec, fds.ram);
    channels(&mut args, fds);
    kernel(&mut args, spec)?;
    args.option("-device", "virtio-rng-pci");
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

fn processor(args: &mut Args, spec: &VmmSpec) {
    match spec.accelerator {
        Accelerator::Kvm => {
            args.option("-accel", "kvm");
            args.option("-cpu", "host");
        }
        Accelerator::Tcg => {
            // One thread for each virtual CPU, as KVM has.
            let tcg = format!("tcg,thread=multi,tb-size={TRANSLATION_MIB}");
            args.option("-accel", &tcg);
            args.option("-cpu", "max");
        }
    }
    args.option("-smp", &spec.vcpus.to_string());
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
    args.option("-kernel", utf8("kernel", &spec.kernel)?);
    args.option("-initrd", utf8("initramfs", &spec.initramfs)?);
    args.option("-append", &cmdline::join(KERNEL_WORDS, &spec.cmdline)?);
    Ok(())
}

fn root_disk(args: &mut Args, disk: &Path) -> Result<(), SpecError> {
    // JSON, because a comma in a path would end an option of the other form.
    let node = json!({
        "driver": "qcow2",
        "node-name": "root",
        "discard": "unmap",
        "file": { "driver": "file", "filename": utf8("root disk", disk)?, "discard": "unmap" },
    });
    args.option("-blockdev", &node.to_string());
    args.option(
        "-device",
        "virtio-blk-pci,drive=root,werror=report,rerror=report",
    );
    Ok(())
}

fn network_card(args: &mut Args, network: &NetworkSpec) -> Result<(), SpecError> {
    let tap = &network.tap;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    // 15 is the longest name the kernel gives an interface.
    if tap.is_empty() || tap.len() > 15 || !tap.chars().all(plain) {
        return Err(SpecError::Word {
            what: "tap name",
            value: tap.clone(),
        });
    }
    let mac = network.mac.map(|byte| format!("{byte:02x}")).join(":");
    let backend = format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost=off");
    args.option("-netdev", &backend);
    // No boot ROM: the guest never boots from the network.
    let card = format!("virtio-net-pci,netdev=net,mac={mac},romfile=");
    args.option("-device", &card);
    Ok(())
}

fn check_range(what: &'static str, least: u64, most: u64, found: u64) -> Result<(), SpecError> {
    if (least..=most).contains(&found) {
        return Ok(());
    }
    Err(SpecError::OutOfRange {
        what,
        least,
        most,
        found,
    })
}

fn utf8<'a>(what: &'static str, path: &'a Path) -> Result<&'a str, SpecError> {
    path.to_str()
        .filter(|_| path.is_absolute())
        .ok_or_else(|| SpecError::Path {
            what,
            path: path.to_owned(),
        })
}

/// A comma ends a value in an option list unless it is doubled.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use proto::units::Mib;

    use super::*;

    const NAME: &str = "/data/sandboxes/cl-1,a";
    const FDS: Inherited = Inherited {
        ram: 9,
        qmp: 10,
        console: 11,
    };

    fn spec() -> VmmSpec {
        VmmSpec {
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
        }
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
    fn tcg_emulates_the_largest_cpu_with_a_bounded_cache() {
        let args = arguments(&spec(), NAME, FDS).expect("valid spec");
        assert_eq!(value(&args, "-cpu", ""), "max");
        assert_eq!(value(&args, "-accel", ""), "tcg,thread=multi,tb-size=64");
    }

    #[test]
    fn kvm_shows_the_hosts_own_cpu() {
        let kvm = VmmSpec {
            accelerator: Accelerator::Kvm,
            ..spec()
        };
        let args = arguments(&kvm, NAME, FDS).expect("valid spec");
        assert_eq!(value(&args, "-cpu", ""), "host");
        assert_eq!(value(&args, "-accel", ""), "kvm");
    }

    #[test]
    fn memory_is_the_inherited_descriptor_shared() {
        let args = arguments(&spec(), NAME, FDS).expect("valid spec");
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
        let args = arguments(&spec(), NAME, FDS).expect("valid spec");
        let node: serde_json::Value =
            serde_json::from_str(value(&args, "-blockdev", "")).expect("JSON");
        assert_eq!(
            node["file"]["filename"],
            "/data/sandboxes/cl-1/root,1.qcow2"
        );
    }

    #[test]
    fn the_name_survives_its_commas() {
        let args = arguments(&spec(), NAME, FDS).expect("valid spec");
        assert_eq!(value(&args, "-name", ""), "/data/sandboxes/cl-1,,a");
    }

    #[test]
    fn a_guest_without_disk_and_network_has_no_such_devices() {
        let bare = VmmSpec {
            root_disk: None,
            network: None,
            ..spec()
        };
        let args = arguments(&bare, NAME, FDS).expect("valid spec").join(" ");
        assert!(
            !args.contains("virtio-blk") && !args.contains("virtio-net"),
            "{args}"
        );
    }

    #[test]
    fn the_kernel_line_keeps_every_protection() {
        let args = arguments(&spec(), NAME, FDS).expect("valid spec");
        let line = value(&args, "-append", "");
        assert!(line.starts_with("console=ttyS0 panic=-1 "), "{line}");
        assert!(line.ends_with(" wrenn.probe=1"), "{line}");
        assert!(
            !line.contains("mitigations") && !line.contains("kaslr"),
            "{line}"
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
            let refused = arguments(&bad, NAME, FDS);
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
            assert!(arguments(&bad, NAME, FDS).is_err(), "{tap:?} was accepted");
        }
        let relative = VmmSpec {
            kernel: "vmlinuz".into(),
            ..spec()
        };
        assert!(matches!(
            arguments(&relative, NAME, FDS),
            Err(SpecError::Path { .. })
        ));
    }
}
