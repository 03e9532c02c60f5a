"""Leading ranks only: what a forward reads, what learns, and what is cut for good."""

import pytest
import torch
from peft import PeftModel
from torch import nn

import polyrank as pr
from polyrank.errors import ConfigError, MergeError
from polyrank.frame import Identity, Portion
from polyrank.layers import adapter_of, append, keep, replica, truncate, view
from polyrank.testing import assert_close


class Leading(Identity):
    """The first two ranks at double weight; the first of them is held."""

    kind = "none"

    @property
    def epilogue(self):
        return self.kind

    def portion(self):
        return Portion(2, 1, 2.0)

    def shortened(self, ranks):
        return 2.0


def adapted(kind="none", method="lora", r=4, core=Leading, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6)).double()
    model = pr.adapt(model, pr.method(method, r=r, **options), ["0"], seed=1).double()
    layer = adapter_of(model).layers[0]
    with torch.no_grad():
        layer.B.normal_(generator=torch.Generator().manual_seed(1))
    if core is not None:
        made = layer.module.polyrank_core["default"] = core(r)
        made.kind = kind
    return model, layer


def x():
    rng = torch.Generator().manual_seed(2)
    return torch.randn(3, 5, generator=rng, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("kind", ["none", "python"])
def test_a_portion_is_read_and_held_whatever_serves_the_core(kind):
    model, layer = adapted(kind)
    with torch.no_grad():
        layer.A[2:].fill_(torch.nan)
        layer.B[:, 2:].fill_(torch.nan)
    given = x()
    found = model(given)
    A, B = layer.A[:2].detach(), layer.B[:, :2].detach()
    base = layer.module.base_layer(given)
    assert_close(found, base + 2 * layer.scale * given @ A.T @ B.T)
    found.square().sum().backward()
    G = 2 * found.detach()
    assert_close(given.grad, G @ (layer.weight().double() + 2 * layer.scale * B @ A))
    for side, factor in enumerate((layer.A, layer.B)):
        kept = factor.grad.movedim(side, 0)
        assert kept[1].abs().min() > 0
        assert not kept[[0, 2, 3]].any()


@pytest.mark.parametrize("kind", ["none", "python"])
def test_a_replica_shows_its_portion_too(kind):
    model, layer = adapted(kind)
    replica(model, "slow")
    expected = model(x())
    with torch.no_grad():
        layer.B.zero_()
    with view(model, "slow"):
        assert_close(model(x()), expected)


def test_truncation_keeps_the_first_ranks_and_asks_the_core_for_the_scale(tmp_path):
    model, layer = adapted(core=None, r=4)
    scale, A = layer.scale, layer.A.detach().clone()
    B = layer.B.detach().clone()
    truncate(model, 3)
    cut = adapter_of(model).layers[0]
    assert torch.equal(cut.A, A[:3])
    assert torch.equal(cut.B, B[:, :3])
    assert cut.scale == scale
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(5, 6)).double(), str(tmp_path))
    # A fresh adapter keeps its factors in fp32.
    assert_close(again.eval()(x()), model.eval()(x()), dtype=torch.float32)
    assert adapter_of(again).layers[0].A.shape == (3, 5)
    model, layer = adapted(core=Leading)
    B = layer.B.detach().clone()
    truncate(model, 2)
    cut = adapter_of(model).layers[0]
    # Into the live ranks, since others may share the scale.
    assert cut.scale == scale
    assert torch.equal(cut.B, 2 * B[:, :2])


def test_truncation_leaves_a_bank_alone():
    model, layer = adapted(core=None, r=4)
    append(model, 3, seed=1)
    model.double()
    with torch.no_grad():
        layer.B.normal_(generator=torch.Generator().manual_seed(3))
        layer.B[:, 2:] = 0
    expected = model(x())
    truncate(model, 2)
    cut = adapter_of(model).layers[0]
    assert (cut.A.shape, cut.bank[0].shape) == ((2, 5), (4, 5))
    assert_close(model(x()), expected)


@pytest.mark.parametrize("r", [0, 5, 2.0, True, "2"])
def test_no_other_number_can_be_cut_to(r):
    model, _ = adapted(core=None)
    with pytest.raises(ConfigError, match=r"expected an integer in 1\.\.4"):
        truncate(model, r)


def test_what_is_merged_or_would_not_fit_is_refused_whole():
    model, layer = adapted(core=None)
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        truncate(model, 2)
    assert layer.A.shape == (4, 5)
    model, layer = adapted(core=None, method="smora", k=3)
    with pytest.raises(ConfigError, match="k=3"):
        truncate(model, 2)
    assert layer.A.shape == (4, 5)


@pytest.mark.parametrize("router", ["topk", "smear", "task"])
@pytest.mark.parametrize("per", ["total", "expert"])
def test_experts_that_options_count_cannot_go(router, per):
    options = {"experts": 2, "rank_per": per, "router": router}
    options |= {"tasks": 3} if router == "task" else {}
    r = 4 if per == "total" else 2
    model, layer = adapted(core=None, method="moe-lora", r=r, **options)
    for cut in (lambda: truncate(model, 2), lambda: keep(model, layer, torch.arange(2))):
        before = {name: param.clone() for name, param in model.named_parameters()}
        with pytest.raises(ConfigError, match=r"got 2 of 4 ranks at 0, .* fewer ranks or experts"):
            cut()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert (layer.site.r, layer.A.shape) == (r, (4, 5))


class Noting(Identity):
    """Keeps a word."""

    word = ""

    def settings(self):
        return {"word": self.word} if self.word else {}

    def configure(self, settings):
        self.word = settings.get("word", "")


def test_settings_of_a_core_are_saved_and_come_back_to_its_replicas_too(monkeypatch, tmp_path):
    lora = type(pr.method("lora"))
    monkeypatch.setattr(lora, "core", lambda self, site: Noting(site.r))
    model, layer = adapted(core=None)
    replica(model, "slow")
    layer.module.replica_of("default", "slow").core.word = "one"
    assert "core" not in layer.module.shapes("default")
    layer.core.word = "two"
    assert layer.module.shapes("default")["core"] == {"word": "two"}
    truncate(model, 3)
    cut = adapter_of(model).layers[0]
    assert cut.core.word == ""
    cut.core.word = "three"
    model.peft_config["default"].sites[cut.site.path] = cut.module.shapes("default")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(5, 6)).double(), str(tmp_path))
    layer = adapter_of(again).layers[0]
    assert [core.word for core in layer.module.cores("default")] == ["three", "one"]


def test_a_core_reads_all_ranks_unless_it_says_otherwise():
    core = Identity(3)
    assert core.portion() is None
    assert (core.shortened(2), core.settings()) == (1.0, {})
