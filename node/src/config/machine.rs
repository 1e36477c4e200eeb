//! What defaults are derived from: this machine's name, address, cores, memory and free disk.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::{fs, io, thread};

use proto::units::{MIB_BYTES, Mib};

use super::error::ConfigError;

/// The machine, as far as defaults depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Its host name.
    pub hostname: String,
    /// Its address on the way to the outside; `None` where no route leads there.
    pub address: Option<IpAddr>,
    /// Its logical processors.
    pub cores: u32,
    /// Its memory in all.
    pub memory: Mib,
    /// Free space where the node keeps its state.
    pub disk_free: Mib,
}

impl Machine {
    /// Looks at this machine; `data_dir` need not exist yet.
    ///
    /// # Errors
    /// [`ConfigError::Machine`] names what the system does not tell.
    pub fn measure(data_dir: &Path) -> Result<Self, ConfigError> {
        let failed = |what| move |source| ConfigError::Machine { what, source };
        let name = nix::unistd::gethostname().map_err(io::Error::from);
        let hostname = name.map_err(failed("the host name"))?;
        let cores = thread::available_parallelism().map_err(failed("the number of cores"))?;
        Ok(Self {
            hostname: hostname.to_string_lossy().into_owned(),
            address: outward_address(),
            cores: u32::try_from(cores.get()).unwrap_or(u32::MAX),
            memory: total_memory().map_err(failed("the size of memory"))?,
            disk_free: free_disk(data_dir).map_err(failed("the free disk space"))?,
        })
    }
}

/// The address that the kernel would send from along the default route. Connecting a datagram
/// socket asks the routing table and sends nothing; both addresses are reserved for documentation.
fn outward_address() -> Option<IpAddr> {
    let ways = [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")];
    let source = |(from, to): (&str, &str)| {
        let socket = UdpSocket::bind(from).ok()?;
        socket.connect(to).ok()?;
        socket.local_addr().ok().map(|it: SocketAddr| it.ip())
    };
    let found = ways.into_iter().find_map(source);
    found.filter(|address| !address.is_unspecified())
}

fn total_memory() -> io::Result<Mib> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| mib(kib * 1024))
        .ok_or_else(|| io::Error::other("no MemTotal in /proc/meminfo"))
}

/// Free space of the file system that `dir`, or the nearest directory above it, lies on.
fn free_disk(dir: &Path) -> io::Result<Mib> {
    let dir = std::path::absolute(dir)?;
    let existing = dir.ancestors().find(|above| above.exists());
    let stat = nix::sys::statvfs::statvfs(existing.unwrap_or(Path::new("/")))?;
    Ok(mib(stat.blocks_available() * stat.fragment_size()))
}

fn mib(bytes: u64) -> Mib {
    Mib(u32::try_from(bytes / MIB_BYTES).unwrap_or(u32::MAX))
}
