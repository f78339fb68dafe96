"""What clients keep from round to round: arrays by client, in a folder instead of in memory.

K clients. Workers, several processes of one machine, write the states of the clients they train;
the driver alone decides which of them count, once it knows whose reply was usable. So each client
has several slots: its committed state stays untouched in one, its new state goes to another, and to
commit is to change one number. Where a worker dies half-way through a write, its clients are
trained again from the same old state and write over the same slot; a client that fails is not
committed. A third slot keeps what a checkpoint refers to, however often the client trains after it.
No two processes train one client at the same time, so no slot needs a lock. All this withstands
processes that die, not a power failure: nothing waits until the disk has it.

- ``states.bin``: the slots; a client's slot 0, 1 or 2 begins at byte (3 * client + slot) * size.
  Sparse: who has never trained takes no room on the disk.
- ``schema.json``: under ``arrays``, array name -> dtype and shape, the same for all, settled by the
  first to write. A slot holds the arrays one after the other, sorted by name, and then the CRC-32
  of these bytes in four more, little-endian. Where an older fedsim began the run, the file holds
  nothing but the arrays, and slots have no checksum.
- ``versions.npy``: int8 [K], the slot that is committed; -1 for a client without a state.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import EngineError

STATES, SCHEMA, VERSIONS = "states.bin", "schema.json", "versions.npy"
SLOTS = 3
"""Of each client: for its committed state, that of the last checkpoint, and the next."""
_FREE = np.array([[1, 2, 1, 1], [2, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
"""A slot that is neither of two; -1, for none, is the last index."""

DTYPES = {"bool", "float16", "float32", "float64"} | {
    f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}
"""What an array may hold that is kept, by ``dtype.name``: the same in NumPy, PyTorch and files."""

_CHECKSUM, _CHECKSUM_BYTES = "crc32", 4


@dataclass(frozen=True)
class _Schema:
    """What a slot holds."""

    arrays: dict[str, tuple[str, tuple[int, ...]]]
    """Array name -> ``dtype.str`` and shape, sorted by name."""
    is_checked: bool
    """Whether a checksum follows them."""

    @cached_property
    def size(self) -> int:
        """Bytes of a slot."""
        specs = self.arrays.values()
        arrays = sum(np.dtype(dtype).itemsize * prod(shape) for dtype, shape in specs)
        return arrays + _CHECKSUM_BYTES * self.is_checked


class StateFiles:
    """The states of all clients in a folder, for any process; the first write makes it.

    No file stays open, so it may be pickled, or constructed anew elsewhere on this machine.
    """

    def __init__(self, folder: Path) -> None:
        self._states = folder / STATES
        self._schema_file = folder / SCHEMA
        self._schema: _Schema | None = None

    def read(self, client: int, slot: int) -> dict[str, NDArray[Any]]:
        """Return copies of the arrays in one of a client's slots; none for slot -1.

        Raises `EngineError` if states.bin is cut short or holds other bytes than were written, or
        if schema.json is missing or broken.
        """
        assert -1 <= slot < SLOTS
        if slot == -1:
            return {}
        schema = self._schema = self._schema or self._read_schema(client)
        size, start = schema.size, (SLOTS * client + slot) * schema.size
        content = b""
        # No memory map: there a full disk or a file cut short kills the process.
        with (
            _reported(f"can't read the state of client {client} from {self._states}"),
            self._states.open("rb", buffering=0) as file,
        ):
            while len(content) < size:
                part = os.pread(file.fileno(), size - len(content), start + len(content))
                if not part:
                    raise OSError("the file ends too early; it isn't the one that was written")
                content += part
            if schema.is_checked:
                written = int.from_bytes(content[-_CHECKSUM_BYTES:], "little")
                if zlib.crc32(memoryview(content)[:-_CHECKSUM_BYTES]) != written:
                    raise OSError("it isn't what was written (its checksum differs)")
        arrays: dict[str, NDArray[Any]] = {}
        offset = 0
        for name, (dtype, shape) in schema.arrays.items():
            arrays[name] = np.ndarray(shape, dtype, content, offset).copy()
            offset += arrays[name].nbytes
        return arrays

    def write(self, client: int, slot: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write a client's new state, arrays of `DTYPES`, into one of its slots.

        Raises `EngineError` if they can't be written, or if their names, dtypes and shapes aren't
        those of every other client.
        """
        assert 0 <= slot < SLOTS
        for name, array in arrays.items():
            if array.dtype.name not in DTYPES:
                raise EngineError(
                    f"client {client} keeps array {name!r} with dtype {array.dtype}; a state is "
                    "made of booleans, integers and floats"
                )
        own = {name: (arrays[name].dtype.str, arrays[name].shape) for name in sorted(arrays)}
        schema = self._schema = self._schema or self._agree(own, client)
        for name in sorted(own.keys() | schema.arrays.keys()):
            if own.get(name) != schema.arrays.get(name):
                raise EngineError(
                    f"client {client} keeps array {name!r} as {_describe(own.get(name))}, the "
                    f"first client kept it as {_describe(schema.arrays.get(name))}: all clients "
                    "must keep arrays of the same names, dtypes and shapes"
                )
        parts = [arrays[name].tobytes() for name in schema.arrays]
        if schema.is_checked:
            checksum = 0
            for part in parts:
                checksum = zlib.crc32(part, checksum)
            parts.append(checksum.to_bytes(_CHECKSUM_BYTES, "little"))
        rest = memoryview(b"".join(parts))
        start = (SLOTS * client + slot) * len(rest)
        hint = f"; client {client} needs {len(rest):,} bytes there, and as many when trained again"
        with (
            _reported(f"can't write the clients' state to {self._states}", hint),
            os.fdopen(os.open(self._states, os.O_WRONLY | os.O_CREAT, 0o666), "wb", 0) as file,
        ):
            while rest:
                written = os.pwrite(file.fileno(), rest, start)
                rest, start = rest[written:], start + written

    def _agree(self, own: Mapping[str, Any], client: int) -> _Schema:
        """Return everybody's schema, that of ``own`` arrays if nobody has settled it before."""
        temporary = self._schema_file.with_suffix(f".{uuid4().hex}")
        with _reported(f"can't write what the clients' states look like to {self._schema_file}"):
            self._schema_file.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps({"checksum": _CHECKSUM, "arrays": own}))
                # A link, unlike a rename, never replaces what another has just put there.
                with suppress(FileExistsError):
                    self._schema_file.hardlink_to(temporary)
            finally:
                temporary.unlink(missing_ok=True)
        return self._read_schema(client)

    def _read_schema(self, client: int) -> _Schema:
        try:
            content = json.loads(self._schema_file.read_bytes())
            # An older fedsim's file is the arrays alone, of which one may have this name.
            is_checked = isinstance(content.get("arrays"), dict)
            if is_checked and content.get("checksum") != _CHECKSUM:
                raise ValueError(f"its checksum isn't {_CHECKSUM}")
            found = sorted((content["arrays"] if is_checked else content).items())
            arrays = {name: (dtype, tuple(shape)) for name, (dtype, shape) in found}
            for name, (dtype, shape) in arrays.items():
                is_known = type(dtype) is str and np.dtype(dtype).name in DTYPES
                if not is_known or not all(type(n) is int and n >= 0 for n in shape):
                    raise ValueError(f"array {name!r} has no valid dtype and shape")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise EngineError(
                f"can't use the state of client {client}: {self._schema_file} is missing or "
                f"broken ({error})"
            ) from None
        return _Schema(arrays, is_checked)


class ClientStates:
    """The states of K clients as the driver sees them; in memory, two bytes a client.

    Parameters
    ----------
    folder : Path
        Where the states go; made if it isn't there.
    num_clients : int
        K.
    versions : ndarray of int8 [K], optional
        What `versions` was at a checkpoint, to go on from it. By default the folder must not hold
        states yet: `EngineError` if it does.

    Examples
    --------
    A worker trains client 3; its state counts once the driver says so.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     states = ClientStates(Path(folder) / "states", num_clients=5)
    ...     [(slot, new_slot)] = states.slots([3])
    ...     states.files.write(3, new_slot, {"bias": np.array([1.0, 2.0])})
    ...     before = states.read(3)
    ...     states.commit([3])
    ...     before, states.read(3), states.trained
    ({}, {'bias': array([1., 2.])}, array([3]))
    """

    def __init__(
        self, folder: Path, num_clients: int, versions: NDArray[np.int8] | None = None
    ) -> None:
        self._folder = folder
        if versions is None:
            for name in (STATES, SCHEMA, VERSIONS):
                if (folder / name).exists():
                    raise EngineError(f"{folder} already holds {name}; use another folder")
            versions = np.full(num_clients, -1, dtype=np.int8)
        assert len(versions) == num_clients
        self._versions = self._retained = versions

    @classmethod
    def open(cls, folder: Path | str) -> ClientStates:
        """Return the states in a folder as last committed.

        Raises `EngineError` if versions.npy is missing or broken.
        """
        folder = Path(folder)
        file = folder / VERSIONS
        try:
            versions = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
            if versions.dtype != "i1" or versions.ndim != 1 or not are_versions(versions):
                raise ValueError
        except Exception as error:  # the parser of a broken header lets all kinds through
            reason = f"missing or broken ({type(error).__name__})"
            raise EngineError(
                f"{file} is {reason}: it must hold int8 [K], -1 to 2; a run whose clients keep "
                "nothing has none"
            ) from None
        return cls(folder, len(versions), versions)

    @cached_property
    def files(self) -> StateFiles:
        """The files, for this process or to be sent to another."""
        return StateFiles(self._folder)

    @property
    def trained(self) -> NDArray[np.int64]:
        """The clients that have a state, in rising order."""
        return np.flatnonzero(self._versions >= 0)

    @property
    def versions(self) -> NDArray[np.int8]:
        """Each client's committed slot, int8 [K], -1 where it has no state; not to be changed."""
        return self._versions

    def slots(self, clients: Sequence[int]) -> list[tuple[int, int]]:
        """Return of each client the slot of its state, or -1, and the one for its next state."""
        assert all(0 <= client < len(self._versions) for client in clients)
        index = np.asarray(clients, dtype=np.int64)
        now, retained = self._versions[index], self._retained[index]
        return list(zip(now.tolist(), _FREE[now, retained].tolist(), strict=True))

    def read(self, client: int) -> dict[str, NDArray[Any]]:
        """Return copies of a client's committed arrays; none if it has no state.

        Raises `EngineError` if there is no such client.
        """
        if not 0 <= client < len(self._versions):
            raise EngineError(f"client {client}: clients are 0..{len(self._versions) - 1}")
        return self.files.read(client, int(self._versions[client]))

    def commit(self, clients: Sequence[int]) -> None:
        """Let count what these clients have written, each since its last commit.

        Naming a client twice is as good as once. Raises `EngineError` if versions.npy can't be
        written; then nothing is committed.
        """
        if len(clients):
            versions = self._versions.copy()
            versions[list(clients)] = [new for _, new in self.slots(clients)]
            self._save(versions)

    def retain(self) -> None:
        """Keep the states of now readable, by their slots, until this is called again."""
        self._retained = self._versions

    def _save(self, versions: NDArray[np.int8]) -> None:
        content = io.BytesIO()
        np.save(content, versions)
        temporary = self._folder / f"{VERSIONS}.tmp"
        with _reported(f"can't write which states the clients have to {self._folder / VERSIONS}"):
            temporary.write_bytes(content.getvalue())
            temporary.replace(self._folder / VERSIONS)
        self._versions = versions


def are_versions(numbers: NDArray[Any]) -> bool:
    """Tell whether all numbers are slots, or -1."""
    return bool(np.isin(numbers, range(-1, SLOTS)).all())


@contextmanager
def _reported(problem: str, hint: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EngineError(f"{problem}: {error.strerror or error}{hint}") from None


def _describe(spec: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{np.dtype(spec[0])} {list(spec[1])}" if spec else "nothing"
