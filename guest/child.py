"""From `fork` to `execve`: how a child of PID 1 becomes a program.

Nothing here returns. What goes wrong is told through a close-on-exec pipe as
(stage, errno, path), so that the caller learns "no such program" from "no such
directory" from "not executable".
"""

from __future__ import annotations

import errno
import fcntl
import marshal
import os
import resource
import signal
import termios
from typing import NoReturn

from guest import cgroups, landlock, seccomp, syscalls
from guest.wire import Message

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OPEN_FILES = 65536
_HIGH = 64


class Failed(Exception):
    """One step failed; `args` are stage, errno and path."""


def become(request: Message, fds: list[int], status: int, namespace: int, cgroup: str) -> NoReturn:
    """Turn this freshly forked process into the program of `request`.

    Args:
        request: argv, env, cwd, default_cwd, make_cwd, uid, gid, groups, terminal, privileged, confine.
        fds: What becomes 0, 1 and 2.
        status: Write end of the pipe that failures go to.
        namespace: Mount namespace to enter, or -1.
        cgroup: Directory of the cgroup to join, or "".
    """
    # Out of the way of the program's own descriptors.
    status = fcntl.fcntl(status, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    try:
        _become(request, fds, status, namespace, cgroup)
    except Failed as failure:
        _tell(status, failure.args)
    except OSError as error:
        _tell(status, ("setup", error.errno or errno.EIO, str(error)))
    except BaseException as error:
        _tell(status, ("setup", errno.EIO, repr(error)))
    finally:
        os._exit(127)


def _become(request: Message, fds: list[int], status: int, namespace: int, cgroup: str) -> NoReturn:
    os.setsid()
    if request["privileged"]:
        # First of all: PID 1 and what it forks is exempt from the OOM killer.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("0")
    if cgroup:
        cgroups.join(cgroup)
    _reset_signals()
    # Above 2 first: a source may be one of 0, 1, 2.
    sources = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH) for fd in fds]
    for target, source in enumerate(sources):
        os.dup2(source, target, inheritable=True)
    if request["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    if namespace >= 0:
        syscalls.setns(namespace, syscalls.CLONE_NEWNS)
    _lower_limits(request["confine"])
    os.umask(0o022)
    if request["make_cwd"] and namespace >= 0:
        _make_directory(request["cwd"])
    if request["privileged"]:
        os.setgroups(request["groups"])
        os.setresgid(request["gid"], request["gid"], request["gid"])
        os.setresuid(request["uid"], request["uid"], request["uid"])
        syscalls.drop_capabilities()
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    _change_directory(request["cwd"], request["default_cwd"])
    os.closerange(3, status)
    os.closerange(status + 1, 1 << 20)
    _confine(request["confine"]["allowed"], request["env"].get("PATH", DEFAULT_PATH))
    _execute(request["argv"], request["env"])


def _reset_signals() -> None:
    # Python ignores SIGPIPE and SIGXFSZ, and an ignored signal stays ignored across execve.
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _lower_limits(confine: Message) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = confine["open_files"] or OPEN_FILES
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if confine["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (confine["file_size"], confine["file_size"]))


def _confine(allowed: list[str] | None, search: str) -> None:
    """Give up, for this program and all that it starts, what workloads have no use for."""
    try:
        if allowed is not None:
            landlock.restrict(allowed, search)
        seccomp.install(memfd=allowed is None)
    except OSError as error:
        raise Failed("confine", error.errno, error.strerror or str(error)) from error


def _make_directory(path: str) -> None:
    try:
        os.makedirs(path, 0o755, exist_ok=True)
    except FileExistsError:
        pass  # no directory: changing to it says so
    except OSError as error:
        raise Failed("directory", error.errno, path) from error


def _change_directory(path: str, default: bool) -> None:
    try:
        os.chdir(path)
    except OSError as error:
        if not default:
            raise Failed("directory", error.errno, path) from error
        os.chdir("/")


def _execute(argv: list[str], env: dict[str, str]) -> NoReturn:
    program = argv[0]
    denied = ""
    if "/" in program:
        candidates = [program]
    else:
        search = env.get("PATH", DEFAULT_PATH)
        candidates = [f"{directory or '.'}/{program}" for directory in search.split(":")]
    for candidate in candidates:
        try:
            os.execve(candidate, argv, env)  # noqa: S606 - argv is the caller's, and no shell is wanted
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                if os.path.exists(candidate) and error.errno == errno.ENOENT:
                    raise Failed("interpreter", error.errno, candidate) from error
                continue
            if error.errno == errno.EACCES:
                denied = denied or candidate
                continue
            raise Failed("program", error.errno, candidate) from error
    if denied:
        raise Failed("program", errno.EACCES, denied)
    raise Failed("program", errno.ENOENT, program)


def _tell(status: int, failure: tuple[object, ...]) -> None:
    os.write(status, marshal.dumps(failure))  # type: ignore[arg-type]
