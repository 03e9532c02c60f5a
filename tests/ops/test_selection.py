"""Which ranks are on: ties by the lower index, on every way to find the best."""

import pytest
import torch

from polyrank.ops.rank_gate import NonFiniteError, selection
from polyrank.ops.rank_gate.selection import largest, largest_fast

WAYS = {"numpy": 10**6, "topk": 0}


def by_hand(score, k):
    on = torch.zeros(score.shape, dtype=torch.bool)
    for row, out in zip(score.tolist(), on, strict=True):
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        out[order[:k]] = True
    return on


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(selection, "_NUMPY_THREADS", WAYS[request.param])


@pytest.mark.parametrize("k", [1, 3, 7, 12])
@pytest.mark.parametrize("levels", [1, 2, 5, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_equal_scores_the_lower_index_is_on(way, k, levels, dtype):
    score = torch.randint(-levels, levels, (50, 12)).to(dtype) / 7
    expected = by_hand(score, k)
    assert torch.equal(largest(score, k), expected)
    fast = largest_fast(score, k)
    assert fast.dtype == dtype
    assert torch.equal(fast, expected.to(dtype))


def test_a_tie_with_zeros_of_either_sign(way):
    score = torch.tensor([[0.0, -0.0, 0.0, -0.0, -1.0]])
    for k in range(1, 5):
        expected = torch.arange(5)[None] < k
        assert torch.equal(largest(score, k), expected)
        assert torch.equal(largest_fast(score, k), expected.float())


def test_scratch_spares_memory_and_strided_scores_work(way):
    wide = torch.randn(20, 30)
    score = wide[:, 9:21]
    expected = by_hand(score, 4).float()
    assert torch.equal(largest_fast(score, 4), expected)
    owned = score.clone()
    assert largest_fast(owned, 4, scratch=True) is owned
    assert torch.equal(owned, expected)


def test_no_tokens_and_more_ranks_than_there_are(way):
    assert largest_fast(torch.empty(0, 8), 3).shape == (0, 8)
    assert largest(torch.empty(0, 8), 3).shape == (0, 8)
    assert largest(torch.randn(4, 8), 9).all()
    assert largest_fast(torch.randn(4, 8), 9).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    score = torch.randn(5, 4)
    score[2, 1] = bad
    with pytest.raises(NonFiniteError, match=r"1 of 5 tokens.*look for"):
        largest(score, 2)
    with pytest.raises(ValueError, match="not finite"):
        selection.check_finite(score)


def test_a_sum_that_overflows_is_no_fault():
    selection.check_finite(torch.full((4, 8), 3e38))
