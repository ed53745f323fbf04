"""`voidbox exec`: one program in a fresh box, as if it ran here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from services.common.errors import (
    Cancelled,
    Exhausted,
    InvalidInput,
    NotFound,
    TimedOut,
    Unavailable,
    VoidboxError,
)
from voidbox.cli import program, terminal
from voidbox.cli.boxes import find_box
from voidbox.cli.changes import tell_kept
from voidbox.cli.connection import Context, Stack
from voidbox.cli.exitcode import ExitCode
from voidbox.cli.progress import describe
from voidbox.cli.view import RUN_ENDED, RunView, run_state
from voidbox.client import Client
from voidbox.execution import Execution
from voidbox.guest.v1 import guest_pb2
from voidbox.imager.v1 import imager_pb2
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb
from voidbox.spec.bind import resolve_image

# A client that was killed leaves no box behind; longer than the time we try to reconnect.
ORPHAN_SECONDS = 30.0
# What is passed on to the program instead of ending us.
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# A program that ignores Ctrl-C is left alone after this many.
PATIENCE = 3


def exec_command(context: Context) -> int:
    """Run a program in a box; exits with its code, or one of `ExitCode.EXEC_*`."""
    args = context.args
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    try:
        _check(context, argv)
        return asyncio.run(_Session(context, context.stack(), argv).run())
    except VoidboxError as error:
        code = _code(error)
        context.screen.error(error, code)
        return code


def _check(context: Context, argv: list[str]) -> None:
    """Everything that can be said without a stack."""
    args = context.args
    program.environment(args.env, os.environ)
    program.mounts(args.mount, Path.cwd())
    program.volumes(args.volume)
    if not argv and (not args.image or args.entrypoint == ""):
        program.start(args, argv, os.environ, None, None)
    if args.tty and not os.isatty(0):
        raise InvalidInput(
            "-t needs a terminal, but standard input is none; leave out -t", reason="NO_TERMINAL"
        )
    if args.target:
        fresh = {
            "--image": args.image,
            "--entrypoint": args.entrypoint,
            "--pull": args.pull,
            "--memory-mb": args.memory_mb,
            "--vcpus": args.vcpus,
            "--disk-mb": args.disk_mb,
            "--mount": args.mount,
            "--volume": args.volume,
        }
        for option, value in fresh.items():
            if value:
                raise InvalidInput(
                    f"{option} is for a fresh box; leave it out with --in", reason="BAD_OPTION"
                )


def _code(error: VoidboxError) -> ExitCode:
    if error.reason in ("PROGRAM_NOT_FOUND", "INTERPRETER_NOT_FOUND"):
        return ExitCode.EXEC_NOT_FOUND
    if error.reason in ("NOT_EXECUTABLE", "EXEC_FORMAT"):
        return ExitCode.EXEC_NOT_EXECUTABLE
    return ExitCode.EXEC_FAILED


class _Session:
    """One `voidbox exec`."""

    def __init__(self, context: Context, stack: Stack, argv: list[str]) -> None:
        self._context = context
        self._args = context.args
        self._stack = stack
        self._argv = argv
        self._signals: asyncio.Queue[int] = asyncio.Queue()
        self._interrupted = 0
        self._running: Execution | None = None

    async def run(self) -> int:
        """From the connection to the program's exit code."""
        with self._caught_signals():
            async with self._stack.connect() as client:
                work = asyncio.create_task(self._work(client), name="exec")
                dispatcher = asyncio.create_task(self._dispatch(work), name="signals")
                try:
                    return await work
                except asyncio.CancelledError:
                    if not self._interrupted:
                        raise
                    return 128 + self._interrupted
                finally:
                    dispatcher.cancel()
                    await asyncio.gather(dispatcher, return_exceptions=True)

    async def _work(self, client: Client) -> int:
        if self._args.target:
            return await self._program(client, await find_box(client, self._args.target), None)
        async with self._box(client) as box_id:
            config = None
            if self._args.image:
                reference = resolve_image(self._args.image, str(Path.cwd()))
                config = (await client.get_image(reference)).config
            return await self._program(client, box_id, config)

    @contextlib.asynccontextmanager
    async def _box(self, client: Client) -> AsyncIterator[str]:
        """A fresh box; gone afterwards, unless it is to be kept."""
        run_id = f"exec-{secrets.token_hex(5)}"
        request = pb.CreateRunRequest(
            run_id=run_id,
            spec=pb.SpecDocument(
                content=program.sandbox_spec(self._args, os.environ, Path.cwd()), filename="exec.json"
            ),
            base_directory=str(Path.cwd()),
        )
        request.options.cold_boot = self._args.cold
        if not self._args.keep:
            request.options.orphan_timeout.FromNanoseconds(int(ORPHAN_SECONDS * 1e9))
        keep = False
        watcher: asyncio.Task[pb.Run] | None = None
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        try:
            run = await client.create_run(request)
            watcher = asyncio.create_task(self._watch(client, run, ready), name="watch box")
            yield await ready
            keep = self._args.keep
        finally:
            if keep:
                self._context.screen.note(
                    f"the box is kept: voidbox exec --in {run_id} -- PROGRAM; end it: voidbox stop {run_id}"
                )
            else:
                await asyncio.shield(self._remove(client, run_id))
            ready.cancel()
            if watcher is not None:
                watcher.cancel()
                await asyncio.gather(watcher, ready, return_exceptions=True)

    async def _watch(self, client: Client, run: pb.Run, ready: asyncio.Future[str]) -> pb.Run:
        """Keep the run ours by watching it; tells when its box is there, or why it will not be."""
        view = RunView(run)
        try:
            async for event in client.watch_run(run.id):
                for _ in view.apply(event):
                    self._progress(view)
                if event.WhichOneof("event") != "stage_state" or ready.done():
                    continue
                stage = event.stage_state.stage
                if stage.state == pb.STAGE_STATE_RUNNING:
                    self._progress(None)
                    ready.set_result(stage.box_id)
            run = await client.get_run(run.id)
            raise _why(run)
        except VoidboxError as error:
            self._progress(None)
            if not ready.done():
                ready.set_exception(error)
            return run

    def _progress(self, view: RunView | None) -> None:
        """One line that says what is being waited for, wiped when it is there."""
        if self._context.screen.live:
            stages = list(view.stages.values()) if view else []
            text = f"{describe(stages[0])} …" if stages else ""
            print(f"\r\x1b[K{self._context.screen.paint(text, 'dim')}", end="", file=sys.stderr, flush=True)

    async def _remove(self, client: Client, run_id: str) -> None:
        """End the box and forget the run; best effort, the orphan limit stands behind it."""
        try:
            async with asyncio.timeout(60):
                run = await client.cancel_run(run_id, "its program has ended")
                if run.state not in RUN_ENDED:
                    await client.wait_run(run_id)
                overlays = any(option.endswith(":overlay") for option in self._args.mount)
                if overlays and await tell_kept(self._context, client, run_id):
                    return
                await client.delete_run(run_id)
        except NotFound:
            return
        except (VoidboxError, TimeoutError) as error:
            self._context.screen.note(f"warning: the box of run {run_id} may still be there: {error}")

    async def _program(self, client: Client, box_id: str, config: imager_pb2.ImageConfig | None) -> int:
        screen = None
        if self._args.tty:
            columns, rows = terminal.window_size(0)
            screen = guest_pb2.Terminal(columns=columns, rows=rows, term=os.environ.get("TERM", ""))
        start = program.start(self._args, self._argv, os.environ, config, screen)
        feed = self._args.interactive or self._args.tty or terminal.is_piped()
        raw = terminal.raw_terminal(0) if self._args.tty else contextlib.nullcontext()
        async with client.execute(box_id, start, terminal.read_stdin() if feed else None) as running:
            self._running = running
            try:
                with raw:
                    async for output in running.output():
                        await terminal.write_all(2 if output.stderr else 1, output.data)
            finally:
                self._running = None
            return self._end(running.exit)

    def _end(self, how: guest_pb2.ExecExit) -> int:
        if how.kill_reason == guest_pb2.KILL_REASON_TIMEOUT:
            self._context.screen.note(
                f"error: the program was killed after {self._args.timeout:g} s (--timeout)"
            )
            return ExitCode.EXEC_TIMEOUT
        if how.kill_reason == guest_pb2.KILL_REASON_OUT_OF_MEMORY:
            self._context.screen.note("error: the box ran out of memory; give it more: --memory-mb")
        return 128 + how.signal if how.signal else how.exit_code

    @contextlib.contextmanager
    def _caught_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = [*FORWARDED, *((signal.SIGWINCH,) if self._args.tty else ())]
        for number in numbers:
            loop.add_signal_handler(number, self._signals.put_nowait, int(number))
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    async def _dispatch(self, work: asyncio.Task[int]) -> None:
        """Signals are for the program while it runs; before and after, they are for us."""
        interrupts = 0
        while True:
            number = await self._signals.get()
            if self._running is None:
                if number != signal.SIGWINCH:
                    self._interrupted = number
                    work.cancel()
                continue
            if number == signal.SIGWINCH:
                self._running.resize(*terminal.window_size(0))
                continue
            interrupts += number == signal.SIGINT
            if interrupts > PATIENCE:
                self._context.screen.note("the program does not end; killing it")
            self._running.signal(signal.SIGKILL if interrupts > PATIENCE else number)


def _why(run: pb.Run) -> VoidboxError:
    """Why a run has no box (any more)."""
    reasons = [stage.reason for stage in run.stages if stage.reason]
    message = (reasons or [run.reason or f"the run is {run_state(run.state)}"])[0]
    kinds: dict[int, type[VoidboxError]] = {
        pb.FAILURE_CLASS_INPUT: InvalidInput,
        pb.FAILURE_CLASS_TIMEOUT: TimedOut,
        pb.FAILURE_CLASS_CANCELLED: Cancelled,
        pb.FAILURE_CLASS_EXHAUSTED: Exhausted,
    }
    return kinds.get(run.failure_class, Unavailable)(message, reason="NO_BOX", run=run.id)
