"""`voidbox egress log`: what the boxes of a run did on the network, decision by decision."""

from __future__ import annotations

import asyncio

from google.protobuf.json_format import MessageToDict

from voidbox.cli.connection import Context, Stack
from voidbox.cli.interrupts import until_interrupted
from voidbox.cli.runs import run_with_stage
from voidbox.cli.screen import safe, size
from voidbox.common.v1 import common_pb2
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb


def egress_command(context: Context) -> int:
    """Print the decisions of the gateways of a run's boxes."""
    return asyncio.run(_log(context, context.stack()))


async def _log(context: Context, stack: Stack) -> int:
    args = context.args

    async def show() -> None:
        async with stack.connect() as client:
            run = await run_with_stage(client, args.run, args.stage)
            async for event in client.watch_run(run.id, follow=args.follow):
                if event.WhichOneof("event") != "egress" or args.stage not in (None, event.stage):
                    continue
                if args.denied and event.egress.allowed:
                    continue
                if context.screen.json:
                    fields = MessageToDict(event.egress, preserving_proto_field_name=True)
                    context.screen.data({"stage": event.stage, **fields})
                else:
                    print(safe(line(event)), flush=True)

    return await until_interrupted(show())


def line(event: pb.Event) -> str:
    """One decision in one line."""
    one = event.egress
    at = one.time.ToDatetime().strftime("%H:%M:%S.%f")[:-3]
    mark = "closed" if one.kind == "closed" else "allowed" if one.allowed else "DENIED"
    kind = one.detail.get("protocol", one.kind)
    words = [at, event.stage, f"{mark:7}", f"{'' if one.kind == 'closed' else kind:5}", target(one)]
    if one.kind == "closed":
        seconds = one.duration.seconds + one.duration.nanos / 1e9
        words.append(f"sent {size(one.sent_bytes)}, received {size(one.received_bytes)} in {seconds:.2f} s")
    elif one.rule and one.allowed:
        words.append(f"({one.rule})")
    if one.reason:
        words.append(f"- {one.reason}")
    return "  ".join(words)


def target(one: common_pb2.EgressEvent) -> str:
    """Where it went: the name if there is one, the address, and the port."""
    where = one.name or one.address
    if one.name and one.address and one.name != one.address:
        where = f"{one.name} [{one.address}]"
    return f"{where} port {one.port}" if one.port else where
