//! What hardware this driver builds, and under which names.
//!
//! Nothing here may change under its name: a snapshot carries the names ([`Hardware`]), and its
//! device state fits what they meant when it was made. Whoever changes the machine's options, a
//! device, its place on the bus or a processor's features adds a layout or a profile and keeps
//! the old one.
//!
//! Under TCG the processor is spelled out, feature by feature, and `enforce` makes a QEMU that
//! cannot emulate one of them refuse to start; QEMU's own `max` would mean another processor in
//! each release. Under KVM it is the host's own, and its name says which that is: a guest saved
//! on another one is refused.

use crate::vmm::error::SpecError;
use crate::vmm::processor::{HOST_PREFIX, host_processor};
use crate::vmm::{Accelerator, Hardware};

/// The machine type, versioned: `q35` alone means another machine after an upgrade of QEMU.
pub const MACHINE_TYPE: &str = "pc-q35-7.2";
/// Our choice of the machine's options and devices, and of their places ([`super::args`]).
pub const LAYOUT: u32 = 1;
/// The processor of guests under TCG.
const TCG_PROFILE: &str = "tcg-1";

/// [`TCG_PROFILE`]: what TCG of QEMU 7.2 can do, as `max` says there, without nested
/// virtualisation, what current kernels and compilers have given up (3DNow!, MPX), and five levels
/// of page tables, which only make translation slower.
const TCG_1: &str = "qemu64-v1,svm=off,abm=on,acpi=on,adx=on,aes=on,arat=on,avx=on,avx2=on,\
                     bmi1=on,bmi2=on,clflushopt=on,clwb=on,cr8legacy=on,erms=on,f16c=on,fma=on,\
                     fsgsbase=on,mmxext=on,monitor=on,movbe=on,pclmulqdq=on,pdpe1gb=on,pku=on,\
                     popcnt=on,rdrand=on,rdtscp=on,smap=on,smep=on,ss=on,sse4.1=on,sse4.2=on,\
                     sse4a=on,ssse3=on,umip=on,vaes=on,xgetbv1=on,xsave=on,xsaveopt=on,enforce=on";

/// The hardware of new guests on this host.
#[must_use]
pub fn of_new_guests(accelerator: Accelerator) -> Hardware {
    Hardware {
        machine: machine_name(),
        cpu: match accelerator {
            Accelerator::Kvm => host_processor(),
            Accelerator::Tcg => TCG_PROFILE.to_owned(),
        },
    }
}

/// QEMU's description of the processor of a guest on `hardware`.
///
/// # Errors
/// This release, or this host, cannot build it.
pub fn processor(hardware: &Hardware, accelerator: Accelerator) -> Result<&'static str, SpecError> {
    let here = of_new_guests(accelerator);
    if hardware.machine != here.machine {
        return Err(SpecError::unknown("machine", &hardware.machine));
    }
    match accelerator {
        Accelerator::Tcg if hardware.cpu == here.cpu => Ok(TCG_1),
        Accelerator::Kvm if hardware.cpu == here.cpu => Ok("host"),
        Accelerator::Kvm if hardware.cpu.starts_with(HOST_PREFIX) => {
            Err(SpecError::OtherProcessor {
                wanted: hardware.cpu.clone(),
                found: here.cpu,
            })
        }
        Accelerator::Kvm | Accelerator::Tcg => Err(SpecError::unknown("processor", &hardware.cpu)),
    }
}

/// The machine type in the name of a machine.
#[must_use]
pub fn type_of(machine: &str) -> &str {
    machine.split('/').next().unwrap_or(machine)
}

fn machine_name() -> String {
    format!("{MACHINE_TYPE}/{LAYOUT}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_under_tcg_has_the_same_processor_everywhere() {
        let hardware = of_new_guests(Accelerator::Tcg);
        assert_eq!(hardware.to_string(), "pc-q35-7.2/1 with tcg-1");
        let processor = processor(&hardware, Accelerator::Tcg).expect("ours");
        assert!(processor.ends_with(",enforce=on"), "{processor}");
    }

    #[test]
    fn hardware_that_this_release_cannot_build_is_refused_by_name() {
        let ours = of_new_guests(Accelerator::Tcg);
        let older = Hardware {
            machine: "pc-q35-7.1/1".into(),
            ..ours.clone()
        };
        let newer = Hardware {
            machine: "pc-q35-7.2/2".into(),
            ..ours.clone()
        };
        let other_cpu = Hardware {
            cpu: "max,+evil".into(),
            ..ours
        };
        for (hardware, name) in [
            (older, "pc-q35-7.1/1"),
            (newer, "pc-q35-7.2/2"),
            (other_cpu, "max,+evil"),
        ] {
            let refused = processor(&hardware, Accelerator::Tcg).expect_err("unknown");
            assert!(refused.to_string().contains(name), "{refused}");
        }
    }

    #[test]
    fn a_guest_of_another_hosts_processor_is_refused_by_name() {
        let elsewhere = Hardware {
            cpu: "host-GenuineIntel-0-0-0".into(),
            ..of_new_guests(Accelerator::Kvm)
        };
        let refused = processor(&elsewhere, Accelerator::Kvm);
        assert!(
            matches!(refused, Err(SpecError::OtherProcessor { .. })),
            "{refused:?}"
        );
        // A guest of one accelerator does not run under the other.
        let emulated = of_new_guests(Accelerator::Tcg);
        assert!(processor(&emulated, Accelerator::Kvm).is_err());
    }
}
