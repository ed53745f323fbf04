"""What the compose file and the Dockerfiles promise, read from the files themselves; needs no engine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("orchestrator", "imager", "hypervisor")
STACK: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
KVM: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.kvm.yml").read_text())


def dockerfile(service: str) -> str:
    return (ROOT / f"services/{service}/Dockerfile").read_text()


def shared_stages(service: str) -> str:
    """From the first instruction to the last stage, without comments: what engines key their cache by."""
    text = dockerfile(service)
    lines = [line for line in text[: text.rindex("\nFROM python\n")].splitlines() if not line.startswith("#")]
    return "\n".join(lines).strip()


def test_the_first_stages_of_all_dockerfiles_are_the_same() -> None:
    stages = {shared_stages(service) for service in SERVICES}
    assert len(stages) == 1
    assert stages.pop().count("\nFROM ") == 2


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_can_be_built_from_another_base_and_runs_without_root(service: str) -> None:
    text = dockerfile(service)
    assert "ARG BASE_IMAGE=debian:bookworm-slim\n" in text
    assert "FROM ${BASE_IMAGE} AS python\n" in text
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001:10001"]
    assert "--require-hashes -r /tmp/requirements.lock" in text


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_holds_the_code_of_no_other_service(service: str) -> None:
    copied = set(re.findall(r"^COPY services/(\w+) ", dockerfile(service), re.MULTILINE))
    assert copied == {"common", service}


def test_all_sources_that_dockerfiles_copy_are_sent_to_the_engine() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    for service in SERVICES:
        for source in re.findall(r"^COPY (?!--from)(\S+) ", dockerfile(service), re.MULTILINE):
            assert (ROOT / source).exists(), source
            assert f"!{source.split('/')[0]}" in ignore


@pytest.mark.parametrize("name", sorted(STACK["services"]))
def test_every_container_is_confined(name: str) -> None:
    service = STACK["services"][name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    loosened = {"privileged", "cap_add", "pid", "ipc", "userns_mode", "user", "devices"} & service.keys()
    assert not loosened


def test_only_the_orchestrator_has_a_port_and_only_on_loopback() -> None:
    ports = {name: service["ports"] for name, service in STACK["services"].items() if "ports" in service}
    assert list(ports) == ["orchestrator"]
    assert all(port.startswith("127.0.0.1:") for port in ports["orchestrator"])


def test_the_hypervisor_has_no_network_and_shares_none_of_the_others() -> None:
    assert STACK["services"]["hypervisor"]["network_mode"] == "none"
    networks = [STACK["services"][name]["networks"] for name in ("imager", "orchestrator")]
    assert networks == [["downloads"], ["front"]]


def test_imager_and_hypervisor_see_the_cache_at_the_same_path() -> None:
    paths = {}
    for name in ("guest-image", "imager", "hypervisor"):
        mounts = [volume.split(":") for volume in STACK["services"][name]["volumes"]]
        paths[name] = [mount[1:] for mount in mounts if mount[0] == "cache"]
    assert paths["imager"] == paths["guest-image"] == [["/var/cache/voidbox"]]
    assert paths["hypervisor"] == [["/var/cache/voidbox", "ro"]]


def test_every_service_is_restarted_and_has_a_health_check() -> None:
    for name in SERVICES:
        service = STACK["services"][name]
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][:4] == ["CMD", "python", "-m", "services.common.healthcheck"]


def test_the_kvm_file_adds_the_device_and_nothing_else() -> None:
    assert list(KVM["services"]) == ["hypervisor"]
    assert set(KVM["services"]["hypervisor"]) == {"devices", "group_add"}
    assert KVM["services"]["hypervisor"]["devices"] == ["/dev/kvm"]


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose 1.29 is not installed")
def test_docker_compose_1_29_accepts_both_files() -> None:
    words = [
        "docker-compose",
        "--file",
        "docker-compose.yml",
        "--file",
        "docker-compose.kvm.yml",
        "config",
        "--quiet",
    ]
    env = {"PATH": "/usr/bin:/bin", "VOIDBOX_KVM_GID": "104"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
