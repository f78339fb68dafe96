"""What clients keep between rounds: what is committed counts, and nothing else."""

import errno
import os
import pickle
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsim.engine.state import ClientStates, StateFiles
from fedsim.errors import EngineError

DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
)
SPECS = st.dictionaries(
    st.text(max_size=8),
    st.tuples(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
    max_size=4,
)


def head(value):
    return {
        "weight": np.full((2, 3), value, dtype=np.float32),
        "seen": np.array(value, dtype=np.int64),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def write(states, client, arrays):
    """As a worker does, in an object of its own."""
    [(_, slot)] = states.slots([client])
    pickle.loads(pickle.dumps(states.files)).write(client, slot, arrays)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "states"


@pytest.fixture
def states(folder):
    return ClientStates(folder, num_clients=10)


class TestClientStates:
    @settings(max_examples=40)
    @given(specs=SPECS, data=st.data())
    def test_every_client_reads_what_it_wrote(self, specs, data):
        with tempfile.TemporaryDirectory() as folder:
            states = ClientStates(Path(folder), num_clients=4)
            kept = {}
            for _ in range(2):
                for client in data.draw(st.permutations(range(4)))[:3]:
                    kept[client] = {
                        name: np.frombuffer(
                            data.draw(st.binary(min_size=size, max_size=size)), dtype
                        ).reshape(shape)
                        for name, (dtype, shape) in specs.items()
                        for size in [dtype.itemsize * int(np.prod(shape))]
                    }
                    write(states, client, kept[client])
                    states.commit([client])
            for client in range(4):
                assert_same(states.read(client), kept.get(client, {}))

    def test_arrays_in_another_order_or_memory_layout_are_the_same_state(self, states):
        matrix = np.arange(12, dtype=np.int16).reshape(3, 4)
        write(states, 0, {"a": matrix, "b": np.ones(2)})
        write(states, 1, {"b": np.ones(4)[::2], "a": np.asfortranarray(matrix)})
        states.commit([0, 1])
        assert_same(states.read(1), states.read(0))
        assert list(states.read(1)) == ["a", "b"]

    def test_the_files_are_as_documented(self, states, folder):
        """A slot has 2 + 3 + 4 bytes: client 1's slot 1 begins at byte (3 * 1 + 1) * 9."""
        for value in (1, 2):
            arrays = {"b": np.full(3, value, np.uint8), "a": np.array(10 + value, ">i2")}
            write(states, 1, arrays)
            states.commit([1])
        schema = '{"checksum": "crc32", "arrays": {"a": [">i2", []], "b": ["|u1", [3]]}}'
        assert (folder / "schema.json").read_text() == schema
        content = (folder / "states.bin").read_bytes()
        slots = bytes([0, 11, 1, 1, 1]), bytes([0, 12, 2, 2, 2])
        checked = [slot + zlib.crc32(slot).to_bytes(4, "little") for slot in slots]
        assert content == bytes(27) + b"".join(checked)
        assert np.load(folder / "versions.npy").tolist() == [-1, 1] + 8 * [-1]

    def test_states_of_an_older_fedsim_go_on_without_checksums(self, states, folder):
        folder.mkdir(parents=True)
        (folder / "schema.json").write_text('{"arrays": ["|u1", [3]], "b": [">i2", []]}')
        (folder / "states.bin").write_bytes(bytes(15) + bytes([1, 2, 3, 0, 11]))
        states.commit([1])
        older = {"arrays": np.array([1, 2, 3], np.uint8), "b": np.array(11, ">i2")}
        assert_same(states.files.read(1, 0), older)
        write(states, 0, {**older, "b": np.array(12, ">i2")})
        states.commit([0])
        assert_same(states.read(0), {**older, "b": np.array(12, ">i2")})
        assert (folder / "states.bin").read_bytes()[:5] == bytes([1, 2, 3, 0, 12])

    def test_what_is_read_is_the_reader_s_own(self, states):
        write(states, 4, head(1))
        states.commit([4])
        states.read(4)["weight"][:] = 9
        assert_same(states.read(4), head(1))

    def test_two_slots_take_turns(self, states):
        assert states.slots([5]) == [(-1, 0)]
        for round, slot in enumerate([0, 1, 0, 1]):
            write(states, 5, head(round))
            states.commit([5])
            assert states.slots([5]) == [(slot, 1 - slot)]
            assert_same(states.read(5), head(round))
            if round:
                assert_same(states.files.read(5, 1 - slot), head(round - 1))

    @settings(max_examples=60)
    @given(st.lists(st.sampled_from(["train", "train and fail", "retain"]), max_size=12))
    def test_what_is_retained_can_be_gone_on_from(self, events):
        """However often clients train after a checkpoint, also in vain, it can be gone back to."""
        with tempfile.TemporaryDirectory() as name:
            states = ClientStates(Path(name), num_clients=2)
            committed, retained, versions = {}, {}, states.versions
            for number, event in enumerate(events):
                if event == "retain":
                    states.retain()
                    retained, versions = committed, states.versions
                else:
                    write(states, 1, head(number))
                    if event == "train":
                        states.commit([1])
                        committed = head(number)
                assert_same(states.read(1), committed)
                resumed = ClientStates(Path(name), num_clients=2, versions=versions)
                assert_same(resumed.read(1), retained)

    def test_only_committed_clients_change(self, states):
        for value in (1, 2):
            for client in (3, 4, 5):
                write(states, client, head(10 * value + client))
            states.commit([3, 4, 5] if value == 1 else [3, 5])
        assert_same(states.read(3), head(23))
        assert_same(states.read(4), head(14))
        assert_same(states.read(5), head(25))

    @pytest.mark.parametrize("before", [False, True], ids=["first", "later"])
    def test_a_worker_that_dies_half_way_leaves_the_old_state(self, states, monkeypatch, before):
        if before:
            write(states, 2, head(1))
            states.commit([2])
        old = states.read(2)

        pwrite = os.pwrite

        def die(file, data, offset):
            pwrite(file, data[: len(data) // 2], offset)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", die)
            with pytest.raises(KeyboardInterrupt):
                write(states, 2, head(7))
        assert_same(states.read(2), old)
        write(states, 2, head(8))
        assert_same(states.read(2), old)
        states.commit([2])
        assert_same(states.read(2), head(8))

    def test_naming_a_client_twice_commits_it_once(self, states):
        write(states, 1, head(1))
        states.commit([1, 1])
        assert_same(states.read(1), head(1))

    def test_trained_are_those_with_a_state(self, states):
        assert states.trained.tolist() == []
        for client in (7, 2, 9):
            write(states, client, head(client))
        states.commit((7, 2))
        assert states.trained.tolist() == [2, 7]
        assert states.slots([9, 7, 2]) == [(-1, 0), (0, 1), (0, 1)]
        assert states.slots([]) == []
        assert states.versions[[9, 7, 2]].tolist() == [-1, 0, 0]
        assert states.read(9) == {}

    def test_reopened_states_are_as_last_committed(self, states, folder):
        write(states, 1, head(1))
        states.commit([1])
        write(states, 1, head(2))
        again = ClientStates.open(folder)
        assert_same(again.read(1), head(1))
        assert again.trained.tolist() == [1]
        write(again, 1, head(3))
        again.commit([1])
        assert_same(ClientStates.open(folder).read(1), head(3))
        with pytest.raises(EngineError, match=r"'seen' as nothing.*int64 \[\]"):
            write(again, 2, {"weight": head(1)["weight"]})

    def test_without_states_nothing_is_written(self, states, folder):
        states.commit([])
        assert not folder.exists()

    def test_nothing_but_the_three_files_is_left(self, states, folder):
        for client in (0, 1):
            write(states, client, head(client))
        states.commit([0, 1])
        found = sorted(file.name for file in folder.iterdir())
        assert found == ["schema.json", "states.bin", "versions.npy"]

    def test_a_client_that_never_trained_takes_no_room(self, folder):
        states = ClientStates(folder, num_clients=100_000)
        array = np.random.default_rng(0).random((512, 100), dtype=np.float32)
        write(states, 99_999, {"head": array})
        states.commit([99_999])
        np.testing.assert_array_equal(states.read(99_999)["head"], array)
        usage = (folder / "states.bin").stat()
        assert usage.st_size > 299_997 * array.nbytes
        assert usage.st_blocks * 512 < 2_000_000

    def test_partial_reads_and_writes_go_on(self, states, monkeypatch):
        pread, pwrite = os.pread, os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:5], at))
        write(states, 3, head(6))
        states.commit([3])
        assert_same(states.read(3), head(6))
        monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 7), at))
        assert_same(states.read(3), head(6))


class TestSchemaRace:
    """Two writers find no schema; both try to settle it."""

    def race(self, states, monkeypatch, one, other):
        """Client 1 writes ``other`` just before client 0, which writes ``one``, has its say."""
        link = os.link

        def too_late(*arguments, **keywords):
            monkeypatch.setattr(os, "link", link)
            write(states, 1, other)
            link(*arguments, **keywords)

        monkeypatch.setattr(os, "link", too_late)
        write(states, 0, one)
        assert os.link is link

    def test_the_same_schema_suits_both(self, states, folder, monkeypatch):
        self.race(states, monkeypatch, head(0), head(1))
        states.commit([0, 1])
        assert_same(states.read(0), head(0))
        assert_same(states.read(1), head(1))
        assert not list(folder.glob("schema.?*.?*"))

    def test_of_two_different_ones_the_later_is_refused(self, states, monkeypatch):
        with pytest.raises(EngineError, match=r"client 0 .*'weight'.*nothing.*float32 \[2, 3\]"):
            self.race(states, monkeypatch, {"seen": head(0)["seen"]}, head(1))
        states.commit([1])
        assert_same(states.read(1), head(1))

    def test_processes_write_together(self, states, folder):
        code = (
            "import sys, numpy as np\n"
            "from pathlib import Path\n"
            "from fedsim.engine.state import StateFiles\n"
            "sys.stdin.readline()\n"
            "for client in range(int(sys.argv[2]), 10, 2):\n"
            "    weight = np.full((2, 3), client, dtype=np.float32)\n"
            "    StateFiles(Path(sys.argv[1])).write(\n"
            "        client, 0, {'weight': weight, 'seen': np.array(client, dtype=np.int64)}\n"
            "    )\n"
        )
        workers = [
            subprocess.Popen([sys.executable, "-c", code, folder, str(k)], stdin=subprocess.PIPE)
            for k in (0, 1)
        ]
        for worker in workers:
            worker.stdin.write(b"go\n")
            worker.stdin.close()
        assert [worker.wait() for worker in workers] == [0, 0]
        states.commit(range(10))
        for client in range(10):
            assert_same(states.read(client), head(client))


class TestStatesFailure:
    @pytest.fixture
    def trained(self, states):
        write(states, 3, head(1))
        states.commit([3])
        return states

    @pytest.mark.parametrize(
        ("change", "line"),
        [
            ({"weight": np.zeros((3, 3), np.float32)}, r"float32 \[3, 3\].*float32 \[2, 3\]"),
            ({"weight": np.zeros((2, 3), ">f4")}, r">f4 \[2, 3\].*float32 \[2, 3\]"),
            ({"seen": np.zeros((), np.int32)}, r"int32 \[\].*int64 \[\]"),
            ({"bias": np.zeros(4)}, r"float64 \[4\].*nothing"),
        ],
    )
    def test_clients_keep_the_same_arrays(self, trained, change, line):
        [name] = change
        with pytest.raises(EngineError, match=f"client 8 keeps array '{name}' as {line}"):
            write(trained, 8, head(1) | change)
        write(trained, 8, head(2))

    @pytest.mark.parametrize("dtype", ["O", "U3", "S3", "M8[s]", "m8[s]", "V4", "i4,f4", "c8"])
    def test_states_are_numbers(self, states, folder, dtype):
        with pytest.raises(EngineError, match=r"client 6 keeps array 'x' with dtype .*; a state"):
            write(states, 6, {"x": np.zeros(2, dtype)})
        assert not (folder / "schema.json").exists()

    def test_a_file_cut_short(self, trained, folder):
        file = folder / "states.bin"
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(EngineError, match=rf"state of client 3 from {file}: .* too early"):
            trained.read(3)

    def test_a_damaged_byte(self, trained, folder):
        file = folder / "states.bin"
        content = file.read_bytes()
        for byte in range(3 * 3 * 36, len(content)):  # of client 3's slot 0, the checksum included
            damaged = bytearray(content)
            damaged[byte] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(EngineError, match=rf"of client 3 from {file}: .* checksum differs"):
                trained.read(3)
        file.write_bytes(content)
        assert_same(trained.read(3), head(1))

    def test_a_file_cut_short_and_filled_up(self, trained, folder):
        file = folder / "states.bin"
        size = file.stat().st_size
        for left in (0, size - 20):
            os.truncate(file, left)
            os.truncate(file, size)
            with pytest.raises(EngineError, match=rf"of client 3 from {file}: .* checksum differs"):
                trained.read(3)

    def test_a_missing_file(self, trained, folder):
        (folder / "states.bin").unlink()
        with pytest.raises(EngineError, match=r"client 3 from .*states.bin: No such file"):
            trained.read(3)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b'{"seen": ["<i8", []], "weight": ["<f4", [2,',
            b"\xff\xfe",
            b"[1]",
            b"7",
            b'{"x": 3}',
            b'{"x": ["<f4"]}',
            b'{"x": ["|O", [2]]}',
            b'{"x": ["number", [2]]}',
            b'{"x": [null, [2]]}',
            b'{"x": [["<f4"], [2]]}',
            b'{"x": ["<f4", [-2]]}',
            b'{"x": ["<f4", [2.0]]}',
            b'{"x": ["<f4", 2]}',
            b'{"arrays": {"x": ["<f4", [2]]}}',
            b'{"checksum": "md5", "arrays": {"x": ["<f4", [2]]}}',
        ],
    )
    def test_a_broken_schema(self, trained, folder, content):
        file = folder / "schema.json"
        file.write_bytes(content)
        for use in (lambda f: f.read(3, 0), lambda f: f.write(3, 0, head(1))):
            with pytest.raises(EngineError, match=rf"client 3: {file} is missing or broken"):
                use(StateFiles(folder))

    def test_a_missing_schema(self, trained, folder):
        (folder / "schema.json").unlink()
        with pytest.raises(EngineError, match=r"client 3: .*schema.json is missing"):
            StateFiles(folder).read(3, 0)

    @pytest.mark.parametrize(
        "array",
        [
            np.array([0, 3], np.int8),
            np.array([-128, 0], np.int8),
            np.array([0, 1], np.int64),
            np.array([[0, 1]], np.int8),
            np.array(1, np.int8),
            np.array([0, None], object),
        ],
    )
    def test_versions_that_mean_nothing(self, trained, folder, array):
        np.save(folder / "versions.npy", array)
        with pytest.raises(EngineError, match=r"versions.npy is missing or broken"):
            ClientStates.open(folder)

    def test_versions_cut_short(self, trained, folder):
        file = folder / "versions.npy"
        for size in reversed(range(file.stat().st_size)):
            os.truncate(file, size)
            with pytest.raises(EngineError, match=r"versions.npy is missing or broken"):
                ClientStates.open(folder)

    @pytest.mark.parametrize(
        ("good", "bad"),
        [
            (b"NUMPY", b"numpy"),
            (b"(10,)", b"(11,)"),
            (b"(10,)", b"(10, "),
            (b"(10,)", b"9**99"),
            (b"'|i1'", b"'|O' "),
            (b"'shape'", b"'shame'"),
            (b"\x93NUM", b"PK\x03\x04"),
        ],
    )
    def test_versions_with_a_broken_header(self, trained, folder, good, bad):
        file = folder / "versions.npy"
        content = file.read_bytes()
        assert good in content
        file.write_bytes(content.replace(good, bad))
        with pytest.raises(EngineError, match=r"versions.npy is missing or broken"):
            ClientStates.open(folder)

    def test_no_folder_to_reopen(self, tmp_path):
        with pytest.raises(EngineError, match=r"nowhere/versions.npy is missing"):
            ClientStates.open(tmp_path / "nowhere")

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        states = ClientStates(tmp_path / "file" / "states", 3)
        with pytest.raises(EngineError, match=r"can't write .* to .*file/states/.*: Not a dir"):
            write(states, 1, head(1))

    def test_a_folder_in_use(self, trained, folder):
        with pytest.raises(EngineError, match=r"already holds states.bin; use another folder"):
            ClientStates(folder, 10)

    def test_a_full_disk_while_a_state_is_written(self, trained, folder, monkeypatch):
        pwrite = os.pwrite
        written = []

        def fill(file, data, offset):
            if written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written.append(pwrite(file, data[:9], offset))
            return written[0]

        monkeypatch.setattr(os, "pwrite", fill)
        line = (
            rf"can't write the clients' state to {folder}/states.bin: No space left on device; "
            "client 3 needs 36 bytes there"  # 2 * 3 float32, an int64 and the checksum
        )
        with pytest.raises(EngineError, match=line):
            write(trained, 3, head(5))
        assert written == [9]
        assert_same(trained.read(3), head(1))

    def test_a_file_that_cannot_be_opened(self, trained, folder):
        (folder / "states.bin").unlink()
        (folder / "states.bin").mkdir()
        with pytest.raises(EngineError, match=r"states.bin: Is a directory; client 3 needs 36"):
            write(trained, 3, head(1))

    def test_a_full_disk_while_the_schema_is_written(self, states, folder, monkeypatch):
        def fill(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "link", fill)
            with pytest.raises(EngineError, match=r"to .*schema.json: No space left on device"):
                write(states, 3, head(5))
        assert not list(folder.iterdir())
        write(states, 3, head(5))

    def test_a_full_disk_while_versions_are_written(self, trained, folder, monkeypatch):
        write(trained, 3, head(2))

        def fill(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", fill)
            with pytest.raises(EngineError, match=r"versions.npy: No space left on device"):
                trained.commit([3])
        for states in (trained, ClientStates.open(folder)):
            assert_same(states.read(3), head(1))
        trained.commit([3])
        assert_same(trained.read(3), head(2))

    def test_unknown_clients(self, states):
        for client in (-1, 10):
            with pytest.raises(AssertionError):
                states.commit([client])
        assert states.trained.tolist() == []
