"""How the hypervisor is set up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.common.config import setting
from services.hypervisor.identities import FIRST_MACHINE_UID, MACHINE_UIDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Owns the micro-VMs of one host."""

    listen: str = setting("", "address to serve on; empty means unix:<runtime directory>/hypervisor.sock")
    token_file: Path | None = setting(None, "file with the token that callers over TCP must send")
    qemu: str = setting("qemu-system-x86_64", "QEMU's program: a name on PATH or a path")
    qemu_img: str = setting("qemu-img", "QEMU's image program: a name on PATH or a path")
    machine_uid: int = setting(
        FIRST_MACHINE_UID,
        "first of the users that machines run as, each its own, if the service runs as root",
    )
    machine_uids: int = setting(MACHINE_UIDS, "how many there are; the groups have the same numbers")
    parallel_starts: int = setting(0, "boxes that boot at once, the others wait; 0: the CPUs, at least 2")
    templates: bool = setting(
        True, "restore boxes from a machine that was booted once and saved; off: each box boots"
    )
    pool_size: int = setting(
        -1,
        "restored machines that wait for a box, per template; -1: one on a host of 4 CPUs and 8 GiB, else 0",
    )
    ready_size: int = setting(
        1,
        "QEMUs started ahead, per template, for boxes to be restored into",
    )
    pool_idle_seconds: float = setting(600.0, "seconds after which machines that no box has taken are ended")
    pool_memory_mib: int = setting(
        0, "memory that all that wait may take, in MiB; 0: an eighth of the host's"
    )
    snapshots_mib: int = setting(
        16384, "disk that all snapshots may take, in MiB; those not used for longest make room for new ones"
    )
    changes_mib: int = setting(
        10240,
        "what one box may change in overlays of host directories, in MiB; it is stopped if it changes more",
    )
    kept_changes_mib: int = setting(
        20480, "changes of boxes that have ended, in MiB; the oldest are removed to keep to it"
    )
    memory_overcommit: float = setting(
        1.0,
        "memory promised to boxes may reach this multiple of the host's; guests take only what they touch",
    )
    tun_device: str = setting("/dev/net/tun", "device that boxes' networks are made with")
    resolv_conf: str = setting("/etc/resolv.conf", "resolv.conf by which names are resolved for boxes")
    hosts_file: str = setting("/etc/hosts", "hosts file by which names are resolved for boxes")
    name_servers: str = setting(
        "",
        "name servers for boxes instead of those in resolv_conf: ADDRESS[:PORT], with commas between",
    )
    proxy: str = setting(
        "",
        "proxy that boxes' connections go by: http://[USER:PASSWORD@]HOST:PORT or socks5://…",
        env=("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"),
    )
    no_proxy: str = setting(
        "",
        "what goes directly in spite of it: names with all below, addresses, prefixes, with commas between",
        env=("NO_PROXY", "no_proxy"),
    )
    extra_ca: str = setting(
        "",
        "file of PEM certificates that servers of boxes' credentials are trusted by, besides the system's",
        env=("SSL_CERT_FILE",),
    )
    log_level: str = setting(
        "info", "least severe record to log: debug, info, warning or error", env=("VOIDBOX_LOG_LEVEL",)
    )
