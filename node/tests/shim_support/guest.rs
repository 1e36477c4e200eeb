//! The first process of a test guest, compiled by the tests with `rustc` alone.
//!
//! It loads the modules in `/modules/order`, says what it found on the console, and then does
//! what the kernel command line tells: `wrenn.probe=1`, `test.reboot`, `test.panic`, `test.flood`,
//! `test.count`; otherwise it powers off when its power button is pressed, unless `test.deaf` is given.

use std::ffi::{CString, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::thread::sleep;
use std::time::Duration;

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn reboot(how: c_int) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
}

const POWER_OFF: c_int = 0x4321_FEDC;
const RESTART: c_int = 0x0123_4567;
const FINIT_MODULE: c_long = 313;
const SET_FLAGS: c_ulong = 0x8914;
const KEY_POWER: u16 = 116;

fn main() {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        let (kind, target) = (c(kind), c(target));
        // SAFETY: all pointers are to live strings; proc, sysfs and devtmpfs take no data.
        unsafe {
            mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null());
        }
    }
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let told = |word: &str| line.split_whitespace().any(|told| told == word);
    if told("wrenn.probe=1") {
        say("wrenn-probe: ok");
        end(POWER_OFF);
    }
    load_modules();
    if let Ok(sectors) = fs::read_to_string("/sys/block/vda/size") {
        say(&format!("guest: disk {}", sectors.trim()));
    }
    if let Ok(mac) = fs::read_to_string("/sys/class/net/eth0/address") {
        raise_eth0();
        say(&format!("guest: net {}", mac.trim()));
    }
    say("guest: up");
    if told("test.reboot") {
        end(RESTART);
    }
    if told("test.panic") {
        std::process::exit(1);
    }
    while told("test.flood") {
        say(&"x".repeat(4000));
    }
    for count in 0_u64.. {
        if !told("test.count") {
            break;
        }
        say(&format!("guest: count {count}."));
        sleep(Duration::from_millis(50));
    }
    while told("test.deaf") {
        sleep(Duration::from_secs(60));
    }
    await_button();
    say("guest: button");
    end(POWER_OFF);
}

fn c(text: &str) -> CString {
    CString::new(text).expect("no zero byte")
}

fn say(line: &str) {
    if let Ok(mut console) = File::options().write(true).open("/dev/console") {
        let _ = writeln!(console, "{line}");
    }
}

fn end(how: c_int) -> ! {
    // SAFETY: takes an integer; does not come back.
    unsafe { reboot(how) };
    loop {
        sleep(Duration::from_secs(60));
    }
}

fn load_modules() {
    let order = fs::read_to_string("/modules/order").unwrap_or_default();
    for name in order.lines() {
        let Ok(file) = File::open(format!("/modules/{name}")) else {
            say(&format!("guest: no module {name}"));
            continue;
        };
        let options = c("");
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        // SAFETY: the descriptor is open and the options are a live string.
        if unsafe { syscall(FINIT_MODULE, fd, options.as_ptr(), 0) } != 0 {
            say(&format!("guest: cannot load {name}"));
        }
    }
}

/// An interface that is up announces itself over IPv6, which the host can count.
fn raise_eth0() {
    let mut request = [0_u8; 40];
    request[..4].copy_from_slice(b"eth0");
    request[16] = 1;
    // SAFETY: SIOCSIFFLAGS reads an ifreq of 40 bytes, which this is.
    unsafe {
        let any = socket(2, 2, 0);
        ioctl(any, SET_FLAGS, request.as_ptr());
    }
}

fn await_button() {
    loop {
        for entry in fs::read_dir("/dev/input").into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("event")
                && let Ok(mut events) = File::open(entry.path())
            {
                // A press that nobody listens for is lost.
                say("guest: listening");
                let mut event = [0_u8; 24];
                while events.read_exact(&mut event).is_ok() {
                    if u16::from_le_bytes([event[18], event[19]]) == KEY_POWER {
                        return;
                    }
                }
            }
        }
        sleep(Duration::from_millis(100));
    }
}
