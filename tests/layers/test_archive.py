"""Absorbed updates: which base a saved adapter meets, and what it does there."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from torch import nn

import polyrank as pr
from polyrank.errors import CheckpointError
from polyrank.layers import AdaptedLinear, absorb, adapter_of, append, keep, truncate
from polyrank.parts.gates import StaticGate
from polyrank.testing import assert_close


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(7, 9), nn.Linear(9, 5)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def shake(model, seed):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_of(model).named().values():
            p.copy_(torch.empty(p.shape).normal_(generator=rng) / 3)


def absorbed(times=2, archive=True, live=True):
    model = pr.adapt(Net(), pr.method("lora", r=3), ["first", "second"], seed=0)
    for index in range(times):
        shake(model, index)
        absorb(model, archive=archive, seed=index)
    if live:
        shake(model, 99)
    return model.eval()


def x():
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(5))


def test_the_original_base_gets_the_archive_and_the_changed_one_does_not(tmp_path):
    model = absorbed()
    expected = model(x())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    assert_close(again(x()), expected)
    assert [v.bank[0].shape[0] for v in adapter_of(again).layers] == [6, 6]
    here = PeftModel.from_pretrained(changed_base(model), str(tmp_path)).eval()
    assert torch.equal(here(x()), expected)
    assert all(v.bank is None and v.absorbed for v in adapter_of(here).layers)


def test_an_adapter_that_acts_by_its_archive_saves_absorbs_and_appends_on(tmp_path):
    model = absorbed()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), str(tmp_path), is_trainable=True).eval()
    again.save_pretrained(tmp_path / "again")
    third = PeftModel.from_pretrained(Net(), str(tmp_path / "again"), is_trainable=True).eval()
    assert torch.equal(third(x()), again(x()))
    answer = again(x())
    absorb(again, archive=True)
    assert_close(again(x()), answer)
    again.save_pretrained(tmp_path / "more")
    assert_close(PeftModel.from_pretrained(Net(), str(tmp_path / "more")).eval()(x()), answer)
    append(third, 2)
    assert_close(third(x()), answer)
    third.save_pretrained(tmp_path / "bank")
    last = PeftModel.from_pretrained(Net(), str(tmp_path / "bank")).eval()
    assert_close(last(x()), answer)
    assert all("archive" not in n for n, _ in last.named_parameters())


def test_a_bank_beside_a_dormant_archive_counts_once(tmp_path):
    model = absorbed()
    answer = model(x())
    append(model, 2)
    assert_close(model(x()), answer)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    assert_close(again(x()), answer)
    assert [v.bank[0].shape[0] for v in adapter_of(again).layers] == [9, 9]


def test_without_an_archive_the_original_base_is_refused(tmp_path):
    model = absorbed(archive=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="archive=True"):
        PeftModel.from_pretrained(Net(), str(tmp_path))


def test_a_base_that_is_neither_is_refused(tmp_path):
    absorbed().save_pretrained(tmp_path)
    other = Net()
    with torch.no_grad():
        other.first.weight += 1
    with pytest.raises(CheckpointError, match="neither"):
        PeftModel.from_pretrained(other, str(tmp_path))


def test_a_base_in_half_precision_is_known_again(tmp_path):
    model = absorbed()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net().bfloat16(), str(tmp_path))
    assert not any(v.absorbed for v in adapter_of(again).layers)
    here = PeftModel.from_pretrained(changed_base(model).bfloat16(), str(tmp_path))
    assert all(v.absorbed for v in adapter_of(here).layers)


def changed_base(model):
    """The plain base that holds what a model absorbed."""
    base = Net()
    for view in adapter_of(model).layers:
        base.get_submodule(view.site.path).weight.data = view.module.dense_weight().clone()
    return base


def test_a_base_that_cannot_be_asked_is_refused(tmp_path, monkeypatch):
    model = absorbed()
    model.save_pretrained(tmp_path)
    bases = (Net(), changed_base(model))
    monkeypatch.setattr(AdaptedLinear, "quantised", lambda self: True)
    for base in bases:
        with pytest.raises(CheckpointError, match="polyrank export"):
            PeftModel.from_pretrained(base, str(tmp_path))


def test_a_base_a_little_off_is_neither(tmp_path):
    absorbed().save_pretrained(tmp_path)
    other = Net()
    with torch.no_grad():
        other.first.weight += 1e-3 * torch.randn(9, 7)
    with pytest.raises(CheckpointError, match="neither"):
        PeftModel.from_pretrained(other, str(tmp_path))


def test_updates_that_rounding_hides_are_not_guessed_at(tmp_path):
    model = pr.adapt(Net(), pr.method("lora", r=3), ["first", "second"], seed=0)
    shake(model, 1)
    with torch.no_grad():
        for view in adapter_of(model).layers:
            view.B.mul_(1e-5)
    absorb(model, archive=True)
    model.save_pretrained(tmp_path)
    for base, holds in ((Net(), False), (changed_base(model), True)):
        found = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
        assert {v.absorbed for v in adapter_of(found).layers} == {holds}
        with pytest.raises(CheckpointError, match="nothing tells"):
            PeftModel.from_pretrained(base.bfloat16(), str(tmp_path))


def test_layers_that_an_absorption_left_alone_are_watched_from_the_next_one_on(tmp_path):
    model = pr.adapt(Net(), pr.method("lora", r=3), ["first", "second"], seed=0)
    absorb(model, archive=True)
    assert not any(v.witness["moved"] for v in adapter_of(model).layers)
    shake(model, 1)
    absorb(model, archive=True)
    expected = model.eval()(x())
    model.save_pretrained(tmp_path)
    for base in (Net(), changed_base(model)):
        assert_close(PeftModel.from_pretrained(base, str(tmp_path)).eval()(x()), expected)


def test_an_update_that_is_not_finite_never_reaches_the_base():
    model = pr.adapt(Net(), pr.method("lora", r=3), ["first", "second"], seed=0)
    with torch.no_grad():
        adapter_of(model).layers[1].B.fill_(float("nan"))
    before = [v.module.dense_weight().clone() for v in adapter_of(model).layers]
    with pytest.raises(pr.MergeError, match="finite"):
        absorb(model)
    with pytest.raises(pr.PolyrankError, match="finite"):
        append(model)
    after = [v.module.dense_weight() for v in adapter_of(model).layers]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_base_below_fp32_is_not_rounded_unasked(dtype):
    model = pr.adapt(Net(), pr.method("lora", r=3), ["first", "second"], seed=0)
    shake(model, 1)
    for view in adapter_of(model).layers:
        view.module.dense_weight().data = view.module.dense_weight().data.to(dtype)
    with pytest.raises(pr.MergeError, match="below fp32"):
        absorb(model)


def test_no_structure_changes_under_an_optimiser():
    model = pr.adapt(Net(), pr.method("lora", r=3), ["first", "second"], seed=0)
    attached = pr.attach(pr.optimizer(model, 0.1), model)
    layer = adapter_of(model).layers[0]
    for change in (
        lambda: absorb(model),
        lambda: append(model),
        lambda: keep(model, layer, torch.tensor([0])),
        lambda: truncate(model, 2),
    ):
        with pytest.raises(pr.ConfigError, match=r"detach\(\)"):
            change()
    attached.detach()
    truncate(model, 2)


def test_nothing_is_absorbed_beside_a_merged_adapter():
    model = pr.adapt(Net(), pr.method("lora", r=3), ["first", "second"], seed=0)
    shake(model, 1)
    model.add_adapter("other", model.peft_config["default"])
    model.merge_adapter(["other"])
    with pytest.raises(pr.MergeError, match="unmerge"):
        absorb(model)


def test_a_resting_archive_stays_where_it_is():
    model = absorbed()
    held = adapter_of(model).layers[0].module.polyrank_archive["default"]
    model.half()
    assert held.A.dtype == torch.float32
    held.resting = False
    model.half()
    assert held.A.dtype == torch.float16


def test_starting_values_differ_from_one_absorption_to_the_next():
    model = pr.adapt(Net(), pr.method("lora", r=3), ["first", "second"], seed=0)
    drawn = []
    for key in ("absorb-0", "absorb-1"):
        shake(model, 1)
        absorb(model, key=key)
        drawn.append(adapter_of(model).layers[0].A.detach().clone())
    assert not torch.equal(*drawn)


def test_a_static_gate_settles_into_the_bank_without_its_dead_ranks(monkeypatch):
    monkeypatch.setattr(type(pr.method("lora")), "core", lambda self, site: StaticGate(site.r))
    model = pr.adapt(Net(), pr.method("lora", r=4), ["first", "second"], seed=0).eval()
    shake(model, 3)
    views = adapter_of(model).layers
    with torch.no_grad():
        views[0].core.gate[1] = 0
    answer = model(x())
    append(model)
    assert [v.bank[0].shape[0] for v in adapter_of(model).layers] == [3, 4]
    assert [v.site.r for v in adapter_of(model).layers] == [4, 4]
    assert_close(model(x()), answer)
    shake(model, 4)
    answer = model(x())
    absorb(model, archive=True)
    assert_close(model(x()), answer)


def test_the_config_holds_nothing_but_numbers_and_words(tmp_path):
    absorbed().save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "adapter_config.json").read_text())["sites"]["first"]
    assert kept["archive"] == 6
    assert {len(kept["witness"][key]) for key in ("index", "original", "absorbed")} == {16}
    assert kept["witness"]["dtype"] == "torch.float32"


@pytest.mark.parametrize("verb", [append, absorb])
def test_a_layer_that_kept_no_rank_has_an_empty_bank_or_archive(verb, monkeypatch, tmp_path):
    monkeypatch.setattr(type(pr.method("lora")), "core", lambda self, site: StaticGate(site.r))
    model = pr.adapt(Net(), pr.method("lora", r=3), ["first", "second"], seed=0).eval()
    shake(model, 3)
    views = adapter_of(model).layers
    weight = views[0].module.dense_weight().clone()
    with torch.no_grad():
        views[0].core.gate.zero_()
    answer = model(x())
    verb(model, **({"archive": True} if verb is absorb else {}))
    assert_close(model(x()), answer)
    assert torch.equal(views[0].module.dense_weight(), weight)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    assert_close(again(x()), answer)
    held = [view.bank or view.archive for view in adapter_of(again).layers]
    assert [part[0].shape[0] for part in held] == [0, 3]
