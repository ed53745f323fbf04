"""Between the messages of credentials and budgets and what is inside."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from services.common.egress.names import normalize_pattern
from services.common.errors import InvalidInput
from services.hypervisor.egress.budget import Budget
from services.hypervisor.egress.credential import Credential, Interceptions
from services.hypervisor.egress.rules import Placement
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

MAX_CREDENTIALS = 64
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LAYOUTS = ("plain", "claude", "codex")


def read_interceptions(message: pb.BoxConfig) -> str:
    """The credentials, metered hosts and budget of a box, as its record keeps them; empty without any.

    Raises:
        InvalidInput: a part that cannot be; the message names the field.
    """
    if not (message.credentials or message.metered_hosts):
        if message.HasField("budget"):
            raise InvalidInput("a budget needs metered_hosts", field="budget")
        return ""
    if not message.egress.enabled:
        raise InvalidInput("credentials and metered_hosts need a network: enable egress", field="egress")
    if len(message.credentials) > MAX_CREDENTIALS:
        raise InvalidInput(f"more than {MAX_CREDENTIALS} credentials", field="credentials")
    credentials = tuple(_read(one, f"credentials[{at}]") for at, one in enumerate(message.credentials))
    names = [one.name for one in credentials]
    for name in names:
        if names.count(name) > 1:
            raise InvalidInput(f"two credentials are named {name!r}", field="credentials")
    budget = message.budget
    for limit in ("max_requests", "max_tokens", "max_cost_micros"):
        if getattr(budget, limit) < 0:
            raise InvalidInput(f"budget.{limit} is negative", field=f"budget.{limit}")
    return Interceptions(
        credentials=credentials,
        metered=tuple(_host(host, "metered_hosts") for host in message.metered_hosts),
        budget=Budget(
            requests=budget.max_requests,
            tokens=budget.max_tokens,
            usd=budget.max_cost_micros / 1e6,
            action="pause" if budget.pause else "stop",
        ),
    ).to_json()


def _read(message: pb.Credential, where: str) -> Credential:
    if not _NAME.fullmatch(message.name):
        raise InvalidInput(f"{where}: {message.name!r} is not a name: a-z, 0-9 and '-'", field=where)
    if not message.hosts:
        raise InvalidInput(f"{where}: name the hosts that it is for", field=f"{where}.hosts")
    for port in message.ports:
        if not 1 <= port <= 65535:
            raise InvalidInput(f"{where}.ports: {port} is not 1 to 65535", field=f"{where}.ports")
    for path in message.paths:
        if not path.startswith("/"):
            raise InvalidInput(f"{where}.paths: {path!r} does not begin with '/'", field=f"{where}.paths")
    for name in message.env:
        if not _VARIABLE.fullmatch(name):
            raise InvalidInput(f"{where}.env: {name!r} is no variable's name", field=f"{where}.env")
    fields: dict[str, Any] = {}
    placement = message.WhichOneof("placement")
    if placement == "header":
        name, colon, value = message.header.partition(":")
        if not colon:
            raise InvalidInput(f"{where}.header: {message.header!r} is not 'Name: value'", field=where)
        fields = {"placement": Placement.HEADER, "key": name.strip(), "format": value.strip()}
    elif placement == "basic_user":
        fields = {"placement": Placement.BASIC, "key": message.basic_user}
    elif placement == "query_parameter":
        fields = {"placement": Placement.QUERY, "key": message.query_parameter}
    credential = Credential(
        name=message.name,
        hosts=tuple(_host(host, f"{where}.hosts") for host in message.hosts),
        ports=tuple(message.ports),
        paths=tuple(message.paths),
        plain=message.plain,
        env=dict(message.env),
        source=_source(message, where),
        **fields,
    )
    try:
        credential.rule()
    except ValueError as error:
        raise InvalidInput(f"{where}: {error}", field=where) from error
    return credential


def _source(message: pb.Credential, where: str) -> dict[str, Any]:
    kind = message.WhichOneof("source")
    if kind == "value":
        if not message.value:
            raise InvalidInput(f"{where}: the value is empty", field=f"{where}.value")
        return {"value": message.value}
    if kind == "file":
        return {"file": _path(message.file, f"{where}.file")}
    if kind == "command":
        if not message.command.argv:
            raise InvalidInput(f"{where}.command: which program?", field=f"{where}.command")
        return {"command": list(message.command.argv)}
    if kind == "keyring":
        if not message.keyring.service:
            raise InvalidInput(f"{where}.keyring: which service?", field=f"{where}.keyring")
        return {"keyring": {"service": message.keyring.service, "user": message.keyring.user}}
    if kind == "login":
        login, url = message.login, urlsplit(message.login.token_url)
        if login.layout not in _LAYOUTS:
            raise InvalidInput(
                f"{where}.login: layout {login.layout!r} is not {', '.join(_LAYOUTS)}", field=where
            )
        if url.scheme != "https" or not url.hostname:
            raise InvalidInput(f"{where}.login: token_url is no https URL", field=where)
        return {
            "oauth": {
                "file": _path(login.file, f"{where}.login"),
                "layout": login.layout,
                "url": login.token_url,
                "client_id": login.client_id,
            }
        }
    raise InvalidInput(f"{where}: where does the host have it? Give a source", field=where)


def _path(path: str, field: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise InvalidInput(f"{field}: {path!r} is not an absolute path", field=field)
    return path


def _host(host: str, field: str) -> str:
    try:
        pattern = normalize_pattern(host)
    except ValueError as error:
        raise InvalidInput(f"{field}: {error}", field=field) from error
    if pattern == "*":
        raise InvalidInput(f"{field}: name the hosts; '*' is all of them", field=field)
    return pattern


def write_interceptions(text: str, message: pb.BoxConfig) -> None:
    """Put them into a box's message, without where credentials come from."""
    found = Interceptions.from_json(text)
    for one in found.credentials:
        made = message.credentials.add(
            name=one.name, hosts=one.hosts, ports=one.ports, paths=one.paths, env=one.env, plain=one.plain
        )
        if one.placement is Placement.HEADER:
            made.header = f"{one.key}: {one.format}"
        elif one.placement is Placement.BASIC:
            made.basic_user = one.key
        else:
            made.query_parameter = one.key
    message.metered_hosts.extend(found.metered)
    budget = found.budget
    if budget != Budget():
        message.budget.max_requests = budget.requests
        message.budget.max_tokens = budget.tokens
        message.budget.max_cost_micros = round(budget.usd * 1e6)
        message.budget.pause = budget.action == "pause"
