"""Keeps out of boot time and memory what the agent's libraries load and it never uses.

Under emulation a millisecond of imports costs some forty, and every box pays. A module
that is left out is replaced by one that knows what its importers need at once, and loads
the real one the moment anything else is asked of it: nothing can break, it only comes
later.
"""

from __future__ import annotations

import importlib
import sys
import types
import typing

# inspect.CO_COROUTINE and its kin
_COROUTINE, _ASYNC_GENERATOR, _GENERATOR = 0x80, 0x200, 0x20


class _Later(types.ModuleType):
    """A module that becomes the real one when something unknown is asked of it."""

    def __init__(self, name: str, names: dict[str, object]) -> None:
        super().__init__(name)
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # the import system's own questions
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        real = importlib.import_module(self.__name__)
        self.__dict__.update({key: value for key, value in vars(real).items() if not key.startswith("__")})
        return getattr(real, name)


def _flagged(flag: int) -> typing.Callable[[object], bool]:
    def check(function: object) -> bool:
        while isinstance(function, types.MethodType):
            function = function.__func__
        return isinstance(function, types.FunctionType) and bool(function.__code__.co_flags & flag)

    return check


def _is_awaitable(value: object) -> bool:
    return isinstance(value, types.CoroutineType) or hasattr(value, "__await__")


def _extract_stack(*args: typing.Any, **named: typing.Any) -> object:
    """grpc imports this one by name."""
    module: typing.Any = sys.modules["traceback"]
    return module.StackSummary.extract(module.walk_stack(sys._getframe(1)), *args, **named)


def leave_out() -> None:
    """Put the replacements in place; before asyncio and grpc are imported."""
    import _datetime  # type: ignore[import-not-found]

    # asyncio would load OpenSSL for TLS that nothing here speaks; it copes without.
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    # datetime.py defines everything in Python, then takes the C versions instead.
    sys.modules.setdefault("datetime", _datetime)
    _place("inspect", iscoroutinefunction=_flagged(_COROUTINE), isasyncgenfunction=_flagged(_ASYNC_GENERATOR),
           isgeneratorfunction=_flagged(_GENERATOR), isawaitable=_is_awaitable,
           iscoroutine=lambda value: isinstance(value, types.CoroutineType),
           isgenerator=lambda value: isinstance(value, types.GeneratorType))  # fmt: skip
    _place("subprocess", PIPE=-1, STDOUT=-2, DEVNULL=-3)
    _place("traceback", extract_stack=_extract_stack)
    _place("linecache")
    _place("calendar")
    # logging's styles for format strings that nobody uses here.
    _place("string", Formatter=object, Template=object)
    # For annotations only.
    _place("typing_extensions", Self=typing.Any, override=lambda method: method)


def leave_out_pure_protobuf() -> None:
    """Spare protobuf's pure-Python implementation where the one in C is there.

    Raises:
        ImportError: there is only the pure-Python one.
    """
    from google.protobuf.internal import api_implementation

    if api_implementation.Type() != "upb":
        raise ImportError("protobuf without its C implementation")
    _place("google.protobuf.internal.python_message", GeneratedProtocolMessageType=type)


def _place(name: str, **names: object) -> None:
    if name in sys.modules:
        return
    sys.modules[name] = module = _Later(name, names)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
