"""States by the content of rows, their file, and the ends of vector loops."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from polyrank.engine.prefix_store import Shape, in_memory, on_disk, row_digests
from polyrank.engine.prefix_tails import _EXACT, Loop, Tails, even
from polyrank.frame import keyed

COUNT, ROW = 6, (5, 3)


def states(dtype=torch.float32):
    return torch.randn(COUNT, *ROW, generator=keyed("states")).to(dtype)


def digests():
    return row_digests({"x": torch.arange(COUNT)})


def stored(folder, values, key="a", limit=10**6):
    shape = Shape(COUNT, ROW, values.dtype)
    return on_disk(digests(), shape, lambda: values.split(4), {"key": key}, folder, limit)


# --- rows -----------------------------------------------------------------------------------------


def test_equal_rows_have_equal_digests_wherever_they_stand():
    x, y = torch.randn(6, 2, 3), torch.randint(9, (6,))
    found = row_digests({"x": x, "y": y})
    order = [4, 1, 1]
    assert row_digests({"y": y[order], "x": x[order]}) == [found[i] for i in order]
    assert len(set(found)) == 6


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.tensor([[1, 2], [3, 5]])},
        {"x": torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)},
        {"x": torch.tensor([[[1], [2]], [[3], [4]]])},
        {"z": torch.tensor([[1, 2], [3, 4]])},
        {"x": torch.tensor([[1, 2], [3, 4]]), "scale": 2},
        {"x": torch.tensor([[1, 2], [3, 4]]), "mask": torch.ones(2)},
    ],
    ids=["value", "dtype", "shape", "name", "number", "tensor"],
)
def test_whatever_differs_changes_the_digest(other):
    assert row_digests(other)[1] != row_digests({"x": torch.tensor([[1, 2], [3, 4]])})[1]


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": torch.ones(2, 3), "y": torch.ones(3)},
        {"x": torch.tensor(1.0)},
        {"x": 3},
        {"x": torch.ones(0, 3)},
    ],
    ids=["two counts", "scalar", "no tensor", "no row"],
)
def test_inputs_without_rows_have_no_digests(inputs):
    assert row_digests(inputs) is None


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_states_come_back_bit_by_bit(tmp_path, dtype, place):
    values = states(dtype)
    if place == "memory":
        found = in_memory(digests(), Shape(COUNT, ROW, dtype), values.split(4))
    else:
        found = stored(tmp_path, values)
    picked = [digests()[i] for i in (5, 0, 0, 3)]
    taken = found.take(picked)
    assert taken.dtype == dtype
    assert torch.equal(taken, values[[5, 0, 0, 3]])
    # What is taken is a copy: what a block writes into it does not come back.
    taken.zero_()
    assert torch.equal(found.take(picked), values[[5, 0, 0, 3]])
    assert found.take([*picked, b"unknown"]) is None


def test_the_file_is_one_that_everybody_reads(tmp_path):
    values = states()
    stored(tmp_path, values)
    [file] = tmp_path.glob("prefix-*/*.safetensors")
    assert torch.equal(load_file(file)["states"], values)


def test_a_file_is_whole_or_not_there(tmp_path):
    def broken():
        yield states()[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_disk(digests(), Shape(COUNT, ROW, torch.float32), broken, {}, tmp_path, 10**6)
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_shape_is_made_anew(tmp_path, caplog):
    values = states()
    stored(tmp_path, values)
    [file] = tmp_path.glob("prefix-*/*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(stored(tmp_path, values).take(digests()), values)
    assert "made anew" in caplog.text


def test_the_file_used_longest_ago_makes_room(tmp_path):
    values = states()
    size = stored(tmp_path, values).shape.bytes
    [file] = tmp_path.glob("prefix-*/*.safetensors")
    room = 2 * file.stat().st_size + size - 1
    kept = [stored(tmp_path, values, key, room).place for key in "abab"]
    newest = stored(tmp_path, values, "c", room).place
    left = {str(path) for path in tmp_path.glob("prefix-*")}
    assert left == {kept[1], newest}


# --- ends of vector loops -------------------------------------------------------------------------


def loops_of(function, shape, rows):
    tails = Tails(rows)
    with tails:
        function(torch.randn(shape))
    return tails.loops


def test_loops_with_a_rest_of_other_bits_are_noted():
    assert loops_of(F.silu, (4, 5, 6), 4) == {Loop(30, 0)}
    assert loops_of(lambda x: x.mul(2).sigmoid_(), (4, 5, 6), 4) == {Loop(30, 0)}
    assert loops_of(lambda x: F.gelu(x.view(20, 6)), (4, 5, 6), 4) == {Loop(30, 0)}
    assert loops_of(lambda x: F.silu(x.chunk(2, -1)[0]), (4, 5, 6), 4) == {Loop(15, 3)}
    assert loops_of(lambda x: F.glu(x), (4, 5, 6), 4) == {Loop(15, 0)}


def test_what_is_exact_or_not_made_of_the_batch_is_not_noted():
    assert not loops_of(lambda x: (x * 2 + 1).relu().tanh().rsqrt(), (4, 5, 6), 4)
    assert not loops_of(lambda x: x.softmax(-1) @ x.mT, (4, 5, 6), 4)
    assert not loops_of(F.silu, (1, 5, 6), 4)
    assert not loops_of(lambda x: x > 0, (4, 5, 6), 4)


@pytest.mark.parametrize(
    ("row", "line", "rows", "threads", "expected"),
    [
        (64, 0, 1, 1, True),
        (40, 0, 1, 1, False),
        (40, 0, 8, 1, True),
        (98304, 0, 32, 2, True),
        (98304, 0, 32, 7, False),
        (64, 0, 3, 2, False),
        (96, 96, 64, 1, False),
        (128, 64, 64, 1, True),
    ],
)
def test_a_batch_is_even_if_every_thread_gets_whole_vectors(row, line, rows, threads, expected):
    assert even([Loop(row, line)], rows, threads) is expected
    assert even([Loop(64, 0), Loop(row, line)], rows, 1) is (expected or threads > 1)


@pytest.mark.parametrize(
    "name",
    sorted(
        _EXACT
        & {
            "abs",
            "cos",
            "erf",
            "exp",
            "expm1",
            "log1p",
            "neg",
            "reciprocal",
            "relu",
            "rsqrt",
            "sin",
            "sqrt",
            "square",
            "tanh",
        }
    ),
)
def test_what_counts_as_exact_has_the_same_bits_one_by_one(name):
    values = torch.randn(4096, generator=keyed(name)).abs() + 1e-3
    whole = getattr(torch, name)(values)
    alone = torch.cat([getattr(torch, name)(part.clone()) for part in values.split(7)])
    assert torch.equal(alone, whole)
