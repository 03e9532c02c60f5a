"""Squares of per-sample gradients from one backward, against one backward a sample."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import polyrank as pr
from polyrank.layers import append, grow_head
from polyrank.parts.fisher import measured
from polyrank.parts.per_sample import squared_sums
from polyrank.testing import MODELS, assert_close

ROWS = 3


class Net(nn.Module):
    """Tokens, a layer that is called twice, and a classifier."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 6)
        self.classifier = nn.Linear(6, 4)

    def forward(self, x):
        h = self.second(self.second(self.first(x).tanh()).tanh())
        return self.classifier(h.mean(1))


class Flat(Net):
    """As some models do: the tokens of all samples in one row."""

    def forward(self, x):
        h = self.second(self.first(x.reshape(-1, 5)).tanh())
        return self.classifier(h.reshape(len(x), -1, 6).mean(1))


def adapted(net=Net, method="lora", head=False, **options):
    torch.manual_seed(0)
    made = pr.method(method, **{"r": 2, **options})
    place = {"head": "classifier"} if head else {}
    model = pr.adapt(net(), made, ["first", "second"], seed=0, **place).to(torch.float64)
    if head:
        grow_head(model, ["a", "b", "c", "d"])
        model.to(torch.float64)
    drawn(model)
    return model.eval()


def drawn(model):
    with torch.no_grad():
        for p in pr.adapter_of(model).named().values():
            p.normal_(0, 0.5)


def both_ways(model, params, forward, labels):
    """(Σ g² from one backward, Σ g² from a loop, batches that were asked for)."""
    asked = []

    def grads(rows):
        asked.append(len(labels[rows]))
        loss = F.cross_entropy(forward(rows), labels[rows])
        return torch.autograd.grad(loss, params)

    found = squared_sums(pr.adapter_of(model), params, len(labels), lambda: grads(slice(None)))
    batches = list(asked)
    loop = [grads(slice(i, i + 1)) for i in range(len(labels))]
    return found, [sum(g.square() for g in column) for column in zip(*loop, strict=True)], batches


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def inputs():
    torch.manual_seed(1)
    return torch.randn(ROWS, 7, 5, dtype=torch.float64), torch.tensor([0, 3, 1])


@pytest.mark.parametrize("space", ["factors", "weights"])
@pytest.mark.parametrize("head", [False, True])
def test_one_backward_gives_what_a_loop_gives(space, head):
    model = adapted(head=head)
    x, labels = inputs()
    before = hooks(model)
    with measured(pr.adapter_of(model), space, head) as places:
        params = [p for p, _ in places.values()]
        found, loop, asked = both_ways(model, params, lambda rows: model(x[rows]), labels)
    assert asked == [ROWS]
    assert len(found) == (4 if space == "factors" else 2) + 2 * head
    for got, want in zip(found, loop, strict=True):
        assert_close(got, want, dtype=torch.float32 if head else None)
    assert hooks(model) == before


def test_a_bank_is_read_and_does_not_train():
    model = adapted()
    append(model, 3)
    model.to(torch.float64)
    drawn(model)
    x, labels = inputs()
    params = list(pr.adapter_of(model).named().values())
    found, loop, _ = both_ways(model, params, lambda rows: model(x[rows]), labels)
    for got, want in zip(found, loop, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_in_transformers(name):
    tiny = MODELS[name]
    model = pr.adapt(tiny.build(torch.float64), pr.method("lora", r=2), seed=0).to(torch.float64)
    drawn(model)
    batch = tiny.inputs(0, torch.float64)
    labels = batch.pop("labels")
    params = list(pr.adapter_of(model).named().values())

    def forward(rows):
        return model(**{k: v[rows] for k, v in batch.items()}).logits

    found, loop, _ = both_ways(model, params, forward, labels)
    assert len(found) == len(params) > 8
    for got, want in zip(found, loop, strict=True):
        assert_close(got, want, tol=1e-9, reason="padded and unpadded attention round differently")


def test_what_it_does_not_know_it_leaves_to_the_loop():
    x, labels = inputs()
    for model in (
        adapted(method="smora", r=4, k=2),
        adapted(Flat),
    ):
        params = list(pr.adapter_of(model).named().values())
        found, _, _ = both_ways(model, params, lambda rows, m=model: m(x[rows]), labels)
        assert found is None
    model = adapted()
    strange = [*pr.adapter_of(model).named().values(), model.base_model.model.classifier.weight]
    strange[-1].requires_grad_(True)
    found, _, _ = both_ways(model, strange, lambda rows: model(x[rows]), labels)
    assert found is None
