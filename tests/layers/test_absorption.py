"""Absorbing: other ranks from then on, a folded archive, weights that two modules share."""

import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.errors import MergeError
from polyrank.layers import absorb, adapter_of
from polyrank.testing import assert_close


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(7, 9), nn.Linear(9, 5)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def shaken(seed=0, model=None):
    model = model or pr.adapt(Net(), pr.method("lora", r=3), ["first", "second"], seed=0)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_of(model).named().values():
            p.copy_(torch.empty(p.shape).normal_(generator=rng) / 3)
    return model.eval()


def x():
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(5))


def test_layers_have_other_ranks_from_then_on(tmp_path):
    from peft import PeftModel

    model = shaken()
    expected, scales = model(x()), [v.scale for v in adapter_of(model).layers]
    absorb(model, archive=True, ranks={"second": 2})
    first, second = adapter_of(model).layers
    assert [tuple(v.A.shape) for v in (first, second)] == [(3, 7), (2, 9)]
    assert [tuple(v.B.shape) for v in (first, second)] == [(9, 3), (5, 2)]
    assert all(p.requires_grad for p in adapter_of(model).named().values())
    assert [v.scale for v in (first, second)] == scales
    assert_close(model(x()), expected)
    model = shaken(1, model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    assert [v.site.r for v in adapter_of(again).layers] == [3, 2]
    assert_close(again(x()), model(x()))


def test_a_folded_archive_never_holds_more_ranks_than_the_smaller_width(tmp_path):
    from peft import PeftModel

    model, sizes = shaken(), []
    for seed in range(4):
        shaken(seed, model)
        expected = model(x())
        absorb(model, archive="folded")
        assert_close(model(x()), expected)
        sizes.append([v.archive[0].shape[0] for v in adapter_of(model).layers])
    assert sizes == [[3, 3], [6, 5], [7, 5], [7, 5]]
    model.save_pretrained(tmp_path)
    assert_close(PeftModel.from_pretrained(Net(), str(tmp_path)).eval()(x()), model(x()))


def test_a_weight_that_two_modules_share_is_refused_before_anything_changes():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.third = nn.Linear(9, 5)
            self.third.weight = self.second.weight

    model = pr.adapt(Tied(), pr.method("lora", r=3), ["first", "second"], seed=0)
    shaken(0, model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(MergeError, match=r"weight at second is shared by 2 modules"):
        absorb(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
