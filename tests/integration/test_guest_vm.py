"""The guest image on a real machine: PID 1, the agent, isolation of programs, disks and shares.

Reached through the real vsock device, as the hypervisor does. One machine serves most tests.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from tests.contract.guest_process import Client, Result, duration, events, reason, stdin
from tests.integration.guest_vm import METADATA, SECRET, GuestMachine
from voidbox.guest.v1 import guest_pb2 as pb

pytestmark = pytest.mark.vm
MIB = 1 << 20
MACHINE_ID = bytes(range(16))
AGENT_RSS_LIMIT = 40 * MIB


def claim_request(**fields: Any) -> pb.ClaimRequest:
    """A complete claim."""
    request = pb.ClaimRequest(
        secret=SECRET, box_id="b", hostname="box-7", machine_id=MACHINE_ID, entropy=os.urandom(64), **fields
    )
    request.wall_clock.FromNanoseconds(time.time_ns())
    return request


async def claim(machine: GuestMachine, **fields: Any) -> pb.ClaimResponse:
    """Claim a machine that is just booting."""
    async with machine.channel() as channel:
        client = Client(channel)
        answer: pb.ClaimResponse = await client.stub.Claim(
            claim_request(**fields), wait_for_ready=True, timeout=90
        )
        return answer


def ext4(path: Path, source: Path | None, size: str = "32M") -> None:
    """Make an ext4 image, filled from a directory."""
    filled = ["-d", str(source)] if source else []
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", *filled, str(path), size], check=True, stdin=subprocess.DEVNULL
    )


def checked_output(*argv: str) -> str:
    """What a program prints that must succeed."""
    return subprocess.run(argv, capture_output=True, check=True, stdin=subprocess.DEVNULL).stdout.decode()


def blk(path: Path, serial: str) -> tuple[str, ...]:
    """QEMU's words for a disk."""
    return (
        *("-drive", f"file={path},format=raw,if=none,id={serial}"),
        *("-device", f"virtio-blk-pci,drive={serial},serial={serial}"),
    )


def share(path: Path, tag: str, more: str = "") -> tuple[str, ...]:
    """QEMU's words for a 9p share."""
    return (
        *("-fsdev", f"local,id={tag},path={path},security_model=none{more}"),
        *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
    )


def machine_user() -> int | None:
    """Who QEMU runs as: as the hypervisor does it, not root if that can be."""
    return 1000 if os.geteuid() == 0 else None


def give_away(directory: Path) -> None:
    """Make all in `directory` the machine user's."""
    if (user := machine_user()) is not None:
        for path in (directory, *directory.rglob("*")):
            os.chown(path, user, user, follow_symlinks=False)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A directory for disks and shares."""
    directory = Path(tempfile.mkdtemp(prefix="vbv-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def machine(scratch: Path) -> Iterator[GuestMachine]:
    """A claimed machine of 256 MiB with a disk and two shares."""
    for name in ("m0", "m1"):
        (scratch / name).mkdir()
        (scratch / name / "hello").write_text("from the host\n")
    ext4(scratch / "data.img", None)
    give_away(scratch)
    devices = (
        *blk(scratch / "data.img", "data"),
        *share(scratch / "m0", "m0"),
        *share(scratch / "m1", "m1", ",readonly=on"),
    )
    with GuestMachine(devices=devices, uid=machine_user()) as running:
        answer = asyncio.run(claim(running))
        confirmed = (
            answer.hostname_set,
            answer.machine_id_set,
            answer.clock_set,
            answer.entropy_added,
            answer.root_disk_mounted,
        )
        assert all(confirmed), running.evidence()
        yield running


@pytest.fixture
async def box(machine: GuestMachine) -> AsyncIterator[Client]:
    """A client of the machine."""
    async with machine.channel() as channel:
        yield Client(channel)


async def output(client: Client, script: str, **fields: Any) -> str:
    """What a script prints, both streams."""
    result = await client.sh(script + "\nexit 0", **fields)
    return bytes(result.stdout + result.stderr).decode()


async def test_the_identity_is_in_force(box: Client) -> None:
    lines = (await output(box, "hostname; cat /etc/machine-id; date +%s; id; pwd; uname -r")).splitlines()
    assert lines[:2] == ["box-7", MACHINE_ID.hex()]
    assert abs(int(lines[2]) - time.time()) < 30
    assert lines[3] == "uid=1000(sandbox) gid=1000(sandbox) groups=1000(sandbox)"
    assert lines[4] == "/workspace"
    assert lines[5] != os.uname().release
    guest = await box.stub.GetGuest(pb.GetGuestRequest(), metadata=METADATA)
    assert guest.boot_id != Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert guest.kernel_release == lines[5]


async def agents_of(box: Client) -> list[pb.ProcessUsage]:
    """PID 1 and the agent, as the agent sees them."""
    stream = box.stub.Telemetry(pb.TelemetryRequest(processes=True), metadata=METADATA)
    sample = await stream.read()
    stream.cancel()
    return [one for one in sample.processes if one.name in ("init", "python3.11")]


async def test_the_agent_fits_in_its_memory(box: Client) -> None:
    agents = sorted(one.memory_bytes for one in await agents_of(box))
    assert len(agents) == 2
    assert agents[1] < AGENT_RSS_LIMIT, agents
    assert agents[0] < 16 * MIB, agents


@pytest.mark.parametrize("user", ["", "root"])
async def test_programs_reach_nothing_of_the_agent(box: Client, user: str) -> None:
    # Programs do not even see them, so these are told.
    pids = sorted(one.pid for one in await agents_of(box))
    assert pids[0] == 1
    script = (
        f"set -- {pids[1]}"
        """
    ls -A /run/voidbox /usr/lib/voidbox /lib/modules
    echo [$(cat /init | wc -c)]
    [ -e /proc/1 ] && echo saw 1
    [ -e /proc/$1 ] && echo saw $1
    for pid in 1 $1; do
        for file in environ mem maps root/etc/passwd fd/0; do
            cat /proc/$pid/$file >/dev/null 2>&1 && echo readable $pid $file
        done
    done
    kill -9 $1 2>/dev/null && echo killed the agent
    echo x 2>/dev/null > /proc/sys/kernel/core_pattern && echo wrote core_pattern
    echo x 2>/dev/null > /proc/sysrq-trigger && echo wrote sysrq
    echo $$ 2>/dev/null > /sys/fs/cgroup/cgroup.procs && echo left its cgroup
    mknod /tmp/disk b 254 0 2>/dev/null && echo made a device
    mount -t tmpfs x /tmp 2>/dev/null && echo mounted
    chroot / true 2>/dev/null && echo changed root
    ls /dev
    grep -h 'Cap...:\\|NoNewPrivs' /proc/self/status
    """
    )
    seen = await output(box, script, user=user)
    for word in (
        "saw",
        "readable",
        "wrote",
        "left its",
        "made a",
        "mounted",
        "changed root",
        "killed",
        "agent.sock",
        ".ko",
    ):
        assert word not in seen, seen
    assert "[0]" in seen
    devices = seen.split("\n")
    for name in ("vda", "kmsg", "mem", "vsock", "ttyS0"):
        assert name not in devices
    assert seen.count("\t0000000000000000") == 5, seen
    assert "NoNewPrivs:\t1" in seen


async def test_programs_cannot_call_the_agent_over_vsock(box: Client) -> None:
    script = """
import socket
for cid in (1, 2, 42, 0xffffffff):
    try:
        s = socket.socket(socket.AF_VSOCK); s.settimeout(5); s.connect((cid, 1024))
        s.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n\\0\\0\\0\\4\\0\\0\\0\\0\\0")
        print(cid, "answer", s.recv(10))
    except OSError as error:
        print(cid, "refused")
"""
    result = await box.run("python3.11", "-c", script)
    assert b"answer b'\\x00" not in result.stdout, result
    assert result.stdout.count(b"\n") == 4, result


async def test_a_stream_of_20_mib_both_ways(box: Client) -> None:
    data = os.urandom(4 * MIB)
    call, _ = await box.exec("cat", stdin=True)

    async def send() -> None:
        for start in range(0, len(data), 65536):
            await call.write(stdin(data[start : start + 65536], start, eof=start + 65536 >= len(data)))

    sending = asyncio.ensure_future(send())
    result = Result()
    async for event in events(call):
        result.take(event)
    await sending
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()
    result = await box.sh("head -c 20971520 /dev/zero | tr '\\0' q")
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(b"q" * 20 * MIB).digest()


async def test_200_programs_at_once(box: Client) -> None:
    running = 0
    everybody = asyncio.Event()

    async def talk(number: int) -> None:
        nonlocal running
        call, _ = await box.exec("sh", "-c", f"read line; echo {number} $line; exit {number}", stdin=True)
        running += 1
        if running == 200:
            everybody.set()
        await everybody.wait()
        await call.write(stdin(b"hello\n"))
        result = Result()
        async for event in events(call):
            result.take(event)
        assert (bytes(result.stdout), result.code) == (b"%d hello\n" % number, number)

    await asyncio.gather(*(talk(number) for number in range(200)))


async def test_a_killed_tree_leaves_no_process_not_even_a_daemon(box: Client) -> None:
    script = (
        "(setsid sh -c 'exec sleep 4242' </dev/null >/dev/null 2>&1 &); sleep 4243 & trap '' TERM; sleep 4244"
    )
    result = await box.sh(script, timeout=2.0)
    assert result.exit is not None
    assert result.exit.kill_reason == pb.KILL_REASON_TIMEOUT
    assert "424" not in await output(box, "ps | grep -v grep | grep 'sleep 42'", user="root")
    orphans = "(sleep 0.1 &); (sleep 0.2 &); sleep 0.6; grep -l ') Z ' /proc/[0-9]*/stat | wc -l"
    assert await output(box, orphans) == "0\n"
    assert await output(box, "ls -d /sys/fs/cgroup/programs/exec-* | wc -l") == "1\n"  # its own


async def test_a_fork_bomb_is_killed_in_time(box: Client) -> None:
    started = time.monotonic()
    result = await box.sh("bomb() { bomb | bomb & }; bomb; sleep 100", timeout=3.0)
    assert result.exit is not None
    assert result.exit.kill_reason == pb.KILL_REASON_TIMEOUT
    assert result.exit.duration.seconds < 20
    assert time.monotonic() - started < 60
    limits = (await output(box, "ulimit -n; ulimit -u; cat /sys/fs/cgroup/programs/pids.max")).split()
    assert limits[:2] == ["65536", "unlimited"]
    assert 64 <= int(limits[2]) < 32768


async def test_running_out_of_memory_kills_the_program_and_not_the_agent(box: Client) -> None:
    script = "x = []\nwhile True: x.append(bytearray(b'x') * (8 << 20))"
    result = await box.run("python3.11", "-IS", "-c", script, timeout=120.0)
    assert result.exit is not None
    assert result.exit.signal == 9
    assert result.exit.kill_reason == pb.KILL_REASON_OUT_OF_MEMORY
    assert await output(box, "echo alive") == "alive\n"


async def test_the_mock_agent_runs_the_scripts_of_its_prompt(box: Client) -> None:
    prompt = "```sh\nid -un; echo żółć > /workspace/made\n```\nWrite your output to /workspace/out.txt."
    args = ("-p", prompt, "--output-format", "stream-json", "--verbose")
    result = await box.run("voidbox-mock-agent", *args)
    assert result.code == 0, result
    assert b'"subtype": "success"' in result.stdout
    assert await box.read("/workspace/out.txt") == b"sandbox\n"
    assert await box.read("/workspace/made") == "żółć\n".encode()
    found = (await box.stub.StatFile(pb.StatFileRequest(path="/workspace/made"), metadata=METADATA)).file
    assert (found.uid, found.gid) == (1000, 1000)


async def test_files_are_the_users_and_the_agents_are_refused(box: Client) -> None:
    await box.write("/workspace/deep/er/file", b"x", make_parents=True)
    assert "sandbox" in await output(box, "stat -c %U /workspace/deep /workspace/deep/er/file")
    await box.sh("ln -s /run/voidbox /workspace/trap; ln -s /usr/lib/voidbox /workspace/trap2")
    paths = (
        "/run/voidbox/agent.sock",
        "/workspace/trap/agent.sock",
        "/workspace/trap2/site",
        "/init",
        "/proc/1/mem",
    )
    for path in paths:
        with pytest.raises(aio.AioRpcError) as caught:
            await box.read(path)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED, path
        with pytest.raises(aio.AioRpcError):
            await box.write(path, b"owned")


async def mount(box: Client, source: str, path: str, mode: int, kind: int = pb.MOUNT_TYPE_9P) -> None:
    """Mount a device."""
    request = pb.MountRequest(source=source, type=kind, path=path, mode=mode)  # type: ignore[arg-type]
    await box.stub.Mount(request, metadata=METADATA)


async def test_shares_are_mounted_with_their_access(box: Client, scratch: Path) -> None:
    await mount(box, "m0", "/workspace/rw", 2)
    assert (
        await output(box, "cat rw/hello; echo from the box > rw/new; mkdir rw/d; mv rw/new rw/d/")
        == "from the host\n"
    )
    assert (scratch / "m0/d/new").read_text() == "from the box\n"
    mapping = """
import mmap
f = open("/workspace/rw/map", "w+b")
f.truncate(8192)
m = mmap.mmap(f.fileno(), 8192)
m[:4] = b"mapd"
m.flush()
"""
    result = await box.run("python3.11", "-c", mapping)
    assert result.code == 0, result
    assert (scratch / "m0/map").read_bytes()[:4] == b"mapd"
    await mount(box, "m1", "/mnt/ro", 1)
    seen = await output(box, "cat /mnt/ro/hello; echo x > /mnt/ro/hello; touch /mnt/ro/new")
    assert "from the host" in seen
    assert seen.count("Read-only file system") == 2
    for source, path, code in (
        ("nope", "/mnt/x", grpc.StatusCode.NOT_FOUND),
        ("m0", "/proc/x", grpc.StatusCode.INVALID_ARGUMENT),
        ("m0", "/mnt/ro", grpc.StatusCode.ALREADY_EXISTS),
        ("a,b", "/mnt/x", grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(aio.AioRpcError) as caught:
            await mount(box, source, path, 1)
        assert caught.value.code() is code, (source, path, caught.value.details())
        assert reason(caught.value).reason
    for path in ("/mnt/ro", "/workspace/rw"):
        await box.stub.Unmount(pb.UnmountRequest(path=path), metadata=METADATA)
    assert await output(box, "ls -A /mnt/ro /workspace/rw | grep -v :") == "\n"
    # The host's files stay as they are under an overlay.
    await mount(box, "m1", "/mnt/over", 3)
    assert (
        await output(box, "echo changed > /mnt/over/hello; rm -f /mnt/over/none; cat /mnt/over/hello")
        == "changed\n"
    )
    assert (scratch / "m1/hello").read_text() == "from the host\n"
    await box.stub.Unmount(pb.UnmountRequest(path="/mnt/over"), metadata=METADATA)


async def test_a_disk_is_mounted_and_its_end_has_a_name(box: Client) -> None:
    await mount(box, "data", "/mnt/data", 2, pb.MOUNT_TYPE_DISK)
    with pytest.raises(aio.AioRpcError) as caught:
        await box.write("/mnt/data/full", bytes(64 * MIB))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason(caught.value).metadata["path"] == "/mnt/data/full"
    await box.stub.Unmount(pb.UnmountRequest(path="/mnt/data"), metadata=METADATA)


async def test_a_terminal_in_the_guest(box: Client) -> None:
    script = "tty; stty size; id -un > /dev/tty; test -w $(tty) && echo own"
    result = await box.run("sh", "-c", script, terminal=pb.Terminal(columns=77, rows=11))
    assert result.stdout.split() == [b"/dev/pts/0", b"11", b"77", b"sandbox", b"own"]


@pytest.fixture(scope="module")
def rooted(scratch: Path) -> Iterator[GuestMachine]:
    """A machine whose programs run in a root disk that has a file system of its own making."""
    tree = scratch / "tree"
    for name in ("bin", "etc", "usr/lib/voidbox"):
        (tree / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", tree / "bin/busybox")
    for applet in ("sh", "cat", "ls", "id", "touch", "mount", "ps", "grep", "echo", "sleep", "sync"):
        os.symlink("busybox", tree / "bin" / applet)
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nweb:x:33:44:w:/srv/web:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\nextra:x:55:web\n")
    (tree / "etc/hosts").write_text("127.0.0.1 theirs\n")
    (tree / "usr/lib/voidbox/theirs").write_text("the image's own\n")
    (tree / "init").write_text("the image's init\n")
    os.symlink("/etc", tree / "etc-link")
    ext4(scratch / "root.img", tree)
    (scratch / "rm0").mkdir()
    (scratch / "rm0/hello").write_text("shared\n")
    devices = (*blk(scratch / "root.img", "root"), *share(scratch / "rm0", "m0"))
    give_away(scratch)
    with GuestMachine(memory_mib=192, devices=devices, uid=machine_user()) as running:
        disk = pb.RootDisk(serial="root", writable=True)
        user = pb.User(uid=2000, gid=2001, groups=[7])
        answer = asyncio.run(claim(running, root_disk=disk, default_user=user, env={"FROM": "claim"}))
        assert answer.root_disk_mounted, running.evidence()
        yield running


async def test_programs_run_in_the_root_disk(rooted: GuestMachine, scratch: Path) -> None:
    async with rooted.channel() as channel:
        box = Client(channel)
        seen = await output(
            box, "id; echo $HOME $FROM; echo $PWD; cat /etc/hosts /init /usr/lib/voidbox/theirs"
        )
        assert seen.splitlines() == [
            "uid=2000(sandbox) gid=2001(sandbox) groups=7,2001(sandbox)",
            "/home/sandbox claim",
            "/workspace",
            "127.0.0.1 theirs",
            "the image's init",
            "the image's own",
        ]
        seen = await output(box, "echo $HOME $USER; id", user="web")
        assert seen.splitlines() == ["/srv/web web", "uid=33(web) gid=44 groups=44,55(extra)"]
        mounts = await output(box, "cat /proc/mounts")
        assert mounts.startswith("/dev/vda / ext4 rw")
        assert "rootfs" not in mounts
        await mount(box, "m0", "/workspace/shared", 2)
        assert await output(box, "cat /workspace/shared/hello") == "shared\n"
        # File calls and programs have the same root, and links stay in it.
        assert await box.read("/etc-link/hosts") == b"127.0.0.1 theirs\n"
        assert await box.read("/usr/lib/voidbox/theirs") == b"the image's own\n"
        await box.write("/workspace/kept", b"to the disk")
        assert await output(box, "cat kept; ls -ld /workspace/kept | grep -c 2000") == "to the disk0\n"
        script = "touch /etc/x; ls /proc/1/root; echo x > /proc/sys/kernel/core_pattern"
        seen = await output(box, script, user="root")
        assert "core_pattern: Read-only file system" in seen
        assert "/proc/1/root: No such file" in seen
        await box.stub.Shutdown(pb.ShutdownRequest(grace=duration(1)), metadata=METADATA)
    rooted.shim.wait(20)
    image = str(scratch / "root.img")
    assert "recover" not in await asyncio.to_thread(checked_output, "e2fsck", "-fn", image)
    assert (
        await asyncio.to_thread(checked_output, "debugfs", "-R", "cat /workspace/kept", image)
        == "to the disk"
    )
