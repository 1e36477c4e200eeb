//! The catalog over images directories made here, good and bad.

use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;
use crate::store::DataDir;

/// An images directory with one good template, and a data directory.
struct World {
    dir: tempfile::TempDir,
    data: DataDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(&dir.path().join("data")).unwrap();
        let world = Self { dir, data };
        let images = world.images();
        fs::create_dir_all(images.join("kernel")).unwrap();
        fs::write(images.join("kernel/vmlinuz"), b"bits").unwrap();
        fs::write(images.join("kernel/release"), b"6.1.0-9-cloud-amd64\n").unwrap();
        fs::write(images.join("initramfs"), b"bits").unwrap();
        world.template("minimal", r#"{"name":"minimal","disk_mib":8}"#, 8 << 20);
        world
    }

    fn images(&self) -> PathBuf {
        self.dir.path().join("images")
    }

    fn template(&self, dir: &str, description: &str, bytes: u64) {
        let dir = self.images().join("templates").join(dir);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("template.json"), description).unwrap();
        let file = File::create(dir.join("rootfs.raw")).unwrap();
        file.set_len(bytes).unwrap();
    }

    fn open(&self) -> Result<Catalog, OpenCatalogError> {
        Catalog::open(&self.images(), self.data.paths())
    }

    fn minimal(&self) -> Template {
        let catalog = self.open().unwrap();
        catalog.get(&"minimal".parse().unwrap()).unwrap().clone()
    }
}

#[test]
fn a_copy_that_a_crash_interrupted_is_removed() {
    let world = World::new();
    let kept = world.data.paths().template_image(world.minimal().digest);
    let half = durable::temp_beside(&kept);
    fs::write(&half, b"half").unwrap();

    world.open().unwrap();
    assert!(!half.exists());
    assert!(kept.exists());
}

#[test]
fn a_good_directory_yields_its_kernel_and_templates() {
    let world = World::new();
    let catalog = world.open().unwrap();

    assert_eq!(catalog.guest().kernel_release, "6.1.0-9-cloud-amd64");
    let names: Vec<_> = catalog.templates().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["minimal"]);
    let minimal = world.minimal();
    assert_eq!(minimal.disk, Mib(8));
    assert!(minimal.rootfs.is_absolute() && minimal.rootfs.exists());
    assert_eq!(catalog.by_digest(minimal.digest), Some(&minimal));
    assert!(catalog.unusable().is_empty());
}

#[test]
fn what_is_missing_is_named_with_the_script_that_makes_it() {
    for (file, script) in [
        ("kernel/vmlinuz", "deploy/images/kernel"),
        ("kernel/release", "deploy/images/kernel"),
        ("initramfs", "deploy/images/initramfs"),
        ("templates", "deploy/images/rootfs"),
    ] {
        let world = World::new();
        let path = world.images().join(file);
        fs::rename(&path, world.dir.path().join("away")).unwrap();
        let said = world.open().unwrap_err().to_string();
        assert!(said.contains(file) && said.contains(script), "{said}");
    }
}

#[test]
fn a_kernel_release_that_is_none_is_refused() {
    let world = World::new();
    for bad in ["", "\n", "6.1 rm -rf", "6.1\u{7}", &"6".repeat(65)] {
        fs::write(world.images().join("kernel/release"), bad).unwrap();
        assert!(world.open().is_err(), "{bad:?} was accepted");
    }
}

#[test]
fn a_broken_template_is_reported_and_the_others_still_work() {
    let world = World::new();
    world.template(".half", "", 0);
    world.template("-dash", r#"{"name":"-dash","disk_mib":8}"#, 8 << 20);
    world.template("other", r#"{"name":"minimal","disk_mib":8}"#, 8 << 20);
    world.template("cut", r#"{"name":"cut","disk_"#, 8 << 20);
    world.template(
        "extra",
        r#"{"name":"extra","disk_mib":8,"run":"sh"}"#,
        8 << 20,
    );
    world.template("negative", r#"{"name":"negative","disk_mib":-1}"#, 8 << 20);
    world.template("zero", r#"{"name":"zero","disk_mib":0}"#, 8 << 20);
    world.template("huge", r#"{"name":"huge","disk_mib":4294967295}"#, 8 << 20);
    world.template("small", r#"{"name":"small","disk_mib":7}"#, 8 << 20);
    world.template("odd", r#"{"name":"odd","disk_mib":8}"#, 5);
    world.template("empty", r#"{"name":"empty","disk_mib":8}"#, 0);
    let catalog = world.open().unwrap();

    assert_eq!(catalog.templates().count(), 1);
    assert_eq!(catalog.unusable().len(), 10, "{:#?}", catalog.unusable());
}

#[test]
fn a_digest_is_remembered_and_a_damaged_memory_made_anew() {
    let world = World::new();
    let first = world.minimal();
    let cache = DigestCache::path(world.data.paths());
    let written = fs::read(&cache).unwrap();

    // What is remembered is believed: plant another digest and see it come back.
    let planted = ImageDigest([7; 32]);
    let text = String::from_utf8(written.clone()).unwrap();
    let text = text.replace(&first.digest.to_string(), &planted.to_string());
    fs::write(&cache, text).unwrap();
    assert_eq!(world.minimal().digest, planted);

    for damaged in [&b"{"[..], b"", b"{\"known\":{\"minimal\":3}}"] {
        fs::write(&cache, damaged).unwrap();
        assert_eq!(world.minimal(), first);
        assert_eq!(fs::read(&cache).unwrap(), written);
    }
}

#[test]
fn a_rebuilt_image_of_the_same_size_gets_another_digest_and_path() {
    let world = World::new();
    let first = world.minimal();
    let image = world.images().join("templates/minimal/rootfs.raw");
    fs::remove_file(&image).unwrap();
    let file = File::create(&image).unwrap();
    file.set_len(8 << 20).unwrap();
    file.write_all_at(b"newer", 4096).unwrap();

    let second = world.minimal();
    assert_ne!(first.digest, second.digest);
    assert_ne!(first.rootfs, second.rootfs);
    assert!(first.rootfs.exists());
}

#[test]
fn names_with_parts_controls_or_no_beginning_are_refused() {
    for bad in [
        "", ".", "..", "../x", "a/b", "a\\b", "-a", "_a", "a b", "a\n", "a\0", "ä",
    ] {
        assert!(bad.parse::<TemplateName>().is_err(), "{bad:?}");
    }
    assert!("a".repeat(65).parse::<TemplateName>().is_err());
    for good in ["a", "0", "minimal-ubuntu", "A.b_c-9"] {
        assert_eq!(good.parse::<TemplateName>().unwrap().as_str(), good);
    }
    "a".repeat(64).parse::<TemplateName>().unwrap();
}

proptest! {
    #[test]
    fn a_name_that_is_accepted_is_one_path_component(text in ".{0,70}") {
        if let Ok(name) = text.parse::<TemplateName>() {
            let path = Path::new("/t").join(name.as_str());
            prop_assert_eq!(path.parent(), Some(Path::new("/t")));
            prop_assert_eq!(path.file_name().and_then(|last| last.to_str()), Some(name.as_str()));
        }
    }
}
