"""Which frames of a box its gateway sees one by one: all that the redirecting rules do not take.

Classic BPF (packet(7), Documentation/networking/filter.rst): IP that is neither TCP nor UDP to port 53.
Neighbour discovery stays with the kernel, and the gateway ignores it.
"""

from __future__ import annotations

import struct

_LOAD_HALF, _LOAD_BYTE, _LOAD_HALF_AT_X, _LENGTH_TO_X = 0x28, 0x30, 0x48, 0xB1
_EQUAL, _ANY_BIT, _RETURN = 0x15, 0x45, 0x06
_WHOLE = 0x40000

_ETHERTYPE, _PROTOCOL, _FRAGMENT, _PORT_AFTER_X, _NEXT_HEADER, _PORT6 = 12, 23, 20, 16, 20, 56

# (label, operation, constant, label if true, label if false); the next line where a label is empty.
_PROGRAM: tuple[tuple[str, int, int, str, str], ...] = (
    ("", _LOAD_HALF, _ETHERTYPE, "", ""),
    ("", _EQUAL, 0x86DD, "six", ""),
    ("", _EQUAL, 0x0800, "", "drop"),
    ("", _LOAD_BYTE, _PROTOCOL, "", ""),
    ("", _EQUAL, 6, "drop", ""),
    ("", _EQUAL, 17, "", "take"),
    ("", _LOAD_HALF, _FRAGMENT, "", ""),
    ("", _ANY_BIT, 0x1FFF, "take", ""),
    ("", _LENGTH_TO_X, 14, "", ""),
    ("", _LOAD_HALF_AT_X, _PORT_AFTER_X, "", ""),
    ("", _EQUAL, 53, "drop", "take"),
    ("six", _LOAD_BYTE, _NEXT_HEADER, "", ""),
    ("", _EQUAL, 6, "drop", ""),
    ("", _EQUAL, 17, "", "take"),
    ("", _LOAD_HALF, _PORT6, "", ""),
    ("", _EQUAL, 53, "drop", "take"),
    ("take", _RETURN, _WHOLE, "", ""),
    ("drop", _RETURN, 0, "", ""),
)


def packet_filter() -> bytes:
    """The program as the kernel takes it (struct sock_filter)."""
    places = {label: number for number, (label, *_) in enumerate(_PROGRAM) if label}
    code = b""
    for number, (_, operation, constant, true, false) in enumerate(_PROGRAM):
        jumps = [places[label] - number - 1 if label else 0 for label in (true, false)]
        code += struct.pack("=HBBI", operation, *jumps, constant)
    return code
