"""Values of routing losses where they are known."""

import math

import pytest
import torch

from polyrank.parts.losses import Charge, balance, localized, z_square
from polyrank.parts.routers import Choice
from polyrank.testing import assert_close

F64 = torch.float64


def logits(experts=6):
    torch.manual_seed(0)
    return torch.randn(3, 9, experts, dtype=F64)


def kept(z, k):
    return Choice("softmax", k=k).kept(z)


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_equal_logits_give_k_whatever_the_tie_break(k):
    z = torch.zeros(3, 9, 6, dtype=F64)
    assert_close(balance(z, kept(z, k), None), torch.tensor(float(k), dtype=F64))
    scattered = torch.rand(3, 9, 6).argsort(-1) < k
    assert_close(balance(z, scattered, None), torch.tensor(float(k), dtype=F64))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_collapse_onto_the_same_experts_gives_the_count_of_experts(k):
    z = torch.full((3, 9, 6), -800.0, dtype=F64)
    z[..., 1 : 1 + k] = 0
    assert_close(balance(z, kept(z, k), None), torch.tensor(6.0, dtype=F64))


def test_equal_logits_give_the_square_of_the_log_of_the_count():
    z = torch.zeros(3, 9, 6, dtype=F64)
    assert_close(z_square(z, None), torch.tensor(math.log(6) ** 2, dtype=F64))


def test_a_constant_on_all_logits_moves_the_z_loss_alone():
    z = logits()
    shift = torch.randn(3, 9, 1, dtype=F64)
    assert_close(balance(z + shift, kept(z + shift, 2), None), balance(z, kept(z, 2), None))
    assert (z_square(z + shift, None) - z_square(z, None)).abs() > 0.01
    level = z - z.logsumexp(-1, keepdim=True)
    assert z_square(level, None) < 1e-24


def test_the_gradient_of_balance_flows_through_the_probabilities_alone():
    z = logits().requires_grad_(True)
    share = kept(z, 2).double().mean((0, 1))
    expected = 6 * (share * z.softmax(-1).mean((0, 1))).sum()
    (want,) = torch.autograd.grad(expected, z)
    (got,) = torch.autograd.grad(balance(z, kept(z, 2), None), z)
    assert_close(got, want)


def test_following_the_gradient_evens_the_load():
    torch.manual_seed(0)
    x = torch.randn(512, 8, dtype=F64) + 0.7
    W = torch.randn(6, 8, dtype=F64, requires_grad=True)

    def spread():
        return kept(x @ W.T, 2).double().mean(0).std().item()

    before = spread()
    for _ in range(200):
        z = x @ W.T
        (grad,) = torch.autograd.grad(balance(z, kept(z, 2), None), W)
        with torch.no_grad():
            W -= 0.5 * grad
    assert spread() < before / 3


@pytest.mark.parametrize(
    "loss", [lambda z, m: balance(z, kept(z, 2), m), z_square], ids=["balance", "z"]
)
def test_padding_does_not_count(loss):
    z = logits()
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    assert_close(loss(z, mask), loss(z[mask], None))
    assert loss(z, torch.zeros_like(mask)) == 0
    assert loss(z[:0], None) == 0


def test_localized_balance_of_even_weights_is_zero():
    w = torch.full((4, 7, 6), 1 / 6, dtype=F64)
    types = torch.tensor([0, 1, 1, 0])
    assert localized(w, types, None, 0.0) < 1e-24
    assert localized(w, types, None, 0.1) > 1e-3


def test_localized_balance_by_hand():
    w = torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]]], dtype=F64)
    share = torch.tensor([0.75 * 1.1, 0.25 * 0.9, 0.5 * 0.9, 0.5 * 1.1], dtype=F64)
    expected = share.var() / (share.mean() ** 2 + 1e-10)
    assert_close(localized(w, torch.tensor([1, 0]), None, 0.1), expected)


def test_localized_balance_does_not_see_types_and_halves_swapped():
    w = logits().softmax(-1)
    types = torch.tensor([0, 1, 1])
    swapped = w.roll(3, dims=-1)
    assert_close(localized(swapped, 1 - types, None, 0.3), localized(w, types, None, 0.3))
    assert (localized(swapped, types, None, 0.3) - localized(w, types, None, 0.3)).abs() > 1e-3
    inside = w[..., [1, 2, 0, 5, 3, 4]]
    assert_close(localized(inside, types, None, 0.3), localized(w, types, None, 0.3))


def test_localized_balance_of_a_single_type_and_of_a_single_entry():
    w = logits().softmax(-1)
    assert localized(w, torch.ones(3, dtype=torch.long), None, 0.3) > 0
    assert localized(w[:1, :, :1], torch.tensor([1]), None, 0.3) == 0


def test_localized_balance_leaves_padding_out():
    w = logits().softmax(-1)
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    types = torch.tensor([0, 1, 1])
    zeroed = w.clone()
    zeroed[~mask] = 0
    assert_close(localized(w, types, mask, 0.2), localized(zeroed, types, None, 0.2))


def test_a_charge_is_due_if_any_coefficient_is_not_zero():
    assert not Charge(first=True, gap=0.1).due()
    assert Charge(balance=0.1).due()
    assert Charge(z=0.1).due()
    assert Charge(localized=0.1).due()
