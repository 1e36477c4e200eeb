//! What the kernel says of a process.

use std::time::Duration;
use std::{fs, io};

use nix::unistd::{SysconfVar, sysconf};

/// Resident memory of one process, in MiB.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    /// Everything resident, pages shared with other processes included.
    pub(crate) resident: f64,
    /// Of that, what belongs to no file: its heap and stacks.
    pub(crate) anonymous: f64,
    /// Everything resident, shared pages divided among those who share them.
    pub(crate) proportional: f64,
}

/// The memory of the process `pid`.
pub(crate) fn memory(pid: u32) -> io::Result<Memory> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    Ok(Memory {
        resident: mib_of(&status, "VmRSS:")?,
        anonymous: mib_of(&status, "RssAnon:")?,
        proportional: mib_of(&rollup, "Pss:")?,
    })
}

/// The processor time of the process `pid`, its ended threads and reaped children included.
///
/// Good to a clock tick (10 ms): for sums over many runs.
pub(crate) fn processor_time(pid: u32) -> Outcome {
    /// Place of `utime` behind the name, which may hold spaces; stime, cutime and cstime follow.
    const UTIME: usize = 11;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let behind_name = stat.rsplit(") ").next().unwrap_or_default();
    let fields = behind_name.split(' ').skip(UTIME).take(4);
    let ticks: u64 = fields.filter_map(|field| field.parse::<u64>().ok()).sum();
    let per_second = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100);
    let per_second = u32::try_from(per_second).map_err(io::Error::other)?;
    Ok(Duration::from_secs(ticks) / per_second)
}

/// The processor time of the live threads of the process `pid`, to the nanosecond.
pub(crate) fn thread_time(pid: u32) -> Outcome {
    let mut total = Duration::ZERO;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end while they are counted.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else {
            continue;
        };
        let spent = text.split(' ').next().and_then(|it| it.parse().ok());
        total += Duration::from_nanos(spent.unwrap_or(0));
    }
    Ok(total)
}

/// Its arguments, the program first.
pub(crate) fn arguments(pid: u32) -> io::Result<Vec<String>> {
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
    Ok(line.split_terminator('\0').map(str::to_owned).collect())
}

type Outcome = io::Result<Duration>;

fn mib_of(text: &str, field: &str) -> io::Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    let missing = || io::Error::new(io::ErrorKind::InvalidData, format!("no {field}"));
    Ok(kib.ok_or_else(missing)? / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_time_and_arguments() {
        let own = std::process::id();
        let memory = memory(own).unwrap();
        assert!(memory.resident >= memory.proportional && memory.proportional > 0.0);
        assert!(memory.resident > memory.anonymous && memory.anonymous > 0.0);
        assert!(thread_time(own).unwrap() > Duration::ZERO);
        assert!(processor_time(own).is_ok());
        assert!(arguments(own).unwrap()[0].contains("bench"));
    }

    #[test]
    fn a_size_is_found_by_its_name() {
        let text = "VmSize:\t   99 kB\nVmRSS:\t    1536 kB\n";
        assert_eq!(mib_of(text, "VmRSS:").unwrap().to_string(), "1.5");
        assert!(mib_of(text, "Pss:").is_err());
    }
}
