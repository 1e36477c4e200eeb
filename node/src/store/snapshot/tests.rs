//! Snapshot manifests as they come from a peer.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

pub(in crate::store) fn manifest(memory: ImageRef, disk: ImageRef) -> SnapshotManifest {
    let mib = u32::try_from(memory.len_bytes >> 20).unwrap();
    SnapshotManifest {
        sandbox: SandboxId([3; 16]),
        epoch: Epoch(7),
        created_at: Stamp(1_700_000_000_000),
        parent: Some(SnapshotDigest([5; 32])),
        running: Some(Running {
            memory,
            device_state: disk,
        }),
        disk,
        working_set: None,
        base: ImageDigest([6; 32]),
        machine: MachineFacts {
            driver: "qemu".into(),
            driver_version: "7.2.19".into(),
            machine_type: "microvm-7.2".into(),
            cpu_model: "max".into(),
            accelerator: "tcg".into(),
            vcpus: 2,
            memory: Mib(mib),
        },
        guest: GuestFacts {
            kernel: "6.1.0-41-cloud-amd64".into(),
            initramfs: "0.6.7".into(),
            agent: "0.6.7".into(),
            mac: [2, 0, 0xa9, 0xfe, 0, 0x15],
            address: Ipv4Addr::new(169, 254, 0, 21),
            prefix: 30,
            gateway: Ipv4Addr::new(169, 254, 0, 22),
            token: "secret".into(),
        },
    }
}

fn image(fill: u8, len_bytes: u64) -> ImageRef {
    ImageRef {
        digest: ImageDigest([fill; 32]),
        len_bytes,
    }
}

fn example() -> SnapshotManifest {
    manifest(image(1, 256 << 20), image(2, 196_616))
}

fn signed() -> SignedSnapshot {
    SignedSnapshot::sign(example(), &Identity::ephemeral().unwrap()).unwrap()
}

#[test]
fn a_signed_snapshot_is_read_back_and_names_its_signer() {
    let identity = Identity::ephemeral().unwrap();
    let signed = SignedSnapshot::sign(example(), &identity).unwrap();
    assert_eq!(signed.signer(), identity.key());
    let read = SignedSnapshot::decode(&signed.encode(), |key| *key == identity.key());
    assert_eq!(read, Ok(signed));
}

#[test]
fn a_node_that_may_not_seal_is_named() {
    let signed = signed();
    let refused = SignedSnapshot::decode(&signed.encode(), |_| false);
    let signer = signed.signer();
    assert_eq!(refused, Err(DecodeSnapshotError::Signer { signer }));
}

#[test]
fn the_signature_of_another_snapshot_does_not_fit() {
    let identity = Identity::ephemeral().unwrap();
    let other = SnapshotManifest {
        epoch: Epoch(8),
        ..example()
    };
    let mut bytes = SignedSnapshot::sign(example(), &identity).unwrap().encode();
    let theirs = SignedSnapshot::sign(other, &identity).unwrap().encode();
    bytes[44..108].copy_from_slice(&theirs[44..108]);
    let refused = SignedSnapshot::decode(&bytes, |_| true);
    assert_eq!(refused, Err(DecodeSnapshotError::Signature));
}

#[test]
fn fields_out_of_bounds_are_refused_by_name_both_ways() {
    let refused = |change: fn(&mut SnapshotManifest)| {
        let mut manifest = example();
        change(&mut manifest);
        manifest.encode().unwrap_err().to_string()
    };
    for (said, field) in [
        (refused(|m| m.machine.driver = "x".repeat(256)), "driver"),
        (refused(|m| m.guest.kernel = "a\nb".into()), "kernel"),
        (refused(|m| m.disk.len_bytes = 0), "length"),
        (refused(|m| m.disk.len_bytes = u64::MAX), "length"),
        (refused(|m| m.machine.memory = Mib(255)), "memory"),
        (refused(|m| m.machine.vcpus = 0), "vcpus"),
        (refused(|m| m.guest.prefix = 33), "prefix"),
    ] {
        assert!(said.contains(field), "{said}");
    }
    let mut bytes = example().encode().unwrap();
    // Behind it stand the gateway and the token.
    let prefix_at = bytes.len() - 5 - 1 - "secret".len();
    bytes[prefix_at] = 33;
    assert!(SnapshotManifest::decode(&bytes).is_err());
}

#[test]
fn another_version_is_named() {
    let mut bytes = example().encode().unwrap();
    bytes[8] = 4;
    let refused = SnapshotManifest::decode(&bytes).unwrap_err();
    assert_eq!(refused, DecodeSnapshotError::Version { found: 4, ours: 3 });
}

#[test]
fn a_manifest_has_a_working_set_in_its_second_version_and_only_there() {
    let without = example();
    let with = SnapshotManifest {
        working_set: Some(ImageRef {
            digest: ImageDigest([8; 32]),
            len_bytes: 52,
        }),
        ..example()
    };
    let mut bytes = with.encode().unwrap();
    assert_eq!(with.images().len(), without.images().len() + 1);
    assert_eq!(SnapshotManifest::decode(&bytes), Ok(with));
    bytes[8] = 1;
    assert!(SnapshotManifest::decode(&bytes).is_err());
    let mut bytes = without.encode().unwrap();
    assert_eq!(bytes[8], 1, "as releases before it wrote it");
    bytes[8] = 2;
    assert!(SnapshotManifest::decode(&bytes).is_err());
}

#[test]
fn a_manifest_of_a_disk_alone_has_a_version_of_its_own_and_one_image() {
    let disk = SnapshotManifest {
        running: None,
        ..example()
    };
    let mut bytes = disk.encode().unwrap();
    assert_eq!((bytes[8], disk.images()), (3, vec![disk.disk]));
    assert_eq!(SnapshotManifest::decode(&bytes), Ok(disk.clone()));
    for other in [1, 2] {
        bytes[8] = other;
        assert!(SnapshotManifest::decode(&bytes).is_err());
    }
    let mut bytes = example().encode().unwrap();
    bytes[8] = 3;
    assert!(SnapshotManifest::decode(&bytes).is_err());
    let works = SnapshotManifest {
        working_set: Some(disk.disk),
        ..disk
    };
    assert!(works.encode().is_err(), "it has no memory");
}

#[test]
fn a_signed_snapshot_cut_at_any_byte_is_refused() {
    let bytes = signed().encode();
    for length in 0..bytes.len() {
        assert!(SignedSnapshot::decode(&bytes[..length], |_| true).is_err());
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    let bytes = signed().encode();
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(
            SignedSnapshot::decode(&flipped, |_| true).is_err(),
            "bit {bit}"
        );
    }
}

proptest! {
    #[test]
    fn every_manifest_has_one_spelling(
        sandbox: [u8; 16], epoch: u64, created: u64, parent: Option<[u8; 32]>, digests: [[u8; 32]; 4],
        works: Option<[u8; 32]>,
        disk_bytes in 1..MAX_IMAGE_BYTES, mib in 1_u32..1 << 20, vcpus in 1_u32.., text in "\\PC{0,60}",
    ) {
        let [memory, disk, base, _] = digests.map(ImageDigest);
        let memory = ImageRef { digest: memory, len_bytes: Mib(mib).bytes() };
        let disk = ImageRef { digest: disk, len_bytes: disk_bytes };
        let mut made = manifest(memory, disk);
        made.sandbox = SandboxId(sandbox);
        made.epoch = Epoch(epoch);
        made.created_at = Stamp(created);
        made.parent = parent.map(SnapshotDigest);
        made.base = base;
        made.working_set = works.map(|it| ImageRef { digest: ImageDigest(it), len_bytes: disk_bytes });
        made.machine.vcpus = vcpus;
        made.machine.cpu_model = text;
        let bytes = made.encode().unwrap();
        prop_assert!(bytes.len() + 108 <= MAX_SIGNED_BYTES);
        prop_assert_eq!(SnapshotManifest::decode(&bytes), Ok(made));
    }

    #[test]
    fn a_damaged_body_is_refused_or_is_another_manifest(at: prop::sample::Index, byte: u8) {
        let mut bytes = example().encode().unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(read) = SnapshotManifest::decode(&bytes) {
            prop_assert_eq!(read.encode(), Ok(bytes));
        }
    }

    #[test]
    fn no_bytes_make_the_decoders_panic(bytes in vec(any::<u8>(), 0..600)) {
        let _ = SnapshotManifest::decode(&bytes);
        let _ = SignedSnapshot::decode(&bytes, |_| true);
        let mut begun = SIGNED_MAGIC.to_vec();
        begun.extend(SNAPSHOT_VERSION.to_le_bytes());
        begun.extend(&bytes);
        let _ = SignedSnapshot::decode(&begun, |_| true);
        let mut body = example().encode().unwrap();
        body.truncate(12);
        body.extend(bytes);
        let _ = SnapshotManifest::decode(&body);
    }
}
