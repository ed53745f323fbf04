"""Which box is meant: a box id, a run, or RUN/STAGE."""

from __future__ import annotations

from services.common.errors import InvalidInput, NotFound, WrongState
from voidbox.cli.view import ENDED
from voidbox.client import Client
from voidbox.hypervisor.v1 import hypervisor_pb2 as hv
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb

RUNNING = frozenset((hv.BOX_STATE_RUNNING,))


def box_state(box: hv.Box) -> str:
    """A box's state for people: `paused (idle)` if the next call lets it go on."""
    return state_word(box.state) + (" (idle)" if box.auto_paused else "")


def state_word(state: hv.BoxState.ValueType) -> str:
    """A state for people and for JSON: `running`."""
    return hv.BoxState.Name(state).removeprefix("BOX_STATE_").lower()


async def find_box(client: Client, name: str, states: frozenset[hv.BoxState.ValueType] = RUNNING) -> str:
    """The id of the box that `name` means.

    Args:
        states: Those in which it may be.

    Raises:
        NotFound: there is neither such a run nor such a box.
        WrongState: it is in another state.
        InvalidInput: the run has several boxes.
    """
    run_id, slash, stage = name.partition("/")
    try:
        run = await client.get_run(run_id)
    except (NotFound, InvalidInput):
        run = None
    if run is not None:
        return _of_run(run, stage)
    if slash:
        raise NotFound(f"there is no run {run_id!r}; list them: voidbox ps -a", reason="RUN_NOT_FOUND")
    boxes = {box.id: box async for box in client.list_boxes()}
    if name not in boxes:
        raise NotFound(
            f"there is neither a run nor a box {name!r}; list them: voidbox ps",
            reason="BOX_NOT_FOUND",
            box=name,
        )
    state = boxes[name].state
    if state not in states and not (boxes[name].auto_paused and hv.BOX_STATE_RUNNING in states):
        reason = boxes[name].reason
        wanted = " or ".join(sorted(state_word(one) for one in states))
        raise WrongState(
            f"box {name} is {state_word(state)}" + (f": {reason}" if reason else f", not {wanted}"),
            reason="BOX_NOT_RUNNING",
        )
    return name


def _of_run(run: pb.Run, stage: str) -> str:
    if stage:
        named = [one for one in run.stages if one.name == stage]
        if not named:
            names = ", ".join(one.name for one in run.stages)
            raise NotFound(f"run {run.id} has no stage {stage!r}; it has: {names}", reason="STAGE_NOT_FOUND")
        if not named[0].box_id or named[0].state in ENDED:
            raise WrongState(f"stage {run.id}/{stage} has no running box", reason="BOX_NOT_RUNNING")
        return named[0].box_id
    live = {one.box_id: one.name for one in run.stages if one.box_id and one.state not in ENDED}
    if not live:
        raise WrongState(f"run {run.id} has no running box", reason="BOX_NOT_RUNNING")
    if len(live) > 1:
        choices = ", ".join(f"{run.id}/{name}" for name in live.values())
        raise InvalidInput(f"run {run.id} has several boxes; name one: {choices}", reason="AMBIGUOUS_BOX")
    return next(iter(live))
