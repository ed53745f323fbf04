"""A box's network namespace: made by a short-lived child, kept alive by the sockets that it hands over.

The child, alone in a new user (unless it is root) and network namespace, makes the tap device, gives it
addresses, loads the rules and opens the listening sockets. It sends all of them back and ends. Sources:
network_namespaces(7), user_namespaces(7), Documentation/networking/tuntap.rst, packet(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import subprocess
from dataclasses import dataclass

from services.hypervisor.egress import link
from services.hypervisor.egress.netlink import Route
from services.hypervisor.egress.packet_filter import packet_filter
from services.hypervisor.egress.ruleset import ruleset

TUN = "/dev/net/tun"
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x400454CA, 2, 0x1000, 0x4000
_NEWUSER, _NEWNET = 0x10000000, 0x40000000
_BACKLOG = 1024
_PACKET_IGNORE_OUTGOING, _SOL_PACKET = 23, 263
_ETH_P_ALL = 3
_SO_ATTACH_FILTER = 26
_MAX_ERROR = 4096
_NFT_SECONDS = 30.0
_NFT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_COUNT = 8


class NamespaceFailed(Exception):
    """It could not be made; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What the namespace is used by; all belong to the caller."""

    tap: int
    tcp: int
    tcp6: int
    dns: int
    dns6: int
    dns_tcp: int
    dns_tcp6: int
    packets: int

    def sockets(self) -> tuple[int, ...]:
        """All but the tap."""
        return self.tcp, self.tcp6, self.dns, self.dns6, self.dns_tcp, self.dns_tcp6, self.packets


def make(tun: str = TUN) -> Descriptors:
    """Make a namespace. The caller has one thread; it must have a user namespace to make, or be root.

    Raises:
        NamespaceFailed: the host does not allow it.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            ours.close()
            _child(theirs, tun)
        theirs.close()
        data, fds, _, _ = socket.recv_fds(ours, _MAX_ERROR, _COUNT)
        os.waitpid(pid, 0)
    if len(fds) != _COUNT:
        for fd in fds:
            os.close(fd)
        raise NamespaceFailed(data.decode(errors="replace") or "the process that makes it ended")
    for fd in fds:
        os.set_inheritable(fd, False)
    return Descriptors(*fds)


def _child(channel: socket.socket, tun: str) -> None:
    try:
        fds = _build(tun)
        socket.send_fds(channel, [b"made"], fds)
        os._exit(0)
    except BaseException as error:
        message = str(error) if isinstance(error, NamespaceFailed) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            channel.send(message.encode()[:_MAX_ERROR])
    finally:
        os._exit(1)


def _build(tun: str) -> list[int]:
    _unshare()
    try:
        tap = os.open(tun, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NamespaceFailed(f"{tun}: {error.strerror}; {_tun_cure(tun, error)}") from error
    fcntl.ioctl(
        tap, _TUNSETIFF, struct.pack("16sH22x", link.TAP.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
    )
    with Route() as route:
        route.up("lo")
        route.up(link.TAP, bytes.fromhex(link.GATEWAY_MAC.replace(":", "")))
        route.add(link.TAP, link.GATEWAY)
        route.add(link.TAP, type(link.GATEWAY)(f"{link.NAME_SERVER}/24"))
        route.add(link.TAP, link.GATEWAY6)
        route.add(link.TAP, type(link.GATEWAY6)(f"{link.NAME_SERVER6}/64"))
    tcp, tcp6, dns_tcp, dns_tcp6 = (_listen(family) for family in (socket.AF_INET, socket.AF_INET6) * 2)
    # One port for all of a kind, so that the rules need no family.
    tcp.bind(("0.0.0.0", 0))  # noqa: S104 - in the box's own namespace
    dns_tcp.bind(("0.0.0.0", 0))  # noqa: S104
    ports = tcp.getsockname()[1], dns_tcp.getsockname()[1]
    tcp6.bind(("::", ports[0]))
    dns_tcp6.bind(("::", ports[1]))
    for listener in (tcp, tcp6, dns_tcp, dns_tcp6):
        listener.listen(_BACKLOG)
    dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    dns6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    dns6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    dns.bind(("0.0.0.0", ports[1]))  # noqa: S104
    dns6.bind(("::", ports[1]))
    packets = _packets()
    _load_rules(*ports)
    return [tap, *(one.detach() for one in (tcp, tcp6, dns, dns6, dns_tcp, dns_tcp6, packets))]


def _unshare() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0 and libc.unshare(_NEWNET) == 0:
        return
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(_NEWUSER | _NEWNET) != 0:
        number = ctypes.get_errno()
        raise NamespaceFailed(
            f"user namespaces are not allowed: {os.strerror(number)}; {user_namespace_cure(number)}"
        )
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def user_namespace_cure(number: int) -> str:
    """What to do on a host that refuses user namespaces with this errno."""
    if number == errno.ENOSPC:
        return "raise it: sudo sysctl user.max_user_namespaces=15000 user.max_net_namespaces=15000"
    return (
        "allow them: sudo sysctl kernel.unprivileged_userns_clone=1 (Debian) or "
        "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu); in a container, run it with "
        "--security-opt seccomp=unconfined or as root with --cap-add NET_ADMIN"
    )


def _tun_cure(tun: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "load it: sudo modprobe tun; in a container, run it with --device /dev/net/tun"
    return f"let users open it, which gives no rights outside their own namespaces: sudo chmod 0666 {tun}"


def _listen(family: socket.AddressFamily) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return listener


def _packets() -> socket.socket:
    """A packet socket that sees what the redirecting rules do not take."""
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    code = packet_filter()
    buffer = ctypes.create_string_buffer(code, len(code))
    packets.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
    )
    packets.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    packets.bind((link.TAP, _ETH_P_ALL))
    return packets


def _load_rules(tcp: int, dns: int) -> None:
    try:
        subprocess.run(
            ["nft", "-f", "-"],
            input=ruleset(tcp, dns).encode(),
            env={"PATH": _NFT_PATH},
            capture_output=True,
            check=True,
            timeout=_NFT_SECONDS,
        )
    except FileNotFoundError as error:
        raise NamespaceFailed("nft is not installed; sudo apt-get install nftables") from error
    except subprocess.CalledProcessError as error:
        text = error.stderr.decode(errors="replace").strip().splitlines()
        raise NamespaceFailed(
            f"nft: {text[0] if text else error.returncode}; the kernel needs nf_tables and nft_redir: "
            "sudo modprobe -a nf_tables nft_redir nft_chain_nat"
        ) from error
