"""The counter-based generator: published vectors, Triton's conversion, one mask everywhere."""

import pytest
import torch

from polyrank.errors import ConfigError
from polyrank.ops import philox
from polyrank.testing.tolerance import assert_close

CPU = torch.device("cpu")
# Random123 (Salmon et al.), kat_vectors, philox4x32 with 10 rounds: counter, key, output.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text):
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter, key, expected):
    assert philox.philox(words(counter), words(key)) == words(expected)
    tensors = [tuple(torch.tensor([w]) for w in words(text)) for text in (counter, key)]
    assert tuple(int(w) for w in philox.philox(*tensors)) == words(expected)


def test_numbers_lie_in_the_half_open_unit_interval():
    numbers = philox.uniform(11, torch.arange(100_000))
    assert numbers.dtype == torch.float32
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    # The largest and the smallest word by magnitude, as Triton converts them.
    assert float(torch.tensor(0x7FFFFFFF).float() * philox._TO_UNIT) < 1


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 2**63 + 5, 2**64 - 1])
def test_a_seed_is_its_64_bits(seed):
    index = torch.arange(50)
    signed = (seed + 2**63) % 2**64 - 2**63
    expected = philox.uniform(seed, index)
    assert torch.equal(philox.uniform(signed, index), expected)
    assert torch.equal(philox.uniform(torch.tensor(signed), index), expected)
    assert not torch.equal(philox.uniform(seed ^ 1, index), expected)
    assert not torch.equal(philox.uniform(seed ^ (1 << 40), index), expected)


def test_the_mask_is_the_same_in_pieces(monkeypatch):
    shape = torch.Size((37, 21))
    whole = philox.keep_mask(shape, 0.3, 5, CPU)
    assert torch.equal(whole.flatten(), philox.uniform(5, torch.arange(37 * 21)) >= 0.3)
    monkeypatch.setattr(philox, "_CHUNK_CPU", 100)
    assert torch.equal(philox.keep_mask(shape, 0.3, 5, CPU), whole)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_dropped_is_p(p):
    n = 200_000
    dropped = n - int(philox.keep_mask(torch.Size((n,)), p, 3, CPU).sum())
    assert abs(dropped - n * p) < 4 * (n * p * (1 - p)) ** 0.5


def test_masks_of_neighbouring_seeds_are_independent():
    a, b = (philox.keep_mask(torch.Size((40_000,)), 0.5, s, CPU).double() - 0.5 for s in (1, 2))
    assert abs(float((a * b).mean())) < 4 * 0.25 / 200


def test_dropout_keeps_the_mean_and_is_differentiable():
    x = torch.ones(200, 500, dtype=torch.float64, requires_grad=True)
    out = philox.dropout(x, 0.2, 9)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, grad)
    assert set(out.detach().unique().tolist()) == {0.0, 1.25}
    assert_close(out.mean(), 1.0, tol=5e-3, reason="mean of 1e5 draws of std 0.5: 3 sigma")


def test_zero_probability_keeps_everything():
    assert philox.keep_mask(torch.Size((1000,)), 0.0, 1, CPU).all()
    assert philox.keep_mask(torch.Size((0, 3)), 0.5, 1, CPU).shape == (0, 3)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_impossible_probabilities_are_refused(p):
    with pytest.raises(ConfigError, match="0 turns it off"):
        philox.keep_mask(torch.Size((3,)), p, 0, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**40 + 3, 2**63 + 5])
def test_triton_draws_the_same_mask(seed, monkeypatch):
    shape, device = torch.Size((301, 1001)), torch.device("cuda")
    expected = philox.keep_mask(shape, 0.3, seed, CPU)
    assert torch.equal(philox.keep_mask(shape, 0.3, seed, device).cpu(), expected)
    monkeypatch.setattr(philox, "find_spec", lambda name: None)
    assert torch.equal(philox.keep_mask(shape, 0.3, seed, device).cpu(), expected)
