"""osf and full in one's own loop: projections, the end of a task, what is refused in time."""

import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.frame import keyed
from polyrank.layers import adapter_of
from polyrank.parts.subspaces import nest


def net(layers=2, rank=12):
    """Layers of 12 × 12 with a tanh between; the first weight may have few singular values."""
    model = nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(12, 12), nn.Tanh())])
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.copy_(torch.randn(param.shape, generator=keyed("loop", number)) / 12**0.5)
        U, S, V = torch.linalg.svd(model[0].weight)
        model[0].weight.copy_((U[:, :rank] * S[:rank]) @ V[:rank])
    return model


def start(base=None, name="osf", targets=("0", "2"), **options):
    pattern = options.pop("rank_pattern", {})
    base = net() if base is None else base
    made = pr.method(name, **options)
    return pr.adapt(base, made, list(targets), seed=0, rank_pattern=pattern)


def train(model, steps=3, lr=1e-2, optimizer=None):
    made = optimizer or torch.optim.AdamW(pr.parameter_groups(model, lr=lr))
    attached = pr.attach(made, model, total=steps)
    model.train()
    for step in range(steps):
        x, y = torch.randn(2, 9, 12, generator=keyed("loop rows", step))
        (model(x) - y).square().mean().backward()
        made.step()
        made.zero_grad()
    attached.detach()
    model.eval()
    return made


def views(model):
    return adapter_of(model).layers


def test_directions_that_vanish_are_off_what_is_protected():
    model = start(net(rank=2), effective_rank=3, nested=True)
    view = views(model)[0]
    for param in view.module.parameters():
        param.requires_grad_(False)
    U, V = view.core.high_u.clone(), view.core.high_v.clone()
    before = view.weight() - (view.B * view.core.weight) @ view.A
    nest(view, U, V)
    one = torch.eye(9)
    for high, low in ((view.core.high_u, view.B), (view.core.high_v.mT, view.A.mT)):
        assert float((high.mT @ low).abs().max()) <= 1e-6
        assert float((low.mT @ low - one).abs().max()) <= 1e-6
    assert float((view.weight() - (view.B * view.core.weight) @ view.A - before).norm()) <= 1e-6


@pytest.mark.parametrize("small", [0, 2**16], ids=["alone", "together"])
@pytest.mark.parametrize("share", [0.25, 0.5], ids=["off", "kept"])
def test_what_has_not_moved_keeps_its_bits_however_coarse_the_products(share, small, monkeypatch):
    monkeypatch.setattr("polyrank.parts.projection.SMALL", small)
    model = start(net(), effective_rank=share)
    # Bases of three digits, as TF32 takes them.
    for view in views(model):
        for basis in (view.core.high_u, view.core.high_v):
            if basis is not None:
                basis.data = basis.bfloat16().float()
    made = torch.optim.SGD(pr.parameter_groups(model, lr=0.1), lr=0.1)
    attached = pr.attach(made, model)
    model.train()
    for _ in range(20):
        (model(torch.ones(1, 12)) * 0).sum().backward()
        made.step()
    attached.detach()
    for view in views(model):
        A0, B0, S0 = view.shadow
        assert all(map(torch.equal, (view.A, view.B, view.core.weight), (A0, B0, S0)))
