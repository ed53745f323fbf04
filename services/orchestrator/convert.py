"""Between the wire and what is inside: runs, stages, events, requests."""

from __future__ import annotations

import hashlib
from typing import Any

from google.protobuf import duration_pb2, timestamp_pb2

from services.common.errors import InvalidInput
from services.orchestrator import records as r
from voidbox.common.v1 import common_pb2
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb
from voidbox.spec.bind import guest_path_fault, resolve_path
from voidbox.spec.models import Kind, Mount, MountMode


def timestamp(seconds: float) -> timestamp_pb2.Timestamp | None:
    """Seconds since the epoch; None for 0, which leaves the field unset."""
    if not seconds:
        return None
    stamp = timestamp_pb2.Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp


def duration(seconds: float) -> duration_pb2.Duration:
    """A length of time in seconds."""
    value = duration_pb2.Duration()
    value.FromNanoseconds(int(seconds * 1e9))
    return value


def seconds_of(value: duration_pb2.Duration, name: str) -> float:
    """The length of `value` in seconds.

    Raises:
        InvalidInput: it is negative or not a valid duration.
    """
    seconds = value.seconds + value.nanos / 1e9
    if seconds < 0:
        raise InvalidInput(f"{name} must not be negative", reason="BAD_DURATION", field=name)
    return seconds


def digest_to_proto(digest: r.Digest) -> common_pb2.Digest:
    """A digest."""
    return common_pb2.Digest(value=digest.value, size_bytes=digest.size)


def kind_to_proto(kind: Kind) -> pb.RunKind.ValueType:
    """A kind."""
    return pb.RunKind.Value(f"RUN_KIND_{kind.name}")


def usage_to_proto(usage: r.Usage) -> pb.Usage:
    """A usage."""
    return pb.Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cost_usd=usage.cost_usd,
        tool_calls=usage.tool_calls,
        turns=usage.turns,
    )


def stage_to_proto(stage: r.Stage) -> pb.Stage:
    """A stage."""
    status, facts = stage.status, stage.facts
    return pb.Stage(
        name=stage.name,
        state=pb.StageState.Value(f"STAGE_STATE_{status.state}"),
        reason=status.reason,
        failure_class=pb.FailureClass.Value(f"FAILURE_CLASS_{status.failure_class}"),
        box_id=facts.box_id,
        depends_on=stage.depends_on,
        group=stage.group,
        attempts=status.attempts,
        start_time=timestamp(facts.start_time),
        end_time=timestamp(facts.end_time),
        exit_code=status.exit_code,
        usage=usage_to_proto(facts.usage),
        boot_id=facts.boot_id,
        phases=[pb.StagePhase(name=name, duration=duration(seconds)) for name, seconds in facts.phases],
        exec_id=facts.exec_id,
        kernel_release=facts.kernel_release,
    )


def run_to_proto(run: r.Run, *, brief: bool = False) -> pb.Run:
    """A run; brief: without spec and output."""
    message = pb.Run(
        id=run.id,
        name=run.name,
        kind=kind_to_proto(run.kind),
        state=pb.RunState.Value(f"RUN_STATE_{run.state}"),
        reason=run.reason,
        failure_class=pb.FailureClass.Value(f"FAILURE_CLASS_{run.failure_class}"),
        create_time=timestamp(run.create_time),
        end_time=timestamp(run.end_time),
        stages=[stage_to_proto(stage) for stage in run.stages],
        usage=usage_to_proto(run.usage),
        event_count=run.event_count,
    )
    if not brief:
        message.output = run.output
        message.output_truncated = run.output_truncated
        if run.request is not None:
            message.spec.content = run.request.spec
            message.spec.filename = run.request.filename
    return message


def artifact_to_proto(artifact: r.Artifact) -> pb.Artifact:
    """An artifact."""
    return pb.Artifact(
        stage=artifact.stage,
        name=artifact.name,
        digest=digest_to_proto(artifact.digest),
        tree=artifact.tree,
    )


def entry_to_bytes(time: float, stage: str, entry: r.Entry) -> bytes:
    """A log entry as it is stored: an `Event` without its offset."""
    event = pb.Event(time=timestamp(time), stage=stage)
    match entry:
        case r.RunMoved(state=state, reason=reason):
            event.run_state.state = pb.RunState.Value(f"RUN_STATE_{state}")
            event.run_state.reason = reason
        case r.StageMoved(stage=moved):
            event.stage_state.stage.CopyFrom(stage_to_proto(moved))
        case r.Output(stream=stream, offset=offset, data=data):
            event.output.stream = common_pb2.StdStream.ValueType(stream)
            event.output.stream_offset = offset
            event.output.data = data
        case r.Progress():
            event.progress.subject = entry.subject
            event.progress.action = entry.action
            event.progress.done = entry.done
            event.progress.total = entry.total
            event.progress.unit = entry.unit
        case r.Said(text=text):
            event.agent_message.text = text
        case r.ToolUsed(name=name, summary=summary):
            event.tool_call.name = name
            event.tool_call.summary = summary
        case r.Used(usage=usage):
            event.usage.CopyFrom(usage_to_proto(usage))
        case r.Stored(artifact=artifact):
            event.artifact.CopyFrom(artifact_to_proto(artifact))
        case r.Notice(text=text, warning=warning):
            level = pb.NOTICE_LEVEL_WARNING if warning else pb.NOTICE_LEVEL_INFO
            event.notice.level = level
            event.notice.text = text
        case r.Egress(data=data):
            event.egress.MergeFromString(data)
            event.time.CopyFrom(event.egress.time)
    return event.SerializeToString()


def event_from_bytes(offset: int, payload: bytes) -> pb.Event:
    """A stored entry with its offset put in."""
    event = pb.Event.FromString(payload)
    event.offset = offset
    return event


def request_from_proto(message: pb.CreateRunRequest) -> r.Request:
    """What a client asks to be run.

    Raises:
        InvalidInput: a field is missing or malformed; the message names it.
    """
    base = message.base_directory
    if base and not base.startswith("/"):
        raise InvalidInput("base_directory must be absolute", reason="BAD_PATH", field="base_directory")
    limit = message.options.max_parallel_boxes
    if not 0 <= limit <= 1000:
        raise InvalidInput("max_parallel_boxes must be 0 to 1000", field="options.max_parallel_boxes")
    return r.Request(
        spec=message.spec.content,
        filename=message.spec.filename or "spec.yaml",
        input=message.input,
        env=dict(message.env),
        files=tuple(_file(file, base) for file in message.files),
        mounts=tuple(_mount(mount) for mount in message.mounts),
        base_directory=base,
        options=r.Options(
            orphan_seconds=seconds_of(message.options.orphan_timeout, "options.orphan_timeout"),
            max_parallel=limit,
            timeout_seconds=seconds_of(message.options.timeout, "options.timeout"),
            cold_boot=message.options.cold_boot,
        ),
    )


def _file(message: pb.InputFile, base: str) -> r.InputFile:
    digest = message.digest.value
    hexadecimal = digest.removeprefix("sha256:")
    if len(hexadecimal) != 64 or set(hexadecimal) - set("0123456789abcdef") or digest == hexadecimal:
        raise InvalidInput(
            f"the digest of {message.path!r} is not 'sha256:' and 64 hex digits; use UploadInput's",
            reason="BAD_DIGEST",
            field="files.digest",
        )
    return r.InputFile(
        path=resolve_path(message.path, base),
        digest=r.Digest(value=digest, size=message.digest.size_bytes),
        tree=message.tree,
    )


def _mount(message: common_pb2.Mount) -> Mount:
    if not message.host_path.startswith("/"):
        raise InvalidInput(
            f"mount host path {message.host_path!r} must be absolute", field="mounts.host_path"
        )
    fault = guest_path_fault(message.guest_path)
    if fault:
        raise InvalidInput(f"mount of {message.host_path}: {fault}", field="mounts.guest_path")
    if message.mode == common_pb2.MOUNT_MODE_READ_WRITE:
        mode = MountMode.READ_WRITE
    elif message.mode in (common_pb2.MOUNT_MODE_UNSPECIFIED, common_pb2.MOUNT_MODE_READ_ONLY):
        mode = MountMode.READ_ONLY
    elif message.mode == common_pb2.MOUNT_MODE_OVERLAY:
        mode = MountMode.OVERLAY
    else:
        raise InvalidInput(f"mount of {message.host_path}: this mode is not available", field="mounts.mode")
    return Mount(host=message.host_path, guest=message.guest_path, mode=mode)


def request_digest(message: pb.CreateRunRequest) -> str:
    """Names the request, so that the same one again can be told from another."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()


def mount_to_proto(mount: Mount) -> common_pb2.Mount:
    """A mount."""
    mode: Any = {
        MountMode.READ_ONLY: common_pb2.MOUNT_MODE_READ_ONLY,
        MountMode.READ_WRITE: common_pb2.MOUNT_MODE_READ_WRITE,
        MountMode.OVERLAY: common_pb2.MOUNT_MODE_OVERLAY,
    }[mount.mode]
    return common_pb2.Mount(host_path=mount.host, guest_path=mount.guest, mode=mode)
