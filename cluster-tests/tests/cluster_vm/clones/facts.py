"""What a guest is like now, as JSON."""
import hashlib, json, mmap, os, re, socket, subprocess

# What a kernel complains of that was torn out of its time or lost what it wrote.
COMPLAINT = re.compile(r"I/O error|EXT4-fs error|lockup|stall|hung task|unstable|BUG:|WARNING:")


def text(path):
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError as err:
        return f"{path}: {err.strerror}"


def output(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def from_disk(path):
    """The file's hash, past everything that memory holds of it."""
    file, page = os.open(path, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 1 << 20)
    hashed = hashlib.sha256()
    while got := os.readv(file, [page]):
        hashed.update(page[:got])
    return hashed.hexdigest()


def from_cache(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def agent_peers():
    """Who is connected to the agent's port, by addresses and ports as the kernel spells them."""
    lines = [it.split() for name in ("tcp", "tcp6") for it in text(f"/proc/net/{name}").splitlines()[1:]]
    established, port = "01", f"{49983:04X}"
    return [it[2] for it in lines if it[1].endswith(":" + port) and it[3] == established]


ssh = "/etc/ssh"
keys = sorted(it for it in os.listdir(ssh) if it.startswith("ssh_host_"))
dmesg = output("dmesg")
print(json.dumps({
    "hostname": socket.gethostname(),
    "etc_hostname": text("/etc/hostname"),
    "machine_id": text("/etc/machine-id"),
    "boot_id": text("/proc/sys/kernel/random/boot_id"),
    "mac": text("/sys/class/net/eth0/address"),
    "addresses": output("ip", "-o", "-4", "addr", "show", "dev", "eth0").split()[3],
    "route": output("ip", "route", "show", "default"),
    "neighbours": [it.split() for it in text("/proc/net/arp").splitlines()[1:]],
    "agent_peers": agent_peers(),
    "generation": text("/run/wrenn/generation"),
    "sandbox_id": text("/run/wrenn/.WRENN_SANDBOX_ID"),
    "env_sandbox_id": os.environ.get("WRENN_SANDBOX_ID"),
    "ssh_keys": {name: text(f"{ssh}/{name}") for name in keys},
    "disk": from_disk("/root/unsynced"),
    "cache": from_cache("/root/unsynced"),
    "memory": from_cache("/dev/shm/random"),
    "complaints": [it for it in dmesg.splitlines() if COMPLAINT.search(it)],
    "resident_pid": text("/dev/shm/resident.pid"),
    "resident_lives": os.path.exists("/proc/" + text("/dev/shm/resident.pid")),
    "under_way": output("pgrep", "-x", "sleep"),
    "random": os.getrandom(16).hex(),
    "log": [json.loads(it) for it in text("/dev/shm/resident").splitlines()],
}))
