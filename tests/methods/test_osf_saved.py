"""osf and full: saved, exported and loaded models, and whole runs."""

import copy

import pytest
import torch
from peft import PeftModel

import polyrank as pr
from polyrank import engine
from polyrank.engine.state import model_state, restore_model
from polyrank.errors import CheckpointError
from polyrank.layers import absorb, adapter_of, saved_of
from polyrank.parts.subspaces import Tail
from polyrank.parts.transforms import plain_lora
from polyrank.testing import assert_close
from polyrank.testing.streams import few_digits, tiny_vit


def trained(steps=3, ends=0, archive=True, **options):
    """A model of two layers after some tasks of its own, and its base before them."""
    base = tiny_vit()
    model = pr.adapt(copy.deepcopy(base), pr.method("osf", **options), "all-linear", seed=0)
    for task in range(ends + 1):
        made = pr.optimizer(model, lr=1e-2)
        attached = pr.attach(made, model)
        for step in range(steps):
            rng = torch.Generator().manual_seed(10 * task + step)
            pixels = torch.randn(4, 1, 8, 8, generator=rng)
            model(pixel_values=pixels).logits.square().mean().backward()
            made.step()
            made.zero_grad()
        attached.detach()
        if task < ends:
            absorb(model, archive="folded" if archive else False, seed=task)
    return model.eval(), base


def shown(model):
    with torch.no_grad():
        return model(pixel_values=torch.randn(3, 1, 8, 8, generator=torch.Generator())).logits


def test_within_a_task_it_exports_to_a_lora_of_twice_the_rank():
    model, _ = trained()
    found = plain_lora(saved_of(model))
    ranks = {layer.site.path: layer.site.r for layer in adapter_of(model).layers}
    assert found.plan["ranks"] == {path: 2 * r for path, r in ranks.items()}


@pytest.mark.parametrize("parametrisation", ["factors", "core", "block"])
def test_after_tasks_it_fits_the_original_base_and_exports_to_plain_models(
    parametrisation, tmp_path
):
    model, base = trained(ends=2, parametrisation=parametrisation)
    expected = shown(model)
    assert float((expected - shown(base)).abs().max()) > 1e-3
    model.save_pretrained(tmp_path / "own")
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "own")).eval()
    assert_close(shown(again), expected)
    saved = plain_lora(saved_of(model))
    assert max(saved.plan["ranks"].values()) <= 2 * 32
    plain = model.merge_and_unload()
    assert not [n for n, _ in plain.named_parameters() if "polyrank" in n]
    plain.save_pretrained(tmp_path / "dense")
    fresh = type(base).from_pretrained(tmp_path / "dense").eval()
    assert_close(shown(fresh), expected)


def test_a_layer_that_is_frozen_as_a_whole_is_saved_loaded_and_merged(tmp_path):
    model, base = trained(ends=1)
    paths = [layer.site.path for layer in adapter_of(model).layers]
    absorb(model, archive="folded", ranks={paths[0]: 0})
    expected = shown(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), is_trainable=True).eval()
    assert [layer.site.r == 0 for layer in adapter_of(again).layers] == [
        p == paths[0] for p in paths
    ]
    assert_close(shown(again), expected)
    resumed = restore_model(copy.deepcopy(base), model_state(model, base=True))
    made = pr.optimizer(resumed, lr=0.0)
    attached = pr.attach(made, resumed)
    resumed.train()(pixel_values=torch.ones(1, 1, 8, 8)).logits.sum().backward()
    made.step()
    attached.detach()
    assert_close(shown(resumed.eval()), expected)
    assert_close(shown(copy.deepcopy(model).merge_and_unload()), expected)


def test_without_an_archive_only_the_changed_base_is_taken(tmp_path):
    model, base = trained(ends=1, archive=False)
    expected = shown(model)
    changed = copy.deepcopy(base)
    for layer in adapter_of(model).layers:
        weight = layer.module.dense_weight().detach()
        changed.get_submodule(layer.site.path).weight.data.copy_(weight)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="this is the base before"):
        PeftModel.from_pretrained(base, str(tmp_path))
    again = PeftModel.from_pretrained(changed, str(tmp_path)).eval()
    assert torch.equal(shown(again), expected)


def go(out, method="osf", tasks=2, **options):
    return engine.run(
        tiny_vit(2 * tasks),
        few_digits(rows=16, tasks=tasks),
        pr.method(method, **options),
        references=[],
        train={"epochs": 2, "batch_size": 8, "lr": 1e-2},
        out=out,
        progress=False,
    )


def test_a_run_splits_anew_for_every_task_and_shows_it(tmp_path):
    result = go(tmp_path, tasks=3, schedule="adaptive", trr=0.5, unsure="uniform")
    layers = adapter_of(result.model).layers
    assert all(isinstance(layer.core, Tail) for layer in layers)
    found = {figure["name"]: figure for figure in result.system()["figures"]}
    assert found.keys() == {"retained-rank", "protected-outputs", "protected-inputs"}
    assert len(found["retained-rank"]["values"]) == len(layers)


def test_full_runs_as_a_method_and_trains_all_weights_of_its_layers(tmp_path):
    result = go(tmp_path, "full")
    adapter = adapter_of(result.model)
    sizes = [layer.site.d_in * layer.site.d_out for layer in adapter.layers]
    own = sum(p.numel() for p in adapter.roles()["A"])
    assert own == sum(sizes)
    assert all(layer.A.any() for layer in adapter.layers)
