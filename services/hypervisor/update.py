"""Changes of a box that runs: its limits, its time, its labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.common.errors import InvalidInput
from services.hypervisor.box import Box
from services.hypervisor.model import BoxConfig, Confinement, Resources
from services.hypervisor.states import BoxState


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What is to be changed: limits and sizes that are 0 and times that are None stay as they are.

    A label with an empty value is removed. `resources` are at most what the box was made with.
    """

    resources: Resources = Resources(memory_mib=0, vcpus=0, disk_mib=0)
    limits: Confinement = field(default_factory=Confinement)
    max_lifetime: float | None = None
    idle_timeout: float | None = None
    auto_pause: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


async def update(box: Box, changes: Changes) -> None:
    """Make all of `changes`, or none.

    Raises:
        InvalidInput: the machine was not made for that.
        WrongState: it does not run, or uses more than it is to have.
    """
    async with box.in_use(), box.operation:
        guest, machine, old = box.guest, box.machine, box.record
        assert machine is not None
        _check(changes.resources, old.config.resources)
        confinement = _confinement(old.config, changes)
        if confinement != old.config.confinement:
            await box.unless_ended(guest.update_limits(confinement))
        if box.record.state is not BoxState.RUNNING:
            raise box.wrong_state("running")
        box.update(config=_changed(old.config, changes, confinement), asked=old.asked or old.config)
        box.restart_clocks()


def _check(wanted: Resources, made: Resources) -> None:
    for name in ("memory_mib", "vcpus"):
        value, most = getattr(wanted, name), getattr(made, name)
        if not 0 <= value <= most:
            raise InvalidInput(
                f"resources.{name} is {value}; while it runs a box can have 1 to {most}, which it was made "
                "with; make another one for more",
                reason="OVER_MACHINE",
                field=f"resources.{name}",
            )
    if wanted.disk_mib:
        raise InvalidInput(
            "resources.disk_mib cannot be changed while the box runs; make another one, or give it a volume",
            reason="FIXED_DISK",
            field="resources.disk_mib",
        )


def _confinement(config: BoxConfig, changes: Changes) -> Confinement:
    given = {
        name: value
        for name in ("memory_bytes", "processes", "cpu_millis", "open_files", "file_size_bytes")
        if (value := getattr(changes.limits, name))
    }
    if changes.resources.vcpus and "cpu_millis" not in given:
        given["cpu_millis"] = changes.resources.vcpus * 1000
    if changes.resources.memory_mib and "memory_bytes" not in given:
        given["memory_bytes"] = changes.resources.memory_mib << 20
    return dataclasses.replace(config.confinement, **given)


def _changed(config: BoxConfig, changes: Changes, confinement: Confinement) -> BoxConfig:
    times = {
        name: value
        for name in ("max_lifetime", "idle_timeout", "auto_pause")
        if (value := getattr(changes, name)) is not None
    }
    labels = {name: value for name, value in {**config.labels, **changes.labels}.items() if value}
    return dataclasses.replace(config, confinement=confinement, labels=labels, **times)
