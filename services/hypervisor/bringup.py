"""How a box gets its machine and its guest: booted, restored, taken from the pool, or found again."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import time

from services.common.errors import Internal, TimedOut
from services.hypervisor import failure, layout, prepare, record
from services.hypervisor.box import Box
from services.hypervisor.claim import SECRET_BYTES, Guest, Identity
from services.hypervisor.driver import Driver, Machine, MachinePlan
from services.hypervisor.layout import Layout
from services.hypervisor.phases import Phases
from services.hypervisor.saved import Saved
from services.hypervisor.states import BoxState

log = logging.getLogger(__name__)

# After a restart of the service: a guest under emulation on a busy host answers late.
ADOPT_SECONDS = 20.0


async def boot_into(box: Box, driver: Driver, plan: MachinePlan, into: Saved, seconds: float) -> None:
    """Boot a machine in the box's place and save it as soon as its agent answers.

    Nothing of it is left in the box's directory, unless it fails.

    Raises:
        VoidboxError: it did not come up, or could not be saved; call `destroy`.
    """
    deadline = time.monotonic() + seconds
    box.machine = machine = await driver.start(plan, box.spawned)
    box.update(vmm_pid=machine.vmm_pid)
    log.info("machine %s boots, to be saved", box.id)
    guest = Guest(machine.guest_channel(), bytes.fromhex(into.facts["secret"]))
    try:
        # What a claim and a program need is then in the saved memory.
        await box.unless_ended(guest.rehearse(seconds))
    except TimedOut as error:
        raise failure.boot_timeout(box.id, seconds, machine.remains()) from error
    finally:
        await guest.channel.close()
    plan.note("boot")
    await box.unless_ended(machine.save(into))
    plan.note("save")
    await machine.kill(gently=False)
    await machine.close()
    box.machine = None
    box.update(vmm_pid=0, shim_pid=0, shim_start=0)
    Layout.clear_machine(box.directory)
    if time.monotonic() > deadline:
        raise failure.boot_timeout(box.id, seconds, machine.remains())


async def wait_in_pool(box: Box, driver: Driver, plan: MachinePlan, seconds: float) -> bytes:
    """Restore a machine that nobody has claimed, and stop it once its agent has answered.

    Returns:
        The secret that its guest obeys until it is claimed.

    Raises:
        VoidboxError: it did not come up; call `destroy`.
    """
    secret = secrets.token_bytes(SECRET_BYTES)
    box.machine = machine = await driver.start(plan, box.spawned)
    box.update(vmm_pid=machine.vmm_pid)
    box.agent = guest = Guest(machine.guest_channel(), secret)
    await box.unless_ended(guest.rehearse(seconds, plan.former))
    await box.unless_ended(machine.pause())
    return secret


async def wait_ready(box: Box, driver: Driver, plan: MachinePlan, seconds: float) -> None:
    """Start a machine for a box to be restored into.

    Raises:
        VoidboxError: it did not come up; call `destroy`.
    """
    async with asyncio.timeout(seconds):
        box.machine = await driver.start(dataclasses.replace(plan, ahead=True), box.spawned)
    box.update(vmm_pid=box.machine.vmm_pid)


def _take_over(box: Box, pooled: Box) -> tuple[Machine, Guest | None]:
    """The machine of one that waited, whose directory is ours already; its guest, if it was restored."""
    assert pooled.machine is not None
    machine, pooled.machine = pooled.machine, None
    guest, pooled.agent = pooled.agent, None
    machine.moved(box.directory)
    box.machine = machine
    theirs = pooled.record
    box.update(cid=theirs.cid, shim_pid=theirs.shim_pid, shim_start=theirs.shim_start)
    return machine, guest


async def start(
    box: Box,
    driver: Driver,
    plan: MachinePlan,
    identity: Identity,
    seconds: float,
    phases: Phases,
    pooled: Box | None = None,
) -> None:
    """Bring the machine up, claim its guest and have it mount what is attached.

    Args:
        driver: Starts machines.
        plan: The machine.
        identity: Who the guest shall be.
        seconds: How long all this may take.
        phases: Notes how long each part took.
        pooled: Has a machine to take over instead of starting one.

    Raises:
        VoidboxError: it did not come up; call `destroy`.
    """
    deadline = time.monotonic() + seconds
    if pooled is not None:
        machine, waiting = _take_over(box, pooled)
        former = waiting.metadata[0][1] if waiting is not None else plan.former
        channel = waiting.channel if waiting is not None else machine.guest_channel()
        box.agent = guest = Guest(channel, identity.secret)
        await box.unless_ended(machine.complete(plan))
    else:
        former = plan.former
        box.machine = machine = await driver.start(plan, box.spawned)
        box.agent = guest = Guest(machine.guest_channel(), identity.secret)
    box.update(vmm_pid=machine.vmm_pid, phases=phases.done)
    # Its interpreter starts while the guest is claimed.
    box.network.start(plan, machine)
    try:
        claimed = await box.unless_ended(guest.claim(identity, max(0.1, deadline - time.monotonic()), former))
    except TimedOut as error:
        raise failure.boot_timeout(box.id, seconds, machine.remains()) from error
    record.write_atomically(box.directory / layout.SECRET_FILE, identity.secret)
    phases.add("claim" if plan.saved or pooled else "boot")
    attachments = prepare.attachments(box.record.config, plan.files)
    if plan.restored_disks:
        attachments = [each for each in attachments if not each.disk]  # the guest has them mounted
    for attachment in attachments:
        await box.unless_ended(guest.mount(attachment))
    if attachments:
        phases.add("mount")
    if await box.unless_ended(box.network.connect(plan, machine, guest)):
        phases.add("network")
    if plan.frozen:
        # Only now: no program goes on before it is on a machine with an identity of its own.
        await box.unless_ended(guest.freeze(False))
        phases.add("thaw")
    box.update(state=BoxState.RUNNING, boot_id=claimed.boot_id, ready_time=time.time(), phases=phases.done)
    log.info("box %s runs after %.1f s", box.id, time.time() - box.record.create_time)
    box.serve(machine)


async def adopt(box: Box, driver: Driver) -> None:
    """Find the running machine of this record again, and make sure that it is the one.

    Raises:
        VoidboxError: it is gone, or is not what the record says; call `bury`.
    """
    box.machine = machine = await driver.adopt(box.record, box.directory)
    try:
        secret = (box.directory / layout.SECRET_FILE).read_bytes()
    except OSError as error:
        raise Internal(f"box {box.id}: its secret is lost: {error.strerror}", reason="LOST") from error
    box.agent = guest = Guest(machine.guest_channel(), secret)
    if box.record.capturing:
        log.warning("box %s was being saved when the service ended", box.id)
        await machine.recover()
        await box.unless_ended(guest.freeze(False))
        box.update(capturing=False)
        if box.record.config.egress:
            await box.unless_ended(guest.configure_network())
    if box.record.config.egress:
        box.network.adopt()
    paused = await machine.paused()
    if not paused:
        boot_id = await box.unless_ended(guest.boot_id(ADOPT_SECONDS))
        if boot_id != box.record.boot_id:
            raise Internal(f"box {box.id}: its guest has booted again", reason="BOOT_ID_CHANGED")
    state = BoxState.PAUSED if paused else BoxState.RUNNING
    auto_paused = paused and box.record.auto_paused
    if (state, auto_paused) != (box.record.state, box.record.auto_paused):
        box.update(state=state, auto_paused=auto_paused)
    box.serve(machine)


async def adopt_waiting(box: Box, driver: Driver, secret: bytes) -> None:
    """Find the machine of this record again, which waits in the pool.

    Raises:
        VoidboxError: it is gone, or does not wait; call `destroy`.
    """
    box.machine = machine = await driver.adopt(box.record, box.directory)
    box.agent = Guest(machine.guest_channel(), secret)
    if not await machine.paused():
        raise Internal(f"machine {box.id} runs, though nobody has claimed it", reason="NOT_WAITING")
