"""A program that lives in a guest through its pauses and writes down what it notices of them.

Called with the address of an echo server outside. Each line of its log is one observation, with the
generation that the guest was in when the observation began.
"""
import ctypes, json, os, socket, struct, sys, threading, time

OUTSIDE = (sys.argv[1], int(sys.argv[2]))
# Longest that a packet's fate is waited for.
PATIENCE = 20
libc = ctypes.CDLL(None, use_errno=True)
log = os.open("/dev/shm/resident", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
life = os.open("/run/wrenn/generation", os.O_RDONLY)


def generation():
    return os.pread(life, 32, 0).decode()


def say(of, kind, **facts):
    facts |= {"generation": of, "kind": kind, "mono": time.monotonic_ns()}
    os.write(log, (json.dumps(facts) + "\n").encode())


def sample():
    """The clocks, and random bytes as programs draw them."""
    while True:
        of = generation()
        before = time.monotonic_ns()
        boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        after = time.monotonic_ns()
        apart = max(before - boot, boot - after, 0)
        say(of, "sample", apart=apart, real=time.time_ns(), random=os.urandom(8).hex())
        time.sleep(0.05)


def read():
    """Reads so much at a time that it is mostly inside of a read when the guest is stopped."""
    random = os.open("/dev/urandom", os.O_RDONLY)
    while True:
        of = generation()
        drawn = os.read(random, 1 << 18)
        say(of, "read", first=drawn[:8].hex(), last=drawn[-8:].hex())
        time.sleep(0.01)


def notice():
    """Is told of a new life by the kernel, without looking for it."""
    watch = libc.inotify_init1(0)
    in_modify = 2
    assert libc.inotify_add_watch(watch, b"/run/wrenn/generation", in_modify) >= 0
    while True:
        os.read(watch, 4096)
        say(generation(), "noticed")


def timer(clock, flags, first):
    fd = libc.timerfd_create(clock, 0)
    libc.timerfd_settime(fd, flags, struct.pack("4q", 0, 100_000_000, first, 1), None)
    return fd


def tick():
    """A timer of the monotonic clock, every 100 ms."""
    began, total = time.monotonic_ns(), 0
    fd = timer(time.CLOCK_MONOTONIC, 0, 0)
    while True:
        of = generation()
        expired, = struct.unpack("Q", os.read(fd, 8))
        total += expired
        due = (time.monotonic_ns() - began) // 100_000_000
        say(of, "tick", expired=expired, total=total, due=due)


def step():
    """A timer of the wall clock that asks to be told when that is stepped."""
    absolute_and_cancelled_by_a_step = 3
    fd = timer(time.CLOCK_REALTIME, absolute_and_cancelled_by_a_step, int(time.time()) + 1)
    while True:
        try:
            os.read(fd, 8)
        except OSError as err:
            say(generation(), "stepped", errno=err.errno)


def call(peer):
    began = time.monotonic()
    try:
        peer.settimeout(PATIENCE)
        peer.sendall(b"x")
        answer = peer.recv(1)
        said = "echo" if answer == b"x" else "closed"
    except OSError as err:
        said = type(err).__name__
    return {"said": said, "took": time.monotonic() - began}


def talk():
    """Calls the same server once a life: over a new connection first, then over the old one."""
    old = socket.create_connection(OUTSIDE, PATIENCE)
    say(generation(), "talks", **call(old))
    while True:
        of = generation()
        while generation() == of:
            time.sleep(0.02)
        began = time.monotonic()
        try:
            new = socket.create_connection(OUTSIDE, PATIENCE)
            resent, = struct.unpack_from("I", new.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 100)
            said = call(new) | {"resent": resent}
        except OSError as err:
            new, said = None, {"said": type(err).__name__}
        said["took"] = time.monotonic() - began
        say(generation(), "new", **said)
        say(generation(), "old", **call(old))
        old = new or old


threads = [threading.Thread(target=it) for it in (sample, read, notice, tick, step, talk)]
for it in threads:
    it.start()
for it in threads:
    it.join()
