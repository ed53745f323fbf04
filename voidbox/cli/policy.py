"""`voidbox policy explain` and `learn`: what a spec's network policy does, and which one a run would need."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from urllib.parse import urlsplit

from services.common.egress.addresses import Address, parse_address
from services.common.egress.names import normalize
from services.common.egress.policy import Decision, Policy, Protocol, decide, decide_name
from services.common.errors import InvalidInput, NotFound
from voidbox.cli.connection import Context, Stack
from voidbox.cli.exitcode import ExitCode
from voidbox.cli.submit import read
from voidbox.common.v1 import common_pb2
from voidbox.spec.models import Spec
from voidbox.spec.network import policy_of

_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443, "ssh": 22, "git": 9418, "ftp": 21}
_HOST = ("10.0.2.2", "fd00:0:0:2::2", "host.voidbox.internal", "host.docker.internal")
# What a name is explained with: any public address would do.
_PUBLIC = parse_address("1.0.0.1")


def policy_command(context: Context) -> int:
    """Explain a policy, or print one."""
    if context.args.policy_command == "learn":
        return asyncio.run(_learn(context, context.stack()))
    policy = _policy(read(context.args.file).spec, context.args.stage)
    found = explain(policy, context.args.url)
    verb = "allowed" if found.allowed else "denied"
    text = f"{verb}: {context.args.url}"
    if found.rule:
        text += f"\n  rule: {found.rule}"
    if found.reason:
        text += f"\n  why:  {found.reason}"
    context.screen.result(text, {"allowed": found.allowed, "rule": found.rule, "reason": found.reason})
    return ExitCode.OK if found.allowed else ExitCode.WORKLOAD


def _policy(spec: Spec, stage: str | None) -> Policy | None:
    network, llm = spec.sandbox.network, spec.llm
    if stage is not None:
        boxes = {box.name: box for box in (spec.pipeline.boxes if spec.pipeline is not None else ())}
        if stage not in boxes:
            raise NotFound(
                f"the spec has no box {stage!r}" + (f"; it has: {', '.join(boxes)}" if boxes else ""),
                reason="STAGE_NOT_FOUND",
            )
        network = boxes[stage].sandbox.network or network
        llm = boxes[stage].llm or llm
    return policy_of(network, llm)


def explain(policy: Policy | None, url: str) -> Decision:
    """What the gateway would decide for a URL, or a name or address with or without a port.

    Raises:
        InvalidInput: it is none of these.
    """
    if policy is None:
        return Decision(
            allowed=False, rule="sandbox.network", reason="the box has no network device; set sandbox.network"
        )
    scheme, host, port = _parts(url)
    protocol: Protocol = "udp" if scheme == "udp" else "tcp"
    if host in _HOST:
        allowed = port in policy.host_ports
        why = (
            ""
            if allowed
            else f"port {port} of the host is not declared; add it to sandbox.network.host_ports"
        )
        return Decision(allowed=allowed, rule=f"host_ports {port}" if allowed else "default", reason=why)
    try:
        return decide(policy, parse_address(host), port, protocol=protocol)
    except ValueError:
        pass
    try:
        name = normalize(host)
    except ValueError as error:
        raise InvalidInput(f"{url!r}: {error}", reason="BAD_URL") from error
    asked = decide_name(policy, name)
    if not asked.allowed:
        return asked
    rule = asked.matched
    address: Address = rule.addresses[0].network_address if rule and rule.addresses else _PUBLIC
    return decide(policy, address, port, names={name}, claimed=name, protocol=protocol)


def _parts(url: str) -> tuple[str, str, int]:
    try:
        parts = urlsplit(url if "://" in url else f"https://{url}")
        port = parts.port
    except ValueError as error:
        raise InvalidInput(f"{url!r}: {error}", reason="BAD_URL") from error
    if not parts.hostname:
        raise InvalidInput(f"{url!r} names no host", reason="BAD_URL")
    if port is None:
        port = _PORTS.get(parts.scheme)
    if port is None:
        raise InvalidInput(f"{url!r}: which port? write it, like tcp://name:5432", reason="BAD_URL")
    return parts.scheme, parts.hostname, port


async def _learn(context: Context, stack: Stack) -> int:
    args = context.args
    async with stack.connect() as client:
        run = await client.get_run(args.run)
        seen = [
            event.egress
            async for event in client.watch_run(run.id, follow=False)
            if event.WhichOneof("event") == "egress" and args.stage in (None, event.stage)
        ]
    rules, ports = needed(seen)
    lines = ["sandbox:", "  network:"]
    if rules:
        lines += ["    allow:", *(f'      - "{rule}"' for rule in rules)]
    if ports:
        lines.append(f"    host_ports: [{', '.join(map(str, ports))}]")
    text = "\n".join(lines) if rules or ports else f"# run {run.id} asked for nothing on the network"
    context.screen.result(text, {"allow": rules, "host_ports": ports})
    return ExitCode.OK


def needed(events: Iterable[common_pb2.EgressEvent]) -> tuple[list[str], list[int]]:
    """The rules, and ports of the host, that connections in a log need; names rather than addresses."""
    targets: dict[tuple[str, str], set[int]] = {}
    host_ports: set[int] = set()
    for event in events:
        if event.kind not in ("tcp", "udp") or not event.port:
            continue
        if event.address in _HOST:
            host_ports.add(event.port)
            continue
        scheme = "udp://" if event.kind == "udp" else ""
        name = event.name or event.address
        targets.setdefault((scheme, f"[{name}]" if ":" in name else name), set()).add(event.port)
    rules = [
        f"{scheme}{name}:{','.join(map(str, sorted(found)))}" for (scheme, name), found in targets.items()
    ]
    return sorted(rules), sorted(host_ports)
