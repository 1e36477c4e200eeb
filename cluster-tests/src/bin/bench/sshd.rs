//! An sshd of our own to compare with, with keys that are made for it and thrown away.

use std::ffi::OsStr;
use std::fs;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::{Outcome, Run};

/// Where sshd lies: it must be started by its full path.
const SSHD: &str = "/usr/sbin/sshd";
/// Longest until it listens.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// An sshd, gone when dropped.
pub(crate) struct Sshd {
    child: Child,
    port: u16,
    dial: IpAddr,
    dir: TempDir,
}

impl Sshd {
    /// One that listens on one address and is dialled at another; none, and said so, where there is no
    /// such program (Debian: openssh-server).
    pub(crate) fn start_if_there(run: &Run, listen: IpAddr, dial: IpAddr) -> Outcome<Option<Self>> {
        if !Path::new(SSHD).exists() {
            run.note("there is no sshd: nothing to compare with");
            return Ok(None);
        }
        Self::start(listen, dial).map(Some)
    }

    fn start(listen: IpAddr, dial: IpAddr) -> Outcome<Self> {
        // Its privilege separation wants this one, which Debian makes when the service starts.
        fs::create_dir_all("/run/sshd")?;
        let dir = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
        for key in ["host", "user"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(dir.path().join(key))
                .status()?;
            if !made.success() {
                return Err("ssh-keygen made no key".into());
            }
        }
        let port = TcpListener::bind((listen, 0))?.local_addr()?.port();
        let at = dir.path().display();
        let config = format!(
            "Port {port}\nListenAddress {listen}\nHostKey {at}/host\nPidFile none\n\
             AuthorizedKeysFile {at}/user.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n\
             PasswordAuthentication no\nSubsystem sftp internal-sftp\n"
        );
        fs::write(dir.path().join("config"), config)?;
        let child = Command::new(SSHD)
            .args(["-D", "-e", "-f"])
            .arg(dir.path().join("config"))
            .stderr(Stdio::null())
            .spawn()?;
        let sshd = Self {
            child,
            port,
            dial,
            dir,
        };
        let until = Instant::now() + PATIENCE;
        while TcpStream::connect((dial, port)).is_err() {
            if Instant::now() > until {
                return Err("sshd does not listen".into());
            }
            thread::sleep(LOOK_AGAIN);
        }
        Ok(sshd)
    }

    fn options(&self) -> Vec<String> {
        let key = self.dir.path().join("user").display().to_string();
        let known = "-oUserKnownHostsFile=/dev/null";
        [
            "-i",
            &key,
            "-oStrictHostKeyChecking=no",
            known,
            "-oLogLevel=ERROR",
        ]
        .map(str::to_owned)
        .into()
    }

    /// A command run there.
    pub(crate) fn ssh(&self, line: &str) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args(["-p", &self.port.to_string()])
            .args(self.options())
            .args([&format!("root@{}", self.dial), line]);
        ssh
    }

    /// A file copied from there.
    pub(crate) fn download(&self, from: &Path, to: &Path) -> Command {
        self.scp([self.remote(from).as_ref(), to.as_os_str()])
    }

    /// A file copied to there.
    pub(crate) fn upload(&self, from: &Path, to: &Path) -> Command {
        self.scp([from.as_os_str(), self.remote(to).as_ref()])
    }

    fn scp(&self, from_and_to: [&OsStr; 2]) -> Command {
        let mut scp = Command::new("scp");
        scp.args(["-q", "-P", &self.port.to_string()])
            .args(self.options())
            .args(from_and_to);
        scp
    }

    fn remote(&self, path: &Path) -> String {
        format!("root@{}:{}", self.dial, path.display())
    }

    /// A file copied from there over an older copy of it.
    pub(crate) fn rsync(&self, from: &Path, to: &Path) -> Command {
        let shell = format!("ssh -p {} {}", self.port, self.options().join(" "));
        let mut rsync = Command::new("rsync");
        rsync
            .args(["--inplace", "--no-whole-file", "--ignore-times", "-e"])
            .args([&shell, &self.remote(from)])
            .arg(to);
        rsync
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        // One that has ended by itself is waited for as well.
        let _killed = self.child.kill();
        let _reaped = self.child.wait();
    }
}
