//! The probe decides by booting. Ignored unless asked for (see `shim_support`).

mod shim_support;

use shim_support::{QEMU, images};
use wrenn_node::vmm::probe::{ProbeError, ProbeRequest, probe};
use wrenn_node::vmm::{Accelerator, Driver};

#[test]
#[ignore = "boots real guests"]
fn the_fastest_accelerator_that_boots_is_chosen_and_remembered() {
    let dir = tempfile::tempdir().expect("tempdir");
    let request = ProbeRequest {
        driver: Driver::Qemu,
        program: QEMU.into(),
        forgoable: false,
        kernel: images().kernel.clone(),
        initramfs: images().initramfs.clone(),
        cache: Some(dir.path().join("probe.json")),
    };
    let first = probe(&request).expect("TCG works everywhere");
    println!("{first:#?}");
    let (last, earlier) = first.attempts.split_last().expect("something was tried");
    assert!(last.ok);
    assert_eq!(last.accelerator, first.accelerator.name());
    // KVM comes first, and is passed over only with a reason.
    match first.accelerator {
        Accelerator::Kvm => assert!(earlier.is_empty()),
        Accelerator::Tcg => assert!(!earlier[0].ok && !earlier[0].detail.is_empty()),
    }
    let second = probe(&request).expect("again");
    assert!(second.remembered && !first.remembered);
    assert_eq!(second.accelerator, first.accelerator);
}

#[test]
#[ignore = "starts real VMMs"]
fn where_no_guest_boots_every_reason_is_given() {
    let request = ProbeRequest {
        driver: Driver::Qemu,
        program: QEMU.into(),
        forgoable: false,
        // Not a kernel: QEMU itself refuses it.
        kernel: images().initramfs.clone(),
        initramfs: images().initramfs.clone(),
        cache: None,
    };
    let err = probe(&request).expect_err("nothing boots");
    let ProbeError::NoneWorks { attempts } = &err else {
        panic!("{err}");
    };
    assert_eq!(attempts.len(), 2);
    assert!(attempts.iter().all(|attempt| !attempt.ok), "{err}");
}
