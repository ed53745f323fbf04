"""What the agent must not load: every module costs boot time and memory in every box."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
UNWANTED = (
    "ssl", "email", "http", "urllib.request", "tarfile", "json", "pickle", "multiprocessing", "hashlib",
    "unittest", "dataclasses", "pathlib", "typing_extensions", "google.protobuf.text_format", "google.rpc",
    "grpc_health.v1", "grpc_reflection.v1alpha", "grpc_channelz", "services", "voidbox.client", "voidbox.cli",
)  # fmt: skip
CODE = """
import sys
sys.path[:0] = {path!r}
import guest.pid1
assert "asyncio" not in sys.modules and "grpc" not in sys.modules, "PID 1 is to be small"
import guest.agent
print([name for name in {unwanted!r} if sys.modules.get(name) and hasattr(sys.modules[name], "__file__")])
from voidbox.guest.v1 import guest_pb2 as pb
start = pb.ExecStart.FromString(pb.ExecStart(program="x", env={{"a": "b"}}).SerializeToString())
answer = pb.GetGuestResponse()
answer.uptime.FromNanoseconds(1500000000)
assert (start.env["a"], answer.uptime.seconds, answer.HasField("uptime")) == ("b", 1, True)
assert "uptime" in str(answer)
print(pb.ExecEvent(exit=pb.ExecExit(signal=9)).WhichOneof("event"))
"""


def test_the_agent_loads_only_what_it_needs_and_protobuf_still_works() -> None:
    packages = [path for path in sys.path if "site-packages" in path]
    code = CODE.format(path=[str(ROOT), *packages], unwanted=UNWANTED)
    done = subprocess.run([sys.executable, "-IS", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "exit"]
