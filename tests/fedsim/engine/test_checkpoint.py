"""What a checkpoint holds comes back as it was, and nothing else is taken for one."""

import json
import logging
import os
import warnings
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAdam
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

import fedsim
from fedsim.engine import arrays_file, flower
from fedsim.engine.checkpoint import Checkpoint, attributes, digest, has_data, restore
from fedsim.errors import EngineError
from fedsim.simulation import load_federation
from strategies import FedAvg, FedLabel

KEYS = st.one_of(st.text(max_size=5), st.integers())
ARRAYS = hnp.arrays(
    st.one_of(
        hnp.boolean_dtypes(),
        hnp.integer_dtypes(endianness="="),
        hnp.floating_dtypes(endianness="=", sizes=(16, 32, 64)),
    ),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), ARRAYS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=8,
)


def checkpoint(**changes):
    arrays = flower.to_record({"w": np.arange(6, dtype=np.float32).reshape(2, 3)})
    standard = {
        "round": 3,
        "arrays": arrays,
        "strategy": {},
        "versions": np.array([-1, 2, 0], np.int8),
        "data": "abc",
        "record": {},
    }
    return Checkpoint(**standard | changes)


def written(tmp_path, content):
    file = Path(tmp_path) / "x.safetensors"
    file.write_bytes(content)
    return file


def again(tmp_path, **changes):
    return Checkpoint.read(written(tmp_path, checkpoint(**changes).to_bytes()))


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()
    else:
        assert found == expected or (found != found and expected != expected)


class Odd(FedAvg):
    """Carries what no file can hold."""

    def __init__(self):
        super().__init__()
        self.log = logging.getLogger("odd")
        self.best = 0.5
        self.measure = len
        self.half = partial(max, 1)


class TestCheckpoint:
    @settings(max_examples=100)
    @given(st.dictionaries(st.text(max_size=5), VALUES, max_size=3))
    def test_values_come_back_as_they_were(self, tmp_path_factory, values):
        found = again(tmp_path_factory.mktemp("x"), strategy=values, record=values)
        assert_same(found.strategy, values)
        assert_same(found.record, values)

    def test_all_of_it_comes_back(self, tmp_path):
        found = again(tmp_path)
        assert (found.round, found.data) == (3, "abc")
        assert found.versions.tolist() == [-1, 2, 0]
        assert found.versions.dtype == np.int8
        assert found.arrays == checkpoint().arrays

    def test_arrays_of_another_byte_order_add_up(self, tmp_path):
        file = tmp_path / "arrays.safetensors"
        file.write_bytes(arrays_file.to_bytes({"a": np.arange(5, dtype=">f4")}))
        arrays, _ = arrays_file.read(file)
        np.testing.assert_array_equal(arrays["a"], [0, 1, 2, 3, 4])

    def test_arrays_keep_their_type_and_may_lie_in_memory_in_any_order(self, tmp_path):
        fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
        turned = np.arange(6, dtype=np.int32).reshape(2, 3).T
        record = ArrayRecord({"a": Array(fortran), "b": Array(turned)})
        values = {"list": [fortran, turned[:, ::2]], "number": np.float64(1.5)}
        found = again(tmp_path, arrays=record, strategy=values)
        assert_same(flower.arrays_of(found.arrays)["a"], np.arange(6.0).reshape(2, 3))
        assert_same(flower.arrays_of(found.arrays)["b"], np.array(turned, order="C"))
        assert_same(found.strategy, values)

    def test_tensors_come_back(self, tmp_path):
        tensor = torch.arange(6.0).reshape(2, 3).T
        found = again(tmp_path, strategy={"x": tensor}).strategy["x"]
        assert torch.equal(found, tensor)
        found += 1  # its own memory, and writable


class TestStrategies:
    def test_attributes_go_from_one_strategy_to_another(self, tmp_path):
        one, other = FedAdam(eta=0.5), FedAdam()
        one.m_t = {"w": np.ones(2)}
        one.current_arrays = {"w": np.zeros(2, np.float32)}
        restore(other, again(tmp_path, strategy=attributes(one)).strategy)
        assert other.eta == 0.5
        assert_same(other.m_t, one.m_t)
        assert_same(other.current_arrays, one.current_arrays)
        assert other.v_t is None
        assert other.train_metrics_aggr_fn is one.train_metrics_aggr_fn

    def test_so_do_those_of_a_strategy_inside_another(self, tmp_path):
        def wrapped():
            return DifferentialPrivacyServerSideAdaptiveClipping(FedAdam(), 1.0, 50)

        one, other = wrapped(), wrapped()
        one.clipping_norm = 0.25
        one.strategy.m_t = {"w": np.ones(2)}
        inner = other.strategy
        restore(other, again(tmp_path, strategy=attributes(one)).strategy)
        assert other.clipping_norm == 0.25
        assert other.strategy is inner
        assert_same(inner.m_t, one.strategy.m_t)

    def test_a_mapping_that_cannot_be_changed_is_saved_too(self, tmp_path):
        one, other = FedLabel(aggregation="single"), FedLabel()
        restore(other, again(tmp_path, strategy=attributes(one)).strategy)
        assert dict(other.weights) == dict(one.weights)

    def test_our_own_forget_the_model_once_it_is_averaged(self):
        strategy = FedAvg()
        strategy.complete(checkpoint().arrays)
        assert not attributes(strategy)["sent"]

    def test_what_no_file_can_hold_is_left_out_with_a_warning(self):
        with pytest.warns(UserWarning, match=r"don't hold Odd.log \(a Logger\): a resumed run"):
            found = attributes(Odd())
        assert found["best"] == 0.5
        assert not {"log", "measure", "half"} & set(found)

    @pytest.mark.parametrize(
        ("value", "what"),
        [
            (np.array([None]), "an array of object"),
            (np.zeros(2, np.complex64), "an array of complex64"),
            ({(1, 2): 3}, "a dict with keys that aren't numbers or texts"),
            ([{1}], "a set"),
            (Counter(a=1), "a Counter"),
            ({"by class": defaultdict(int)}, "a defaultdict"),
            (torch.ones(1, requires_grad=True), "a Tensor"),
        ],
    )
    def test_so_are_these(self, value, what):
        strategy = FedAvg()
        strategy.x = value
        with pytest.warns(UserWarning, match=rf"FedAvg.x \({what}\)"):
            assert "x" not in attributes(strategy)

    def test_of_shipped_strategies_nothing_is_left_out(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for strategy in (FedAvg(), FedLabel(), FedAdam()):
                attributes(strategy)


class TestDigest:
    def federation(self, **changes):
        return load_federation(
            fedsim.Experiment(clients={"count": 4, "partition": "dirichlet", **changes})
        )

    def test_the_same_data_have_the_same(self):
        assert digest(self.federation()) == digest(self.federation())

    @pytest.mark.parametrize("changes", [{"alpha": 0.4}, {"labelled": 0.5}, {"count": 5}])
    def test_data_dealt_out_otherwise_have_another(self, changes):
        assert digest(self.federation(**changes)) != digest(self.federation())

    @pytest.mark.parametrize("name", ["x_train", "y_train", "x_test", "y_test"])
    def test_other_examples_have_another(self, name):
        changed = self.federation()
        array = getattr(changed.source, name)
        for index in (0, 700, -1) if name.endswith("train") else (0, 200, -1):
            array[index] += 1
            assert digest(changed) != digest(self.federation())
            array[index] -= 1
        assert digest(changed) == digest(self.federation())

    def test_of_many_bytes_evenly_spaced_examples_are_seen(self, monkeypatch):
        # 1437 examples of 64 bytes: each third one.
        monkeypatch.setattr("fedsim.engine.checkpoint._HASHED_BYTES", 500 * 64)
        federation = self.federation()
        x, before = federation.source.x_train, digest(federation)
        x[1] += 1
        assert digest(federation) == before
        for index in (3, 1434):
            x[index] += 1
            assert digest(federation) != before
            x[index] -= 1

    def test_that_of_an_older_fedsim_is_known(self):
        """It is of the first 100 examples, and without a mark; this one was written then."""
        federation = self.federation()
        old = checkpoint(data="2ecdc65e64ffedf8b3ca7648df564a06")
        assert has_data(old, federation, digest(federation))
        federation.source.x_test[99] += 1
        assert not has_data(old, federation, digest(federation))

    @pytest.mark.parametrize(
        "name", ["train_offsets", "train_index", "num_labelled", "test_offsets", "test_index"]
    )
    def test_so_does_each_part_of_who_holds_what(self, name):
        federation = self.federation()
        array = getattr(federation, name).copy()
        if name.endswith("index"):
            array[-2:] = array[:-3:-1]  # the same examples, in another order
        else:
            array[1] -= 1  # one of a client's goes to the next, or loses its label
        assert digest(replace(federation, **{name: array})) != digest(federation)

    def test_so_do_the_same_numbers_in_another_shape(self):
        federation = self.federation()
        source = federation.source
        parts = {name: getattr(source, name) for name in ("x_train", "x_test")}
        wide = replace(source, **{name: x.reshape(len(x), 1, 4, 16) for name, x in parts.items()})
        assert digest(replace(federation, source=wide)) != digest(federation)


class TestCheckpointFailure:
    def test_no_file(self, tmp_path):
        with pytest.raises(EngineError, match=r"x.safetensors: can't be read: No such file"):
            Checkpoint.read(tmp_path / "x.safetensors")

    def test_a_folder(self, tmp_path):
        with pytest.raises(EngineError, match=r": can't be read: Is a directory"):
            Checkpoint.read(tmp_path)

    def test_a_file_cut_short_anywhere(self, tmp_path):
        content = checkpoint().to_bytes()
        file = written(tmp_path, content)
        for size in reversed(range(0, len(content), 7)):
            os.truncate(file, size)
            with pytest.raises(EngineError, match=r"x.safetensors is broken, or no checkpoint"):
                Checkpoint.read(file)

    @pytest.mark.parametrize(
        "metadata",
        [
            None,
            {"format": "pt"},
            {"format": "2", "description": "{}"},
            {"format": "1"},
            {"format": "1", "description": "{"},
            {"format": "1", "description": "[]"},
            {"format": "1", "description": '{"round": 1}'},
            {"format": "1", "description": '{"round": {"array": "w"}}'},
            {"format": "1", "description": '{"x": {"array": "nowhere"}}'},
            {"format": "1", "description": '{"x": {"array": "w", "list": []}}'},
        ],
    )
    def test_other_safetensors(self, tmp_path, metadata):
        file = written(tmp_path, save({"w": np.zeros(2)}, metadata))
        with pytest.raises(EngineError, match=r"x.safetensors is broken, or no checkpoint"):
            Checkpoint.read(file)

    def test_versions_that_are_no_slots(self, tmp_path):
        with pytest.raises(EngineError, match="its versions are no slots"):
            again(tmp_path, versions=np.array([3], np.int8))

    def test_nothing_in_it_is_run(self, tmp_path):
        """A pickle, wherever it stands, is bytes that mean nothing."""
        pickle = b"cos\nsystem\n(S'touch pwned'\ntR."
        description = json.dumps({"round": {"pickle": pickle.decode()}})
        for content in (
            pickle,
            save({"w": np.frombuffer(pickle, np.uint8)}, {"format": "1"}),
            save({"w": np.zeros(1)}, {"format": "1", "description": description}),
        ):
            with pytest.raises(EngineError, match="is broken, or no checkpoint"):
                Checkpoint.read(written(tmp_path, content))
        assert not Path("pwned").exists()

    @pytest.mark.parametrize("damage", ["bit", "zeros", "metadata"])
    def test_damage_is_noticed(self, tmp_path, damage):
        arrays = flower.to_record({"w": np.arange(1000, dtype=np.float32)})
        content = bytearray(checkpoint(arrays=arrays).to_bytes())
        if damage == "bit":
            content[-700] ^= 4
        elif damage == "zeros":
            content[-2000:] = bytes(2000)
        else:
            at = content.index(b'\\"data\\": \\"abc')
            content[at + 12] ^= 1
        with pytest.raises(EngineError, match=r"x.safetensors is broken.*its checksum differs"):
            Checkpoint.read(written(tmp_path, content))


def test_a_checkpoint_without_a_checksum_can_be_read(tmp_path):
    """As an older fedsim wrote it."""
    arrays, metadata = arrays_file.read(written(tmp_path, checkpoint().to_bytes()))
    found = Checkpoint.read(written(tmp_path, save(arrays, metadata)))
    assert found.arrays == checkpoint().arrays
