"""One virtio-vsock stream as the host sees it, without I/O (virtio 1.2, section 5.10.6).

Packets from the guest go in, what they mean for the host's socket comes out; what the host's socket
did goes in, headers for the guest come out. Nothing is queued: what is still to be said is a few
flags, so a stream costs the same however hard either side drives it.
"""

from __future__ import annotations

from enum import Enum, IntFlag, auto

from services.hypervisor.vsock.errors import DeviceBug, PeerBroke
from services.hypervisor.vsock.packet import (
    COUNTER_MASK,
    HOST_CID,
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    STRUCT,
    TYPE_STREAM,
    Header,
    Op,
)


class StreamBroke(PeerBroke):
    """The guest sent what this stream does not allow; the stream is reset, the others go on."""


class State(Enum):
    """Where a stream stands."""

    WAITING = auto()
    """The guest has not been asked, or is to be asked again."""
    CONNECTING = auto()
    """REQUEST sent."""
    OPEN = auto()
    CLOSING = auto()
    """We said that both directions are done; the guest is to answer with RST."""
    CLOSED = auto()
    """Nothing more is expected from the guest; an RST may still have to go out."""


_NEXT: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.CONNECTING, State.CLOSED}),
    State.CONNECTING: frozenset({State.WAITING, State.OPEN, State.CLOSED}),
    State.OPEN: frozenset({State.CLOSING, State.CLOSED}),
    State.CLOSING: frozenset({State.CLOSED}),
    State.CLOSED: frozenset(),
}


class Effect(IntFlag):
    """What a packet means for the host's side of the stream."""

    NONE = 0
    OPENED = auto()
    """Data may flow."""
    DATA = auto()
    """The packet's payload is for the host; report it with `delivered`."""
    NO_MORE_DATA = auto()
    """The guest will send nothing more: end of file for the host after what came before."""
    NO_MORE_WANTED = auto()
    """The guest will read nothing more."""
    REFUSED = auto()
    """Nothing listens there; call `retry` or `forget`."""
    GONE = auto()
    """The guest has forgotten the stream."""


class Connection:
    """The protocol state of one stream that the host opened."""

    __slots__ = (
        "_announced",
        "_credit_asked",
        "_forwarded",
        "_guest_cid",
        "_guest_shutdown",
        "_peer_alloc",
        "_peer_forwarded",
        "_received",
        "_reset",
        "_sent",
        "_shutdown_said",
        "_shutdown_wanted",
        "_state",
        "_update",
        "local_port",
        "peer_port",
        "window",
    )

    def __init__(self, *, guest_cid: int, local_port: int, peer_port: int, window: int) -> None:
        self.local_port = local_port
        self.peer_port = peer_port
        self.window = window
        """The most bytes from the guest that are held for the host at one time."""
        self._guest_cid = guest_cid
        self._state = State.WAITING
        self._sent = self._peer_alloc = self._peer_forwarded = 0
        self._received = self._forwarded = self._announced = 0
        self._guest_shutdown = self._shutdown_wanted = self._shutdown_said = 0
        self._reset = self._update = self._credit_asked = False

    @property
    def state(self) -> State:
        """Where the stream stands."""
        return self._state

    @property
    def held(self) -> int:
        """Bytes from the guest that have not been delivered."""
        return self._received - self._forwarded

    # From the guest

    def receive(self, header: Header) -> Effect:
        """Take a packet of this stream.

        Raises:
            StreamBroke: it is not allowed now; call `abort`.
        """
        if self._state is State.CLOSED:
            return Effect.NONE
        self._take_credit(header)
        op = header.op
        if op == Op.RW:
            return self._receive_data(header.length)
        if op == Op.CREDIT_UPDATE:
            return Effect.NONE
        if op == Op.CREDIT_REQUEST:
            self._update = True
            return Effect.NONE
        if op == Op.SHUTDOWN:
            return self._receive_shutdown(header.flags)
        if op == Op.RST:
            if self._state is State.CONNECTING:
                return Effect.REFUSED
            self._close()
            return Effect.GONE
        if op == Op.RESPONSE and self._state is State.CONNECTING:
            self._become(State.OPEN)
            return Effect.OPENED
        raise StreamBroke(f"operation {op} while {self._state.name}")

    def _take_credit(self, header: Header) -> None:
        self._peer_alloc = header.buf_alloc
        # A guest with several processors may queue an older count after a newer one: what would go
        # backwards, or claims bytes that were never sent, is old news, not news.
        forward = (header.fwd_cnt - self._peer_forwarded) & COUNTER_MASK
        if forward <= self._sent - self._peer_forwarded:
            self._peer_forwarded += forward

    def _receive_data(self, length: int) -> Effect:
        if self._state not in (State.OPEN, State.CLOSING) or self._guest_shutdown & SHUTDOWN_SEND:
            raise StreamBroke(f"data while {self._state.name}")
        if length > self.window - self.held:
            raise StreamBroke(f"{length} bytes where {self.window - self.held} were allowed")
        self._received += length
        return Effect.DATA if length else Effect.NONE

    def _receive_shutdown(self, flags: int) -> Effect:
        if self._state not in (State.OPEN, State.CLOSING):
            raise StreamBroke(f"shutdown while {self._state.name}")
        new = flags & SHUTDOWN_BOTH & ~self._guest_shutdown
        self._guest_shutdown |= new
        effect = Effect.NONE
        if new & SHUTDOWN_SEND:
            effect |= Effect.NO_MORE_DATA
        if new & SHUTDOWN_RECEIVE:
            effect |= Effect.NO_MORE_WANTED
        if self._guest_shutdown == SHUTDOWN_BOTH:
            # The guest is through and waits for this to forget the stream.
            self.abort()
            effect |= Effect.GONE
        return effect

    # From the host

    def delivered(self, count: int) -> None:
        """`count` bytes from the guest have left our memory; the guest may send as many more."""
        self._forwarded += count
        if self._forwarded > self._received:
            raise DeviceBug(f"{self._forwarded} bytes delivered of {self._received}")
        if self._forwarded - self._announced >= self.window // 4:
            self._update = True

    def finish(self, flags: int) -> None:
        """The host will send (`SHUTDOWN_SEND`) or take (`SHUTDOWN_RECEIVE`) nothing more."""
        self._shutdown_wanted |= flags

    def abort(self) -> None:
        """End the stream with an RST, if the guest has heard of it."""
        known = self._state not in (State.WAITING, State.CLOSED)
        self._close()
        self._reset = known

    def forget(self) -> None:
        """End the stream without a word: the guest's side of it is gone."""
        self._close()
        self._reset = False

    def retry(self) -> None:
        """Ask again: the guest refused, or it has started anew and heard nothing yet."""
        if self._state is State.CONNECTING:
            self._become(State.WAITING)

    @property
    def both_sent_all(self) -> bool:
        """Whether neither side will send more; only the end of the stream is left to say."""
        return bool(self._guest_shutdown & self._shutdown_wanted & SHUTDOWN_SEND)

    # To the guest

    @property
    def wants_control(self) -> bool:
        """Whether `next_control` has something to say."""
        return (
            self._reset
            or self._state is State.WAITING
            or (
                self._state in (State.OPEN, State.CLOSING)
                and (self._update or self._shutdown_wanted != self._shutdown_said)
            )
        )

    @property
    def credit(self) -> int:
        """How many bytes the guest takes now."""
        if self._state is not State.OPEN or self._guest_shutdown & SHUTDOWN_RECEIVE:
            return 0
        if self._shutdown_wanted & SHUTDOWN_SEND:
            return 0
        return max(0, self._peer_alloc - (self._sent - self._peer_forwarded))

    @property
    def wants_credit(self) -> bool:
        """Whether the guest takes nothing now and has not been asked to say when it does."""
        return (
            self._state is State.OPEN
            and not self._credit_asked
            and not self._guest_shutdown & SHUTDOWN_RECEIVE
            and not self._shutdown_wanted & SHUTDOWN_SEND
            and self.credit == 0
        )

    def next_control(self) -> bytes | None:
        """The next header without payload that has to go out, or None."""
        if self._reset:
            self._reset = False
            return self._header(Op.RST, 0, 0)
        if self._state is State.WAITING:
            self._become(State.CONNECTING)
            return self._header(Op.REQUEST, 0, 0)
        if self._state not in (State.OPEN, State.CLOSING):
            return None
        if self._shutdown_wanted != self._shutdown_said:
            self._shutdown_said = self._shutdown_wanted
            if self._shutdown_said == SHUTDOWN_BOTH:
                self._become(State.CLOSING)
            return self._header(Op.SHUTDOWN, 0, self._shutdown_said)
        if self._update:
            return self._header(Op.CREDIT_UPDATE, 0, 0)
        return None

    def credit_request(self) -> bytes | None:
        """The header that asks for credit; once until some has been used."""
        if not self.wants_credit:
            return None
        self._credit_asked = True
        return self._header(Op.CREDIT_REQUEST, 0, 0)

    def data(self, length: int) -> bytes:
        """The header of a packet that carries `length` bytes, at most `credit`."""
        if not 0 < length <= self.credit:
            raise DeviceBug(f"{length} bytes to send with a credit of {self.credit}")
        self._sent += length
        self._credit_asked = False
        return self._header(Op.RW, length, 0)

    def _header(self, op: int, length: int, flags: int) -> bytes:
        self._announced = self._forwarded
        self._update = False
        return STRUCT.pack(
            HOST_CID, self._guest_cid, self.local_port, self.peer_port, length, TYPE_STREAM, op, flags,
            self.window, self._forwarded & COUNTER_MASK,
        )  # fmt: skip

    def _become(self, state: State) -> None:
        if state not in _NEXT[self._state]:
            raise DeviceBug(f"stream from {self._state.name} to {state.name}")
        self._state = state

    def _close(self) -> None:
        if self._state is not State.CLOSED:
            self._become(State.CLOSED)
