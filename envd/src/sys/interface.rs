//! A network interface: its address, its route and its neighbours.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use super::check;

/// `SIOCDARP`, which the libc crate does not name.
const FORGET_NEIGHBOUR: libc::Ioctl = 0x8953;

/// Calls for one network interface, by ioctl on a datagram socket.
pub struct Interface {
    socket: std::net::UdpSocket,
    name: [libc::c_char; libc::IFNAMSIZ],
}

impl Interface {
    /// Prepares calls for the interface called `name`.
    ///
    /// # Errors
    /// `InvalidInput` for a name that is too long; else what opening a socket said.
    pub fn new(name: &str) -> io::Result<Self> {
        let mut buffer = [0; libc::IFNAMSIZ];
        if name.len() >= buffer.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (place, byte) in buffer.iter_mut().zip(name.bytes()) {
            *place = libc::c_char::from_ne_bytes([byte]);
        }
        Ok(Self {
            socket: std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?,
            name: buffer,
        })
    }

    /// Gives the interface its address and network mask.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn set_address(&self, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
        self.call(
            libc::SIOCSIFADDR,
            libc::__c_anonymous_ifr_ifru {
                ifru_addr: inet(address),
            },
        )?;
        self.call(
            libc::SIOCSIFNETMASK,
            libc::__c_anonymous_ifr_ifru {
                ifru_netmask: inet(mask),
            },
        )
    }

    /// Switches the interface on.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn bring_up(&self) -> io::Result<()> {
        #[allow(clippy::cast_possible_truncation)] // IFF_UP and IFF_RUNNING are 1 and 64
        let flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        self.call(
            libc::SIOCSIFFLAGS,
            libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
        )
    }

    /// Sends everything without a better route to `gateway`.
    ///
    /// # Errors
    /// What the kernel said; a route that is already there is no error.
    pub fn add_default_route(&self, gateway: Ipv4Addr) -> io::Result<()> {
        // SAFETY: all zeroes is a valid `rtentry`.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = inet(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = inet(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = inet(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        // SAFETY: `route` outlives the call and is laid out as the kernel expects.
        match check(unsafe {
            libc::ioctl(self.socket.as_raw_fd(), libc::SIOCADDRT, &raw mut route)
        }) {
            Err(err) if err.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Forgets the hardware address of `neighbour`; it is asked for again when next needed.
    ///
    /// # Errors
    /// What the kernel said; a neighbour that is not known is no error.
    pub fn forget_neighbour(&self, neighbour: Ipv4Addr) -> io::Result<()> {
        // SAFETY: all zeroes is a valid `arpreq`.
        let mut entry: libc::arpreq = unsafe { std::mem::zeroed() };
        entry.arp_pa = inet(neighbour);
        entry.arp_dev = self.name;
        // SAFETY: `entry` outlives the call and is laid out as the kernel expects.
        match check(unsafe {
            libc::ioctl(self.socket.as_raw_fd(), FORGET_NEIGHBOUR, &raw mut entry)
        }) {
            Err(err) if err.raw_os_error() == Some(libc::ENXIO) => Ok(()),
            other => other,
        }
    }

    fn call(&self, request: libc::Ioctl, argument: libc::__c_anonymous_ifr_ifru) -> io::Result<()> {
        let mut packet = libc::ifreq {
            ifr_name: self.name,
            ifr_ifru: argument,
        };
        // SAFETY: `packet` outlives the call and is laid out as the kernel expects.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), request, &raw mut packet) })
    }
}

/// An IPv4 address in the form of the socket calls.
fn inet(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (place, byte) in data[2..6].iter_mut().zip(address.octets()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // AF_INET is 2
    let family = libc::AF_INET as libc::sa_family_t;
    libc::sockaddr {
        sa_family: family,
        sa_data: data,
    }
}
