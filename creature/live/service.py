"""A creature served to a world elsewhere: a TCP socket, frames as in docs/live.md, one client at a time."""

import selectors
import socket
import time
import traceback
from collections.abc import Callable

import numpy as np

from creature.errors import UserError, first_line
from creature.live.creature import LiveCreature
from creature.live.frames import LENGTHS, FrameError, pack, unpack, unpack_lengths
from creature.live.perception import CONTACT_NOW
from ticks_creature import TICK_SECONDS

FORMAT = "live creature 1"
HOST, PORT = "127.0.0.1", 7880
PATIENCE = 10.0  # s in which a client sends a whole frame and takes its answer, or the place is free again
TURN = 0.2  # s after which a wait looks at the clock
MOST_LEAVING, LEAVING = 8, 1.0  # connections that may still read their last sentence, and for how many s
FLOATS = ("float32",)
# The senses of a tick that are arrays, with the dtypes that they may have.
SENSES = {
    "audio": ("float32", "int16"), "images": ("uint8",), "state": FLOATS, "joint_positions": FLOATS,
    "joint_rotations": FLOATS, "touch": FLOATS,
}  # fmt: skip
EMITTED = ("voice_codes", "sound", "rotations", "blend_shapes", "eyes", "action")


class Service:
    """
    A live creature on a socket: `serve` answers one client after another, until `close`.

        service = Service(LiveCreature.from_pretrained("checkpoints/whole"), port=7880)
        service.serve()

    Its life goes on from client to client; a client that wants a new one begins with "reset".

    Args:
        creature: it lives in the thread that calls `serve`. host: an address of this machine; anybody who reaches it
            can use the creature, without a password. port: 0 takes a free one; `address` says which.
        patience: s in which a client sends a frame and takes its answer. report: is given a line of text when a client
            has come or gone.

    Raises:
        UserError: for an address that cannot be used.
    """

    def __init__(
        self,
        creature: LiveCreature,
        host: str = HOST,
        port: int = PORT,
        patience: float = PATIENCE,
        report: Callable[[str], None] = print,
    ):
        self.creature, self.patience, self.report = creature, patience, report
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self.listener = socket.create_server((host, port), family=family, backlog=MOST_LEAVING)
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} of {host} cannot be used ({error}): give another one") from error
        self.address = self.listener.getsockname()[:2]
        self.client: socket.socket | None = None
        self.leaving: dict[socket.socket, float] = {}  # connections that have ended, and until when they are read
        self.closed = False

    def close(self) -> None:
        """End `serve`, from any thread."""
        self.closed = True

    def serve(self) -> None:
        """Answer one client after another until `close`."""
        try:
            while not self.closed:
                self._turn()
                if self.client is not None:
                    self._serve_client()
        finally:
            for connection in (self.listener, self.client, *self.leaving):
                if connection is not None:
                    connection.close()

    # --- one client ---------------------------------------------------------------------------------------------------

    def _serve_client(self) -> None:
        first, end = self.creature.clock.ticks, "it has ended"
        try:
            while (frame := self._receive_frame()) is not None:
                self.client.sendall(self._answer(*frame))
            self.client.close()
        except FrameError as error:
            end = str(error)
            self._dismiss(self.client, end)
        except OSError as error:  # it has disappeared, or does not take its answer
            end = first_line(error)
            self.client.close()
        self.client = None
        clock = self.creature.clock
        ticks = max(clock.ticks - first, 0)
        self.report(f"{ticks:,} ticks, p50 {clock.p50 * 1e3:.1f} ms, p95 {clock.p95 * 1e3:.1f} ms: {end}")

    def _receive_frame(self) -> tuple[bytes, bytes] | None:
        """The header and the arrays of the next frame; None where the client has ended before it."""
        deadline = time.monotonic() + self.patience
        lengths = self._receive(LENGTHS.size, deadline, may_end=True)
        if not lengths:
            return None
        header, arrays = (self._receive(size, deadline) for size in unpack_lengths(lengths))
        return header, arrays

    def _receive(self, size: int, deadline: float, may_end: bool = False) -> bytes:
        """The next `size` bytes of the client; none where it ends before the first of them, if it may."""
        received = bytearray()
        while len(received) < size:
            if self.closed:
                raise FrameError("The creature is not served any more.")
            if time.monotonic() > deadline:
                raise FrameError(f"No whole frame came for {self.patience:g} s: the place is free, connect again.")
            if self._turn():
                piece = self.client.recv(min(size - len(received), 1 << 16))
                if not piece and may_end and not received:
                    return b""
                if not piece:
                    raise FrameError(f"The frame ends after {len(received):,} of {size:,} bytes: send it whole.")
                received += piece
        return bytes(received)

    # --- connections --------------------------------------------------------------------------------------------------

    def _turn(self) -> bool:
        """Wait for a moment, admit or refuse who comes, see off who leaves. Whether the client has sent something."""
        client = self.client
        with selectors.DefaultSelector() as selector:
            for connection in (self.listener, client, *self.leaving):
                if connection is not None:
                    selector.register(connection, selectors.EVENT_READ)
            ready = {key.fileobj for key, _ in selector.select(TURN)}
        for connection, deadline in list(self.leaving.items()):
            # What it still sends is read, because closing over unread bytes would take its last sentence away.
            if time.monotonic() > deadline or connection in ready and not _discard(connection):
                del self.leaving[connection]
                connection.close()
        if self.listener in ready and client not in ready:  # first read whether the client has ended
            self._admit()
        return client is not None and client in ready

    def _admit(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:  # it has left already
            return
        connection.settimeout(self.patience)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.client is None:
            self.client = connection
            self.report("a world is connected")
        else:
            self._dismiss(connection, "Another world is connected, and a creature has one body: try again later.")

    def _dismiss(self, connection: socket.socket, sentence: str) -> None:
        """Say why, and close; it has a second to read it."""
        try:
            connection.setblocking(False)
            connection.send(pack({"kind": "error", "message": sentence}))
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            connection.close()
            return
        if len(self.leaving) == MOST_LEAVING:
            oldest = next(iter(self.leaving))
            del self.leaving[oldest]
            oldest.close()
        self.leaving[connection] = time.monotonic() + LEAVING

    # --- requests -----------------------------------------------------------------------------------------------------

    def _answer(self, header: bytes, body: bytes) -> bytes:
        """The frame that answers a frame: what was asked for, or why not in a sentence."""
        try:
            request, arrays = unpack(header, body)
            kind = request.pop("kind")
            if kind not in REQUESTS:
                raise ValueError(f"There is no request {kind[:40]!r}: send one of {', '.join(REQUESTS)}.")
            method, entries, names = REQUESTS[kind]
            unknown = sorted({*request} - {*entries} | {*arrays} - {*names})
            if unknown:
                known = ", ".join((*entries, *names)) or "nothing else"
                raise ValueError(f"A {kind} has no {unknown[0][:40]!r}: it takes {known}.")
            return method(self, request, arrays)
        except ValueError as error:
            return pack({"kind": "error", "message": str(error)})
        except Exception as error:  # a bug of ours: the next request may do
            traceback.print_exc()
            message = f"The creature failed ({type(error).__name__}: {first_line(error)}): send a reset."
            return pack({"kind": "error", "message": message})

    def _hello(self, request: dict, arrays: dict) -> bytes:
        creature, config = self.creature, self.creature.config
        return pack({
            "kind": "hello", "format": FORMAT, "tick_seconds": TICK_SECONDS, "window": creature.window,
            "tick": creature.now, "streams": list(creature.streams), "sampling_rate": creature.perception.sampling_rate,
            "ears": bool(config.num_mel_bins), "cameras": config.num_cameras,
            "image_size": list(config.image_shape), "joints": config.num_joints,
            "subframes": config.subframes_per_tick, "state": config.body_state_size,
            "state_names": config.body_state_names, "touch_points": config.num_touch_points,
            "touch_surfaces": config.num_touch_surfaces, "blend_shapes": config.num_blend_shapes,
            "action": config.action_size, "action_names": config.action_names,
            "sound_rate": None if creature.speaking is None else creature.processor.codec.config.sampling_rate,
        })  # fmt: skip

    def _reset(self, request: dict, arrays: dict) -> bytes:
        seed = request.get("seed")
        if seed is not None and (type(seed) is not int or not 0 <= seed < 1 << 63):
            raise ValueError("The seed of a reset is a whole number, at least 0.")
        self.creature.reset(seed)
        return pack({"kind": "reset", "seed": self.creature.seed})

    def _tick(self, request: dict, arrays: dict) -> bytes:
        senses = {name: _checked(name, value) for name, value in arrays.items()}
        if "touch" in senses:
            senses["touch"] = [dict(zip(CONTACT_NOW, contact, strict=True)) for contact in senses["touch"].tolist()]
        emission = self.creature.tick(words=request.get("words"), **senses)
        clock = self.creature.clock
        times = {name: getattr(clock, name) for name in ("p50", "p95", "ticks", "late")} | {"seconds": emission.seconds}
        entries = {name: getattr(emission, name) for name in ("tick", "thought", "said", "thought_id", "said_id")}
        emitted = {name: getattr(emission, name) for name in EMITTED if getattr(emission, name) is not None}
        return pack({"kind": "emission", **entries, "clock": times}, emitted)


# What a client may ask: the method that answers, further entries of the header, names of arrays.
REQUESTS = {
    "hello": (Service._hello, (), ()),
    "tick": (Service._tick, ("words",), tuple(SENSES)),
    "reset": (Service._reset, ("seed",), ()),
}


def _checked(name: str, value: np.ndarray) -> np.ndarray:
    """An array of a tick with a dtype and numbers that the creature can take; the creature checks the rest."""
    if str(value.dtype) not in SENSES[name]:
        raise ValueError(f"{name} is an array of {value.dtype}: send {' or '.join(SENSES[name])}.")
    if name == "images" and (value.ndim != 4 or value.shape[3] != 3 or not value.size):
        raise ValueError(f"images has the shape {list(value.shape)}: send [cameras, height, width, 3].")
    if name == "touch" and (value.ndim != 2 or value.shape[1] != len(CONTACT_NOW)):
        raise ValueError(f"touch has the shape {list(value.shape)}: send [contacts, 7] of {', '.join(CONTACT_NOW)}.")
    return value


def _discard(connection: socket.socket) -> bool:
    """Read and forget what has arrived; whether more may come."""
    try:
        return bool(connection.recv(1 << 16))
    except BlockingIOError:
        return True
    except OSError:
        return False
