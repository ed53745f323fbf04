"""Who may call the guest agent, and how it fails: every RPC of the service, by its descriptor.

A real agent and its PID 1 run as ordinary processes; see `guest_process`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import symbol_database
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from guest.rpc import SECRET_KEY
from tests.contract.guest_process import (
    METADATA,
    SECRET,
    AgentProcess,
    alive,
    duration,
    events,
    reason,
    wait_gone,
)
from voidbox.guest.v1 import guest_pb2 as pb

METHODS = pb.DESCRIPTOR.services_by_name["GuestService"].methods
BEFORE_CLAIM = {"Claim", "GetGuest"}
NOT_BUILT = {"WatchFiles"}
assert symbol_database is not None


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    """A fresh agent, not claimed."""
    with AgentProcess() as process:
        yield process


async def call(channel: aio.Channel, method: Any, request: Message, metadata: Any = ()) -> Any:
    """Make any call with one request and return its first response."""
    path = f"/voidbox.guest.v1.GuestService/{method.name}"
    encode, decode = type(request).SerializeToString, GetMessageClass(method.output_type).FromString
    shape = (method.client_streaming, method.server_streaming)
    make = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[shape]
    multi: Any = make(path, request_serializer=encode, response_deserializer=decode)
    sent = multi(iter([request]) if method.client_streaming else request, metadata=metadata, timeout=20)
    if method.server_streaming:
        async for response in sent:
            return response
        return None
    return await sent


async def failure(channel: aio.Channel, method: Any) -> aio.AioRpcError | None:
    """How a call with an empty request fails, if it does."""
    try:
        await call(channel, method, GetMessageClass(method.input_type)(), METADATA)
    except aio.AioRpcError as error:
        return error
    return None


async def test_before_the_claim_only_claim_and_getguest_are_answered(agent: AgentProcess) -> None:
    async with agent.client(claim=False) as client:
        for method in METHODS:
            if method.name in BEFORE_CLAIM:
                continue
            for metadata in ((), METADATA):
                with pytest.raises(aio.AioRpcError) as caught:
                    await call(client.channel, method, GetMessageClass(method.input_type)(), metadata)
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION, method.name
                assert reason(caught.value).reason == "UNCLAIMED"


async def test_after_the_claim_every_call_needs_the_secret(agent: AgentProcess) -> None:
    wrong = [
        (),
        (("voidbox-secret-bin", bytes(32)),),
        (("voidbox-secret-bin", SECRET[:-1]),),
        (("voidbox-secret-bin", b""),),
        (("voidbox-secret-bin", SECRET), ("voidbox-secret-bin", bytes(32))),
        (("voidbox-secret", SECRET.hex()),),
    ]
    async with agent.client() as client:
        for method in METHODS:
            if method.name == "Claim":
                continue
            for metadata in wrong:
                with pytest.raises(aio.AioRpcError) as caught:
                    await call(client.channel, method, GetMessageClass(method.input_type)(), metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, method.name
                info = reason(caught.value)
                assert info.reason == "BAD_SECRET"
                assert SECRET.hex() not in str(caught.value.details())


async def test_an_empty_request_of_every_method_is_answered_or_explained(agent: AgentProcess) -> None:
    """No method is missing from the servicer, and none answers UNKNOWN or INTERNAL to a hollow request."""
    async with agent.client() as client:
        for method in METHODS:
            if method.name == "Shutdown":
                continue
            error = await failure(client.channel, method)
            if error is not None:
                built = method.name not in NOT_BUILT
                assert (error.code() is grpc.StatusCode.UNIMPLEMENTED) != built, (method.name, error)
                assert error.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), (
                    method.name,
                    error,
                )
                info = reason(error)
                assert (info.reason == "NOT_IMPLEMENTED") != built
                assert error.details()


async def test_a_second_claim_needs_the_secret_in_force(agent: AgentProcess) -> None:
    async with agent.client() as client:
        with pytest.raises(aio.AioRpcError) as caught:
            await client.stub.Claim(pb.ClaimRequest(secret=bytes(32)))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert reason(caught.value).reason == "CLAIMED"
        # A caller that knows it may make the box somebody else, whom only the new secret reaches.
        other = ((SECRET_KEY, bytes(32)),)
        await client.stub.Claim(pb.ClaimRequest(secret=bytes(32)), metadata=METADATA)
        await client.stub.GetGuest(pb.GetGuestRequest(), metadata=other)
        with pytest.raises(aio.AioRpcError) as caught:
            await client.stub.GetGuest(pb.GetGuestRequest(), metadata=METADATA)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        await client.stub.Claim(pb.ClaimRequest(secret=dict(METADATA)[SECRET_KEY]), metadata=other)
        await client.claim(env={"AGAIN": "1"})
        result = await client.sh("printf %s $AGAIN")
        assert result.stdout == b"1"


@pytest.mark.parametrize(
    "fields",
    [
        {"secret": b""},
        {"secret": bytes(31)},
        {"hostname": "a" * 64},
        {"hostname": "-x"},
        {"hostname": "a.b\n"},
        {"machine_id": bytes(15)},
        {"entropy": bytes(31)},
        {"entropy": bytes(513)},
        {"root_disk": pb.RootDisk(serial="../sda")},
        {"root_disk": pb.RootDisk(serial="x" * 21)},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_a_malformed_claim_claims_nothing(agent: AgentProcess, fields: dict[str, Any]) -> None:
    async with agent.client(claim=False) as client:
        with pytest.raises(aio.AioRpcError) as caught:
            await client.stub.Claim(pb.ClaimRequest(**({"secret": SECRET} | fields)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert next(iter(fields)) in str(caught.value.details())
        assert not (await client.stub.GetGuest(pb.GetGuestRequest())).claimed


async def test_a_machine_that_is_not_ours_confirms_nothing_of_it(agent: AgentProcess) -> None:
    async with agent.client(claim=False) as client:
        answer = await client.claim(hostname="other", machine_id=bytes(16), entropy=bytes(32))
        changed = (answer.hostname_set, answer.machine_id_set, answer.clock_set, answer.entropy_added)
        assert not any(changed)
        guest = await client.stub.GetGuest(pb.GetGuestRequest(), metadata=METADATA)
        assert guest.claimed
        assert guest.boot_id == answer.boot_id
        assert guest.uptime.seconds > 0


async def test_health_needs_no_secret_and_knows_the_service(agent: AgentProcess) -> None:
    async with agent.client() as client:
        stub: Any = health_pb2_grpc.HealthStub(client.channel)
        for name in ("", "voidbox.guest.v1.GuestService"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_reflection_and_channelz_need_the_secret(agent: AgentProcess) -> None:
    async with agent.client() as client:
        channel: Any = client.channel
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        channelz: Any = channelz_pb2_grpc.ChannelzStub(channel)
        question = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="voidbox.guest.v1.GuestService"),
        ]
        for metadata in ((), (("voidbox-secret-bin", bytes(32)),)):
            with pytest.raises(aio.AioRpcError) as caught:
                await reflection.ServerReflectionInfo(iter(question), metadata=metadata).read()
            assert reason(caught.value).reason == "BAD_SECRET"
            with pytest.raises(aio.AioRpcError) as caught:
                await channelz.GetServers(channelz_pb2.GetServersRequest(), metadata=metadata)
            assert reason(caught.value).reason == "BAD_SECRET"
        answers = reflection.ServerReflectionInfo(iter(question), metadata=METADATA)
        listed = {one.name for one in (await answers.read()).list_services_response.service}
        assert {
            "voidbox.guest.v1.GuestService",
            "grpc.health.v1.Health",
            "grpc.channelz.v1.Channelz",
        } <= listed
        assert (await answers.read()).file_descriptor_response.file_descriptor_proto
        servers = await channelz.GetServers(channelz_pb2.GetServersRequest(), metadata=METADATA)
        assert len(servers.server) == 1


async def test_telemetry_counts_up_and_knows_the_exec_of_a_process(agent: AgentProcess) -> None:
    async with agent.client() as client:
        call, started = await client.exec("sleep", "60", exec_id="measured")
        request = pb.TelemetryRequest(interval=duration(0.1), processes=True)
        stream = client.stub.Telemetry(request, metadata=METADATA)
        samples = [await stream.read() for _ in range(3)]
        stream.cancel()
        call.cancel()
        assert [one.sequence for one in samples] == [0, 1, 2]
        last = samples[-1]
        assert 0 < last.memory_available_bytes <= last.memory_total_bytes
        assert last.agent_memory_bytes > 10 << 20
        assert last.process_count == len(last.processes) >= 3
        assert last.cpu_time.seconds > 0
        [own] = [one for one in last.processes if one.pid == started.pid]
        assert own.name == "sleep"
        assert own.exec_id == ("measured" if agent.cgroup else "")
        await client.stub.SignalExec(pb.SignalExecRequest(exec_id="measured", signal=9), metadata=METADATA)
        wait_gone(started.pid)


async def test_connect_carries_a_connection_both_ways_with_half_close(agent: AgentProcess) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read()  # to the half-close
        writer.write(data[::-1])
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    data = bytes(range(256)) * 2000
    async with server, agent.client() as client:

        async def requests() -> Any:
            yield pb.ConnectRequest(open=pb.ConnectOpen(port=port))
            for start in range(0, len(data), 65536):
                yield pb.ConnectRequest(data=data[start : start + 65536])

        stream = client.stub.Connect(requests(), metadata=METADATA)
        answers = [answer.data async for answer in stream]
        assert answers[0] == b""
        assert b"".join(answers) == data[::-1]
    async with agent.client() as client:
        with pytest.raises(aio.AioRpcError) as caught:
            await client.stub.Connect(
                iter([pb.ConnectRequest(open=pb.ConnectOpen(port=port))]), metadata=METADATA
            ).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason(caught.value).reason == "NOTHING_LISTENS"


async def test_shutdown_ends_programs_before_it_answers_and_the_machine_after(agent: AgentProcess) -> None:
    async with agent.client() as client:
        call, _ = await client.exec("sh", "-c", "trap '' TERM; echo up; sleep 600", exec_id="stubborn")
        await call.read()
        await client.stub.Shutdown(pb.ShutdownRequest(grace=duration(0.2)), metadata=METADATA)
        seen = [event async for event in events(call)]
        assert seen[-1].exit.signal == 9
    assert agent.process.wait(10) == 0


async def test_a_dead_agent_comes_back_with_its_identity(agent: AgentProcess) -> None:
    async with agent.client() as client:
        await client.claim(env={"KEPT": "yes"})
        _, started = await client.exec("sleep", "600", exec_id="survivor")
        first = agent.agent_pid()
        os.kill(first, signal.SIGKILL)
        wait_gone(first)
    async with agent.client(claim=False) as client:
        guest = await client.stub.GetGuest(pb.GetGuestRequest(), metadata=METADATA)
        assert guest.claimed
        assert agent.agent_pid() != first
        assert (await client.sh("printf %s $KEPT")).stdout == b"yes"
        # Its programs live on, can be named and ended; only their streams are gone.
        assert alive(started.pid)
        listed = await client.stub.ListExecs(pb.ListExecsRequest(), metadata=METADATA)
        assert next((one.exec_id, one.pid) for one in listed.execs) == ("survivor", started.pid)
        opening = iter([pb.AttachRequest(open=pb.AttachOpen(exec_id="survivor"))])
        with pytest.raises(aio.AioRpcError) as caught:
            await client.stub.Attach(opening, metadata=METADATA).read()
        assert reason(caught.value).reason == "OUTPUT_LOST"
        await client.stub.SignalExec(pb.SignalExecRequest(exec_id="survivor", signal=9), metadata=METADATA)
        wait_gone(started.pid)
        await client.sh("true")  # PID 1 tells of one end after the other
        listed = await client.stub.ListExecs(pb.ListExecsRequest(), metadata=METADATA)
        assert listed.execs[0].exit.signal == 9
    assert "has died" in agent.log_text()
