"""Weights of experts from logits, and from ids."""

import math

import pytest
import torch

from polyrank.errors import ConfigError
from polyrank.parts import routers
from polyrank.parts.routers import Choice, gumbel, ids, per_sample, warn_of_idle_router
from polyrank.testing import assert_close


def logits(tokens=40, experts=6):
    torch.manual_seed(0)
    return torch.randn(tokens, experts, dtype=torch.float64) * 2


@pytest.mark.parametrize("k", range(1, 7))
def test_top_k_is_the_softmax_over_the_selected_logits(k):
    z = logits()
    w = Choice("softmax", k=k).weights(z)
    values, places = z.topk(k, dim=-1)
    assert_close(w, torch.zeros_like(w).scatter(-1, places, values.softmax(-1)))
    p = z.softmax(-1)
    kept = torch.zeros_like(p).scatter(-1, places, p.gather(-1, places))
    assert_close(w, kept / kept.sum(-1, keepdim=True))
    assert_close(w.sum(-1), torch.ones(len(z), dtype=w.dtype))
    assert ((w > 0).sum(-1) == k).all()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice("softmax", k=2), [0.5, 0.5, 0, 0]),
        (Choice("top1"), [0.25, 0, 0, 0]),
        (Choice("gumbel", tau=0.1), [1, 0, 0, 0]),
        (Choice("top_p", top_p=0.5), [0.25, 0.25, 0.25, 0]),
        (Choice("top_p", top_p=0.49), [0.25, 0.25, 0, 0]),
    ],
    ids=["softmax", "top1", "gumbel", "top_p", "top_p-below"],
)
def test_equal_logits_go_to_the_lower_index(choice, expected):
    z = torch.zeros(3, 4, dtype=torch.float64)
    expected = torch.tensor(expected, dtype=torch.float64).expand(3, 4)
    assert torch.equal(choice.weights(z), expected)
    assert torch.equal(choice.kept(z), expected > 0)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.8, 0.95])
@pytest.mark.parametrize("tau", [0.7, 1.0, 3.0])
def test_top_p_gathers_up_to_the_first_sum_above(top_p, tau):
    z = logits()
    w = Choice("top_p", tau=tau, top_p=top_p).weights(z)
    for row, found in zip(z.softmax(-1) / tau, w, strict=True):
        expected, mass = torch.zeros_like(row), 0.0
        for place in row.argsort(descending=True).tolist():
            expected[place] = row[place]
            mass += row[place].item()
            if mass > top_p:
                break
        assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("top_p", "tau"), [(1.0, 1.0), (0.8, 1.5)])
def test_top_p_keeps_all_where_no_sum_exceeds_it(top_p, tau, dtype):
    """Sums of probabilities pass 1 by rounding; a temperature above 1 keeps them below."""
    z = logits(2000).to(dtype) / 4
    assert Choice("top_p", tau=tau, top_p=top_p).kept(z).all()


def test_top_p_takes_one_expert_that_is_enough():
    z = torch.tensor([[0.0, 9.0, 0.0]])
    assert Choice("top_p", top_p=0.5).kept(z).tolist() == [[False, True, False]]


@pytest.mark.parametrize("kind", ["softmax", "top1", "gumbel", "top_p"])
def test_no_gradient_passes_through_the_choice(kind):
    choice = Choice(kind, k=2, top_p=0.6)
    z = logits().requires_grad_(True)
    direction = torch.randn_like(z)
    w = choice.weights(z)
    on = choice.kept(z).double()
    p = z.softmax(-1) * on
    expected = {
        "softmax": p / p.sum(-1, keepdim=True),
        "top1": p,
        "gumbel": on + 0 * z,
        "top_p": p,
    }[kind]
    assert_close(w, expected)
    want = torch.autograd.grad((expected * direction).sum(), z)[0]
    got = (
        torch.autograd.grad((w * direction).sum(), z)[0] if w.requires_grad else torch.zeros_like(z)
    )
    assert_close(got, want)


def test_gumbel_softmax_with_noise():
    z = logits()
    noise = gumbel(z.shape, 5, z.device)
    assert_close(Choice("gumbel", tau=0.1).weights(z, noise), ((z + noise) * 10).softmax(-1))


def test_gumbel_noise_has_its_law_and_depends_on_its_key_alone():
    state = torch.get_rng_state()
    noise = gumbel(torch.Size((200, 1000)), 3, torch.device("cpu"))
    assert torch.equal(noise, gumbel(torch.Size((200, 1000)), 3, torch.device("cpu")))
    assert not torch.equal(noise, gumbel(torch.Size((200, 1000)), 4, torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), state)
    assert noise.isfinite().all()
    # 2e5 draws: standard errors 0.003 and 0.008.
    assert abs(noise.mean().item() - 0.5772) < 0.015
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.04


def test_gumbel_argmax_draws_from_the_softmax():
    z = torch.tensor([0.3, -1.0, 1.2, 0.0])
    noise = gumbel(torch.Size((200_000, 4)), 11, z.device)
    share = (z + noise).argmax(-1).bincount(minlength=4) / 200_000
    assert (share - z.softmax(-1)).abs().max() < 0.006


def test_ids_of_both_shapes():
    for shape in ((3,), (3, 1)):
        found = ids(torch.tensor([0, 2, 1], dtype=torch.int32).view(shape), 3, "here")
        assert found.dtype == torch.int64
        assert found.tolist() == [0, 2, 1]
    assert ids(torch.zeros(0, 1, dtype=torch.long), 3, "here").shape == (0,)


def test_ids_in_inference_mode():
    with torch.inference_mode():
        assert ids(torch.tensor([[1]]), 2, "here").tolist() == [1]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (None, "here: got no condition; pass integers 0..2 of shape"),
        (torch.tensor(1), r"shape \(\)"),
        (torch.zeros(2, 1, 1, dtype=torch.long), r"shape \(2, 1, 1\)"),
        (torch.tensor([True]), "dtype torch.bool"),
        (torch.tensor([1.0]), "dtype torch.float32"),
        (torch.tensor([[1], [3]]), "got ids 1..3, expected 0..2"),
        (torch.tensor([[-2]]), "got ids -2..-2"),
    ],
    ids=["missing", "0-d", "3-d", "bool", "float", "high", "negative"],
)
def test_ids_refuse_and_say_what_to_pass(condition, message):
    with pytest.raises(ConfigError, match=message) as error:
        ids(condition, 3, "here")
    assert 'into the batch under "condition"' in str(error.value)


def test_ids_are_looked_at_once_a_forward_and_again_when_changed(monkeypatch):
    seen = []
    real = torch.Tensor.aminmax
    monkeypatch.setattr(
        torch.Tensor, "aminmax", lambda self, *a, **k: seen.append(1) or real(self, *a, **k)
    )
    monkeypatch.setattr(routers, "_checked", None)
    condition = torch.tensor([[0], [1]])
    for _ in range(5):
        ids(condition, 2, "here")
    assert len(seen) == 1
    with pytest.raises(ConfigError):
        ids(condition, 1, "elsewhere")
    condition[0] = 1
    ids(condition, 2, "here")
    assert len(seen) == 3


def test_per_sample_keeps_tokens_with_their_sample():
    x = torch.arange(24).view(12, 2)
    assert torch.equal(per_sample(x, 3, "here"), x.view(3, 4, 2))
    assert torch.equal(per_sample(x.view(6, 2, 2), 3, "here"), x.view(3, 4, 2))
    assert per_sample(x[:0], 0, "here").shape == (0, 0, 2)
    with pytest.raises(ConfigError, match="12 tokens for a condition of 5 samples"):
        per_sample(x, 5, "here")
    with pytest.raises(ConfigError, match="12 tokens for a condition of 0 samples"):
        per_sample(x, 0, "here")


@pytest.mark.parametrize(("k", "block", "r"), [(1, 1, 8), (4, 4, 8)])
def test_an_idle_router_is_warned_of(k, block, r):
    with pytest.warns(UserWarning, match=f"k: got {k}, one expert a token"):
        warn_of_idle_router(k, block, r)


@pytest.mark.parametrize(("k", "block", "r"), [(2, 1, 8), (8, 4, 8), (4, 4, 4), (1, 1, 1)])
def test_a_router_that_learns_or_has_no_choice_is_not(k, block, r):
    warn_of_idle_router(k, block, r)
