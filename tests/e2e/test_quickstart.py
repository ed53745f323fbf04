"""The example that a newcomer runs first: four micro-VMs, real data, the right answer."""

from __future__ import annotations

import os

import pytest

from tests.e2e.voidbox_cli import ROOT, Voidbox

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

EXPECTED = """\
Shops
  shop-north     240 requests    3 failed (1.2 %)
  shop-south     190 requests    8 failed (4.2 %)
  shop-west      260 requests    5 failed (1.9 %)
Slowest paths
  /checkout        mean  410.0 ms, worst   819 ms
  /search          mean  211.1 ms, worst   522 ms
  /login           mean  121.2 ms, worst   408 ms
  /item            mean   77.7 ms, worst   205 ms
  /cart            mean   52.2 ms, worst   171 ms
"""


def test_the_quickstart_gives_the_right_answer_from_four_machines(voidbox: Voidbox) -> None:
    lines = voidbox("--output", "json", "run", str(ROOT / "examples/quickstart/pipeline.yaml")).lines
    result = lines[-1]
    assert result["type"] == "result"
    assert result["success"] is True
    assert result["output"] == EXPECTED
    stages = {stage["name"]: stage for stage in result["stage_results"]}
    assert list(stages) == ["collect", "count", "rank", "report"]
    boot_ids = {stage["boot_id"] for stage in stages.values()}
    assert len(boot_ids) == 4
    with open("/proc/sys/kernel/random/boot_id") as file:
        assert file.read().strip() not in boot_ids
    assert os.uname().release not in {stage["kernel_release"] for stage in stages.values()}
    for stage in stages.values():
        assert {"image", "boot", "inputs", "program", "outputs"} <= set(stage["phases"]), stage
        assert stage["exit_code"] == 0
    offsets = [int(line["event"].get("offset", 0)) for line in lines[:-1]]
    assert offsets == list(range(len(offsets)))
    assert voidbox.boxes() == []
    voidbox("rm", result["run_id"])
