"""Who broke the protocol: they (the guest, or the machine's process), or we."""

from __future__ import annotations


class PeerBroke(Exception):
    """The other side did what the protocol forbids; only its own device suffers."""


class BackendPeerBroke(PeerBroke):
    """QEMU sent a vhost-user message that is malformed, out of place or not negotiated."""


class QueueBroke(PeerBroke):
    """The guest's driver filled a virtqueue with what a virtqueue cannot hold."""


class MachineGone(Exception):
    """The machine's memory cannot be reached any more: its process has ended or is ending."""


class DeviceBug(Exception):
    """The device itself went where it must not; a defect of ours."""
