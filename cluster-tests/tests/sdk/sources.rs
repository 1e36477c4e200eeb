//! What a release is cut from: an apt repository with one small tool, and a git repository with a build
//! that uses it, both behind a web server outside the guests.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::{fs, thread};

use tempfile::TempDir;
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::outside::Outside;

/// The port of the web server.
const PORT: u16 = 7180;
/// Longest it may take to listen.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);

/// What the tool's package says of itself.
const CONTROL: &str = "Package: wrenn-seed-tool
Version: 1.0
Architecture: all
Maintainer: Wrenn <wrenn@example.com>
Depends: tar, gzip
Description: packs what a release is made of
";

/// The tool: packs its second argument into its first, and complains.
const TOOL: &str = r#"#!/bin/sh
[ "$1" = --version ] && { echo seed-pack 1.0; exit; }
echo "warning: $1 is not signed" >&2
tar -cf - -C "$2" . | gzip -1 >"$1"
"#;

/// The build. It waits for whoever watches it, since what was said before is not told again.
const BUILD: &str = r#"set -e
until [ -e go ]; do sleep 0.1; done
mkdir -p dist parts
for n in 1 2 3 4 5; do
    echo "step $n of 5"
    mkdir parts/$n
    head -c 1500000 /dev/urandom >parts/$n/data
    seed-pack dist/part$n.tar.gz parts/$n &
done
wait
(cd dist && sha256sum *.tar.gz >SHA256SUMS)
echo done
"#;

/// The repositories and their server, gone when dropped.
pub(crate) struct Sources {
    server: Child,
    _dir: TempDir,
    /// Where guests find them, if the operator allows it.
    pub(crate) url: String,
}

impl Sources {
    pub(crate) fn new(outside: &Outside, python: &Path) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        make_debian(&dir.path().join("debian"));
        make_git(dir.path());
        let server = outside
            .command(python)
            .args(["-m", "http.server", &PORT.to_string(), "--directory"])
            .arg(dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let address = format!("{}:{PORT}", outside.allowed);
        let sources = Self {
            server: server.expect("ip is installed"),
            _dir: dir,
            url: format!("http://{address}"),
        };
        let listens = wait_for(PATIENCE, || std::net::TcpStream::connect(&address).ok());
        assert!(listens.is_some(), "the web server does not listen");
        sources
    }
}

impl Drop for Sources {
    fn drop(&mut self) {
        let _gone = self.server.kill();
        let ended = self.server.wait();
        assert!(ended.is_ok() || thread::panicking());
    }
}

/// A flat apt repository.
fn make_debian(dir: &Path) {
    let tree = dir.join("tree");
    write(&tree.join("DEBIAN/control"), CONTROL);
    write(&tree.join("usr/bin/seed-pack"), TOOL);
    shell(
        dir,
        "chmod 755 tree tree/DEBIAN tree/usr tree/usr/bin tree/usr/bin/seed-pack
         dpkg-deb --root-owner-group -Zxz --build tree wrenn-seed-tool.deb
         { cat tree/DEBIAN/control
           echo 'Filename: ./wrenn-seed-tool.deb'
           echo \"Size: $(stat -c %s wrenn-seed-tool.deb)\"
           echo \"SHA256: $(sha256sum <wrenn-seed-tool.deb | cut -d' ' -f1)\"
         } >Packages
         rm -r tree",
    );
}

/// A git repository that plain files serve.
fn make_git(dir: &Path) {
    write(&dir.join("work/build.sh"), BUILD);
    write(&dir.join("work/.gitignore"), "go\ndist\nparts\n");
    shell(
        dir,
        "cd work
         git init -q -b main
         git add .
         git -c user.name=W -c user.email=w@example.com commit -q -m 'a release'
         cd ..
         git clone -q --bare work seed.git
         git -C seed.git update-server-info",
    );
}

fn write(path: &Path, text: &str) {
    let dir = path.parent().expect("a file lies somewhere");
    fs::create_dir_all(dir).expect("a directory");
    fs::write(path, text).expect("a file");
}

fn shell(dir: &Path, line: &str) {
    let done = Command::new("sh")
        .args(["-ec", line])
        .current_dir(dir)
        .output()
        .expect("a shell");
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{line}: {errors}");
}
