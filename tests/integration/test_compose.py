"""The compose stack on a real Docker engine: built, used through its one port, hurt, taken down.

`make test-compose` runs it; it needs several minutes, most of them for the first build. The
engine is this machine's, or a private one that the test starts as root and ends again. The
base image is `VOIDBOX_TEST_BASE_IMAGE`, else one that debootstrap makes.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from services.common.address import Address
from services.common.auth import read_token
from tests.engine import Engine, EngineMissing, docker_engine, import_base_image
from voidbox.client import Client
from voidbox.common.v1 import common_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2
from voidbox.imager.v1 import imager_pb2

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("imager", "hypervisor", "orchestrator")
BASE_IMAGE = "voidbox-test-base"

# Building three images and a guest image takes 3 minutes on an idle two-core machine.
_UP_SECONDS = 1800
# A restart and two rounds of health checks.
_HEALTHY_SECONDS = 180
_PROGRAM_SECONDS = 600

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not os.environ.get("VOIDBOX_TEST_COMPOSE"), reason="takes minutes; `make test-compose` runs it"
    ),
]


@dataclass(slots=True, kw_only=True)
class Stack:
    """A compose project that is up."""

    engine: Engine
    project: str
    compose: tuple[str, ...]
    env: Mapping[str, str]
    client_env: dict[str, str] = field(default_factory=dict)

    def run(self, *words: str, seconds: float = _PROGRAM_SECONDS, files: Sequence[str] = ()) -> str:
        """Run compose with `words`, and with more `files` than the usual one."""
        options = ["--project-name", self.project, "--project-directory", str(ROOT)]
        for file in ("docker-compose.yml", *files):
            options += ["--file", str(ROOT / file)]
        return self.engine.run(*self.compose, *options, *words, seconds=seconds, env=self.env)

    def container(self, service: str) -> str:
        """Id of the service's container."""
        return self.run("ps", "--quiet", service).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        """The engine's description of the service's container."""
        return self.engine.inspect(self.container(service))

    @contextmanager
    def until_healthy(self, services: Set[str]) -> Iterator[None]:
        """On leaving the block, wait until each of `services` has become healthy since it was entered."""
        start = time.time()
        yield
        words = [
            "docker",
            "events",
            "--since",
            f"{start:.6f}",
            "--until",
            f"{time.time() + _HEALTHY_SECONDS:.6f}",
        ]
        words += ["--format", "{{json .}}", "--filter", "type=container"]
        words += ["--filter", f"label=com.docker.compose.project={self.project}"]
        missing = set(services)
        with subprocess.Popen(
            words, env=dict(self.engine.env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        ) as events:
            assert events.stdout is not None
            try:
                while missing:
                    line = events.stdout.readline()
                    assert line, f"{sorted(missing)} did not become healthy within {_HEALTHY_SECONDS} s"
                    event = json.loads(line)
                    if event["Action"] == "health_status: healthy":
                        missing.discard(event["Actor"]["Attributes"]["com.docker.compose.service"])
            finally:
                events.kill()

    def client(self) -> AbstractAsyncContextManager[Client]:
        """A client of the published port."""
        address = Address.parse(self.client_env["VOIDBOX_ADDRESS"])
        return Client.open(address, read_token(Path(self.client_env["VOIDBOX_TOKEN_FILE"])))

    def voidbox(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the command line client against the published port."""
        return subprocess.run(
            [str(Path(sys.executable).with_name("voidbox")), *words],
            cwd=ROOT,
            env=self.client_env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROGRAM_SECONDS,
            check=False,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with ExitStack() as stack:
        try:
            found = stack.enter_context(docker_engine(tmp_path_factory.mktemp("engine")))
            found.compose()
            if not os.environ.get("VOIDBOX_TEST_BASE_IMAGE"):
                import_base_image(found, BASE_IMAGE, ROOT / ".build/compose-base.tar")
        except EngineMissing as missing:
            pytest.skip(f"no Docker engine to test compose on: {missing}")
        yield found


@pytest.fixture(scope="module")
def stack(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The project, built, up and healthy; taken down with all that it made."""
    port = _free_port()
    base = os.environ.get("VOIDBOX_TEST_BASE_IMAGE") or BASE_IMAGE
    found = Stack(
        engine=engine,
        project=f"voidbox-test-{uuid.uuid4().hex[:8]}",
        compose=engine.compose(),
        env={"BASE_IMAGE": base, "VOIDBOX_PORT": str(port), "VOIDBOX_KVM_GID": "104"},
    )
    try:
        with found.until_healthy(set(SERVICES)):
            found.run("up", "--detach", "--build", seconds=_UP_SECONDS)
        home = tmp_path_factory.mktemp("client")
        token = home / "token"
        token.touch(mode=0o600)
        token.write_text(found.run("exec", "-T", "orchestrator", "cat", "/var/lib/voidbox/token"))
        found.client_env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "VOIDBOX_ADDRESS": f"tcp://127.0.0.1:{port}",
            "VOIDBOX_TOKEN_FILE": str(token),
        }
        yield found
    except BaseException:
        print(found.run("logs", "--no-color", "--tail", "200"))
        raise
    finally:
        found.run("down", "--volumes", "--rmi", "local", "--timeout", "30")
    for kind in ("container", "volume", "network", "image"):
        everything = ("--all",) if kind == "container" else ()
        label = f"label=com.docker.compose.project={found.project}"
        assert not engine.docker(kind, "ls", *everything, "--quiet", "--filter", label), kind


def test_a_program_runs_in_a_micro_vm_behind_the_published_port(stack: Stack) -> None:
    done = stack.voidbox("exec", "--", "sh", "-c", "uname -r; cat /proc/sys/kernel/random/boot_id; exit 5")
    assert done.returncode == 5, done.stderr
    release, boot_id = done.stdout.split()
    assert release != os.uname().release
    assert boot_id != Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_the_quickstart_runs(stack: Stack) -> None:
    done = stack.voidbox("run", "examples/quickstart/pipeline.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_port_answers_nobody_without_the_token(stack: Stack, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.touch(mode=0o600)
    wrong.write_text("not-the-token-of-this-stack")
    stack_env = stack.client_env
    try:
        stack.client_env = stack_env | {"VOIDBOX_TOKEN_FILE": str(wrong)}
        refused = stack.voidbox("ps")
        stack.client_env = {key: value for key, value in stack_env.items() if key != "VOIDBOX_TOKEN_FILE"}
        absent = stack.voidbox("ps")
    finally:
        stack.client_env = stack_env
    assert refused.returncode != 0
    assert "token" in refused.stderr
    assert absent.returncode != 0
    assert "token" in absent.stderr


def test_an_independent_client_works_through_the_port_with_the_token(stack: Stack) -> None:
    address, token = stack.client_env["VOIDBOX_ADDRESS"], stack.client_env["VOIDBOX_TOKEN_FILE"]
    client = str(ROOT / "tests/e2e/node/client.mjs")
    seen = json.loads(stack.engine.run("node", client, str(ROOT / "protos"), address, token))
    assert seen["box"]["state"] == "BOX_STATE_RUNNING"
    assert seen["exec"] == {"stdout": f"{seen['box']['boot_id']}\n", "stderr": "wört\n", "code": 7}
    assert seen["stdin"]["received"] == seen["stdin"]["sent"]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_runs_without_any_privilege(stack: Stack, service: str) -> None:
    host = stack.inspect(service)["HostConfig"]
    assert not host["Privileged"]
    assert host["ReadonlyRootfs"]
    status = stack.run("exec", "-T", service, "cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["10001"] * 4
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"


def test_only_the_orchestrator_can_be_reached_from_outside(stack: Stack) -> None:
    ports = {service: stack.inspect(service)["NetworkSettings"]["Ports"] for service in SERVICES}
    bindings = [binding for found in ports.values() for port in found.values() for binding in port or ()]
    assert [binding["HostIp"] for binding in bindings] == ["127.0.0.1"]
    assert ports["imager"] == ports["hypervisor"] == {}
    assert list(stack.inspect("hypervisor")["NetworkSettings"]["Networks"]) == ["none"]


@pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="this machine has no /dev/kvm")
def test_the_kvm_file_gives_the_device_to_the_hypervisor(stack: Stack) -> None:
    words = (
        "run",
        "--rm",
        "--no-deps",
        "-T",
        "--entrypoint",
        "stat",
        "hypervisor",
        "-c",
        "%F %t:%T",
        "/dev/kvm",
    )
    # 10:232 in hexadecimal: the device's number in the kernel's list of devices.
    assert stack.run(*words, files=["docker-compose.kvm.yml"]).strip() == "character special file a:e8"


def kill_service(stack: Stack, service: str) -> None:
    """Kill the service's process as an accident would; a kill by the engine would count as wanted."""
    # PID 1 is an init process, whose first child is the service. The container ends with it,
    # and with that this command too, with whatever exit code.
    script = "kill -KILL $(cut -d ' ' -f 1 /proc/1/task/1/children)"
    words = ["docker", "exec", stack.container(service), "sh", "-c", script]
    subprocess.run(words, env=dict(stack.engine.env), capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_service_comes_back_and_serves(stack: Stack, service: str) -> None:
    before = stack.inspect(service)
    with stack.until_healthy({service}):
        kill_service(stack, service)
    after = stack.inspect(service)
    assert after["RestartCount"] == before["RestartCount"] + 1
    assert after["State"]["Pid"] != before["State"]["Pid"]
    done = stack.voidbox("exec", "--", "echo", "again")
    assert (done.returncode, done.stdout) == (0, "again\n"), done.stderr


def test_a_box_of_a_killed_hypervisor_is_reported_as_ended_and_can_be_deleted(stack: Stack) -> None:
    box_id = f"box-{uuid.uuid4().hex[:8]}"

    async def create() -> hypervisor_pb2.Box:
        async with stack.client() as client:
            resolved = await client.imager.ResolveGuestImage(
                imager_pb2.ResolveGuestImageRequest(), timeout=60
            )
            config = hypervisor_pb2.BoxConfig(
                kernel_path=resolved.guest_image.kernel_path,
                initramfs_path=resolved.guest_image.initramfs_path,
                resources=common_pb2.Resources(memory_mib=512),
            )
            request = hypervisor_pb2.CreateBoxRequest(box_id=box_id, config=config)
            return (await client.hypervisor.CreateBox(request, timeout=_PROGRAM_SECONDS)).box

    async def look_and_delete() -> hypervisor_pb2.Box:
        async with stack.client() as client:
            get = hypervisor_pb2.GetBoxRequest(box_id=box_id)
            box = (await client.hypervisor.GetBox(get, timeout=60)).box
            await client.hypervisor.DeleteBox(hypervisor_pb2.DeleteBoxRequest(box_id=box_id), timeout=60)
            return box

    assert asyncio.run(create()).state == hypervisor_pb2.BOX_STATE_RUNNING
    with stack.until_healthy({"hypervisor"}):
        kill_service(stack, "hypervisor")
    box = asyncio.run(look_and_delete())
    assert box.state == hypervisor_pb2.BOX_STATE_FAILED
    assert box.reason
