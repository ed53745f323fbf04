"""A program that tries what a confined program must not be able to do, and prints what came of it.

It runs by itself (`python3 -c SOURCE [NAME...]`), inside a box or on the host in a box's
confinement, and prints one JSON object: the attack's name to the name of the errno that refused it,
or to "done". It needs nothing but Python and libc, and harms nothing should it succeed.
"""

SOURCE = r"""
import ctypes, errno, glob, json, os, platform, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == "x86_64"

def call(x86, arm, *args):
    number = x86 if X86 else arm
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    ctypes.set_errno(0)
    if libc.syscall(ctypes.c_long(number), *words) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

def make_socket(*kind):
    socket.socket(*kind).close()

def vsock(cid):
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as s:
        s.settimeout(2)
        s.connect((cid, 1024))

def raw_clone(flags):
    pid = libc.syscall(ctypes.c_long(56 if X86 else 220), ctypes.c_long(flags | 17), None, None, None, None)
    if pid == 0:
        os._exit(0)
    if pid < 0:
        raise OSError(ctypes.get_errno(), "clone")
    os.waitpid(pid, 0)

def read(path, size=16):
    with open(path, "rb") as f:
        if not f.read(size):
            raise EOFError

def write(path, data=b"1"):
    with open(path, "wb", buffering=0) as f:
        f.write(data)

def trace(pid):
    if libc.ptrace(16, pid, None, None) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    libc.ptrace(17, pid, None, None)

def inject_terminal():
    import fcntl
    master, slave = os.openpty()
    fcntl.ioctl(slave, 0x5412, b"x")

def agent_pid():
    return [int(n) for n in os.listdir("/proc") if n.isdigit() and int(n) != os.getpid()
            and os.stat("/proc/" + n).st_uid != os.getuid()][0]

def bpf():
    call(321, 280, 0, ctypes.byref(ctypes.create_string_buffer(128)), 128)

ATTACKS = {
    "mount": lambda: call(165, 40, b"x", b"/tmp", b"tmpfs", 0, None),
    "umount": lambda: call(166, 39, b"/tmp", 2),
    "remount": lambda: call(165, 40, b"", b"/", b"", 32, None),
    "open_tree": lambda: call(428, 428, -100, b"/", 1),
    "fsopen": lambda: call(430, 430, b"tmpfs", 0),
    "mount_setattr": lambda: call(442, 442, -100, b"/", 0, ctypes.byref(ctypes.create_string_buffer(32)), 32),
    "pivot_root": lambda: call(155, 41, b"/tmp", b"/tmp"),
    "chroot": lambda: os.chroot("/tmp"),
    "load module": lambda: call(313, 273, 0, b"", 0),
    "init module": lambda: call(175, 105, None, 0, b""),
    "kexec": lambda: call(246, 104, 0, 0, None, 0),
    "bpf": bpf,
    "perf": lambda: call(298, 241, ctypes.byref(ctypes.create_string_buffer(128)), 0, -1, -1, 0),
    "userfaultfd": lambda: call(323, 282, 1),
    "keyring": lambda: call(248, 217, b"user", b"k", b"v", 1, -4),
    "keyctl": lambda: call(250, 219, 0, -4, 0),
    "reboot": lambda: call(169, 142, 0xfee1dead, 672274793, 0x1, None),
    "kernel log": lambda: call(103, 116, 10, None, 0),
    "set clock": lambda: call(227, 112, 0, ctypes.byref(ctypes.create_string_buffer(16))),
    "set host name": lambda: call(170, 161, b"x", 1),
    "io ports": lambda: call(172, 999, 3),
    "io_uring": lambda: call(425, 425, 4, ctypes.byref(ctypes.create_string_buffer(256))),
    "handle": lambda: call(304, 265, -100, ctypes.byref(ctypes.create_string_buffer(64)), 0),
    "user namespace": lambda: call(272, 97, 0x10000000),
    "network namespace": lambda: call(272, 97, 0x40000000),
    "clone user namespace": lambda: raw_clone(0x10000000),
    "clone3": lambda: call(435, 435, ctypes.byref(ctypes.create_string_buffer(64)), 64),
    "setns": lambda: call(308, 268, os.open("/proc/self/ns/net", os.O_RDONLY), 0),
    "raw socket": lambda: make_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
    "packet socket": lambda: make_socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0),
    "audit socket": lambda: make_socket(socket.AF_NETLINK, socket.SOCK_RAW, 9),
    "key socket": lambda: make_socket(15, socket.SOCK_RAW, 2),
    "crypto socket": lambda: make_socket(38, socket.SOCK_SEQPACKET, 0),
    "vsock loopback": lambda: vsock(1),
    "vsock host": lambda: vsock(2),
    "vsock other": lambda: vsock(77777),
    "terminal injection": inject_terminal,
    "trace PID 1": lambda: trace(1),
    "memory of PID 1": lambda: read("/proc/1/mem"),
    "environment of PID 1": lambda: read("/proc/1/environ"),
    "files of PID 1": lambda: os.listdir("/proc/1/fd"),
    "root of PID 1": lambda: os.listdir("/proc/1/root/"),
    "agent seen": lambda: trace(agent_pid()),
    "process memory": lambda: call(310, 270, 1, None, 0, None, 0, 0),
    "agent files": lambda: read(glob.glob("/usr/lib/voidbox/guest/agent.py*")[0]),
    "agent directory": lambda: os.listdir("/run/voidbox")[0],
    "physical memory": lambda: read("/dev/mem"),
    "kernel memory": lambda: read("/proc/kcore"),
    "disk": lambda: read("/dev/vda"),
    "make device": lambda: os.mknod("/tmp/x", 0o20666, os.makedev(1, 1)),
    "kernel switch": lambda: write("/proc/sys/kernel/core_pattern", b"|/tmp/x"),
    "trigger": lambda: write("/proc/sysrq-trigger", b"h"),
    "cgroup": lambda: write("/sys/fs/cgroup/programs/memory.max", b"max"),
    "limit": lambda: __import__("resource").setrlimit(7, (1 << 20, 1 << 20)),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, -10),
    "become root": lambda: os.setuid(0),
    "memfd": lambda: os.close(os.memfd_create("x")),
}
done = {}
for name in sys.argv[1:] or ATTACKS:
    try:
        ATTACKS[name]()
        done[name] = "done"
    except OSError as error:
        done[name] = errno.errorcode.get(error.errno, str(error))
    except Exception as error:
        done[name] = type(error).__name__
print(json.dumps(done))
"""
