//! What hardware this driver builds, and under which names.
//!
//! Nothing here may change under its name; see the same file of QEMU. The release is part of the
//! name: the layout of its state document is its own. The processor is the host's, since Cloud
//! Hypervisor needs KVM.

use crate::vmm::Hardware;
use crate::vmm::cloud_hypervisor::version::Version;
use crate::vmm::error::SpecError;
use crate::vmm::processor::{HOST_PREFIX, host_processor};

/// What the name of every machine of this driver begins with.
pub const PREFIX: &str = "cloud-hypervisor-";
/// Our choice of devices, their names and their places ([`super::config`]).
pub const LAYOUT: u32 = 1;

/// The hardware of new guests of `version` on this host.
#[must_use]
pub fn of_new_guests(version: Version) -> Hardware {
    Hardware {
        machine: name(version),
        cpu: host_processor(),
    }
}

/// Whether a guest that was saved on `hardware` can be brought back by `version` on this host.
///
/// # Errors
/// It was saved on a machine that this one cannot build, or on another processor.
pub fn check(hardware: &Hardware, version: Version) -> Result<(), SpecError> {
    let here = of_new_guests(version);
    if hardware.machine != here.machine {
        return Err(SpecError::unknown("machine", &hardware.machine));
    }
    if hardware.cpu == here.cpu {
        return Ok(());
    }
    if hardware.cpu.starts_with(HOST_PREFIX) {
        return Err(SpecError::OtherProcessor {
            wanted: hardware.cpu.clone(),
            found: here.cpu,
        });
    }
    Err(SpecError::unknown("processor", &hardware.cpu))
}

/// Whether `hardware` is of this driver.
#[must_use]
pub fn is_ours(hardware: &Hardware) -> bool {
    hardware.machine.starts_with(PREFIX)
}

fn name(version: Version) -> String {
    let major = version.major;
    format!("{PREFIX}{major}/{LAYOUT}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Version = Version {
        major: 53,
        minor: 0,
    };

    #[test]
    fn a_guest_goes_on_with_the_release_that_saved_it_and_no_other() {
        let hardware = of_new_guests(HERE);
        assert_eq!(hardware.machine, "cloud-hypervisor-53/1");
        check(&hardware, HERE).expect("the same");
        let later = Version { minor: 4, ..HERE };
        check(&hardware, later).expect("a correction of it");
        let next = Version {
            major: 54,
            minor: 0,
        };
        let refused = check(&hardware, next).expect_err("another");
        assert!(
            refused.to_string().contains("cloud-hypervisor-53/1"),
            "{refused}"
        );
    }

    #[test]
    fn a_guest_of_another_processor_or_driver_is_refused() {
        let ours = of_new_guests(HERE);
        let elsewhere = Hardware {
            cpu: "host-GenuineIntel-0-0-0".into(),
            ..ours.clone()
        };
        let refused = check(&elsewhere, HERE);
        assert!(
            matches!(refused, Err(SpecError::OtherProcessor { .. })),
            "{refused:?}"
        );
        let qemu = Hardware {
            machine: "pc-q35-7.2/1".into(),
            ..ours
        };
        assert!(check(&qemu, HERE).is_err());
        assert!(!is_ours(&qemu));
    }
}
