"""sora over stages, pruned and exported: what each stage leaves, and what other processes load."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

import polyrank as pr
from polyrank import engine
from polyrank.errors import ConfigError, MergeError, RunError
from polyrank.frame import keyed
from polyrank.io.adapters import read_saved
from polyrank.layers import AdaptedLinear, saved_of
from polyrank.parts.gates import Shrinkage, kept_parameters, kept_ranks, shrink, static_gates
from polyrank.parts.transforms import plain_lora
from polyrank.testing import MODELS, Case, assert_close
from polyrank.testing.streams import few_digits, tiny_vit

D_IN, WIDTH, D_OUT, R = 7, 9, 5, 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(D_IN, WIDTH), nn.Linear(WIDTH, D_OUT)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def thinned(dtype=torch.float64, dead=((0, 3), (1, 2, 4, 5)), **config):
    """A model whose layers have lost some ranks."""
    method = pr.method("sora", r=R, alpha=9.0)
    model = pr.adapt(Net(), method, ["first", "second"], seed=0, **config).to(dtype).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for (layer, gate), ranks in zip(static_gates(pr.adapter_of(model)), dead, strict=True):
            layer.B.normal_()
            gate[list(ranks)] = 0
    return model


def answer(model):
    torch.manual_seed(2)
    dtype = pr.adapter_of(model).layers[0].A.dtype
    with torch.no_grad():
        return model(torch.randn(11, D_IN).to(dtype))


def sizes(model):
    return [tuple(layer.A.shape) for layer in pr.adapter_of(model).layers]


# --- pruning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sora_6_pruning_keeps_answers_and_is_idempotent(dtype):
    model = thinned(dtype)
    before, scales = answer(model), [layer.scale for layer in pr.adapter_of(model).layers]
    assert kept_parameters(pr.adapter_of(model)) == 4 * (D_IN + WIDTH) + 2 * (WIDTH + D_OUT)
    for _ in range(2):
        assert pr.prune(model) == {"first": 4, "second": 2}
        found = answer(model)
        if dtype == torch.float64:
            assert_close(found, before)
        else:
            assert_close(found, before, tol=1e-6, reason="the bound that pruning promises")
        assert sizes(model) == [(4, D_IN), (2, WIDTH)]
        assert kept_ranks(pr.adapter_of(model)) == {"first": 4, "second": 2}
    adapter = pr.adapter_of(model)
    # Not alpha over the ranks that are left.
    assert [layer.scale for layer in adapter.layers] == scales == [9.0 / R] * 2
    trained = sum(p.numel() for layer in adapter.layers for p in (layer.A, layer.B))
    assert trained == kept_parameters(adapter) == 4 * (D_IN + WIDTH) + 2 * (WIDTH + D_OUT)
    assert all(layer.core.gate.requires_grad for layer in adapter.layers)


def test_a_layer_that_lost_all_ranks_keeps_one_that_adds_nothing_and_is_not_exported():
    model = thinned(dead=(range(R), (0,)))
    before = answer(model)
    assert pr.prune(model) == {"first": 0, "second": 5}
    assert pr.prune(model) == {"first": 0, "second": 5}
    assert sizes(model) == [(1, D_IN), (5, WIDTH)]
    assert_close(answer(model), before)
    assert kept_parameters(pr.adapter_of(model)) == 5 * (WIDTH + D_OUT)
    assert plain_lora(saved_of(model)).config["target_modules"] == ["second"]


def test_a_pruned_adapter_trains_on_with_a_fresh_optimiser():
    model = thinned(torch.float32)
    pr.prune(model)
    before = answer(model)
    optimizer = pr.optimizer(model.train(), lr=0.01)
    attached = pr.attach(optimizer, model)
    model(torch.ones(3, D_IN)).square().mean().backward()
    optimizer.step()
    attached.detach()
    assert not torch.equal(answer(model.eval()), before)


def test_pruning_is_refused_where_it_cannot_be_right():
    model = thinned()
    model.merge_adapter()
    with pytest.raises(MergeError, match=r"prune: adapter 'default' is merged.*unmerge_adapter"):
        pr.prune(model)
    model.unmerge_adapter()
    assert sizes(model) == [(R, D_IN), (R, WIDTH)]
    with torch.no_grad():
        pr.adapter_of(model).layers[0].core.gate[0] = float("nan")
    with pytest.raises(RunError, match="first is the first"):
        pr.prune(model)
    with pytest.raises(ConfigError, match="no static gate"):
        pr.prune(pr.adapt(Net(), "lora", ["first"]))


# --- what other processes load --------------------------------------------------------------------

READER = """
import sys
from pathlib import Path
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file

torch.set_num_threads(1)
folder = Path(sys.argv[1])

def answers(kind):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / kind).eval()
    batch, wanted = load_file(folder / "batch"), load_file(folder / "answer")["answer"]
    with torch.no_grad():
        print(kind, bool((model(**batch).logits - wanted).abs().max() <= 1e-6 * wanted.abs().max()))

answers("stock")
assert not [name for name in sys.modules if name.startswith("polyrank")]
import polyrank
answers("whole")
answers("pruned")
"""


def test_sora_7_exports_and_pruned_adapters_load_in_fresh_processes(tmp_path):
    case = Case(pr.method("sora", r=5, alpha=7.0), 0, MODELS["llama"])
    model = case.build(init_weights=False)
    case.train(model)
    dead = [torch.arange(n % 6) for n in range(len(pr.adapter_of(model).layers))]
    with torch.no_grad():
        for layer, ranks in zip(pr.adapter_of(model).layers, dead, strict=True):
            layer.core.gate[ranks] = 0
    folder = tmp_path / "all"
    case.tiny.build().save_pretrained(folder / "base")
    model.save_pretrained(folder / "whole")
    pr.export(model, folder / "stock")
    batch = {k: v for k, v in case.tiny.inputs(0).items() if k != "labels"}
    save_file(batch, folder / "batch")
    save_file({"answer": case.answer(model)}, folder / "answer")
    kept = pr.prune(model)
    assert sorted(set(kept.values())) == list(range(6))
    model.save_pretrained(folder / "pruned")
    about = read_saved(folder / "stock").config
    ranks = {path: r for path, r in kept.items() if r}
    assert about["rank_pattern"] == about["alpha_pattern"] == ranks
    assert sum(t.numel() for t in read_saved(folder / "stock").tensors.values()) == (
        kept_parameters(pr.adapter_of(model))
    )
    done = subprocess.run(
        [sys.executable, "-c", READER, folder],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["stock True", "whole True", "pruned True"]


# --- stages in the engine -------------------------------------------------------------------------

LEVELS, BUDGET = (0.0, 0.02, 0.1), 3


def run(out, **options):
    given = {"r": 4, "schedule": LEVELS, "stage_steps": BUDGET, **options}
    return engine.run(
        tiny_vit(),
        few_digits(rows=16, tasks=2),
        pr.method("sora", **given),
        references=[],
        train={"epochs": 2, "batch_size": 8, "lr": 1e-2},
        progress=False,
        out=out,
    )


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """One run in stages, and the rates and thresholds of its updates."""
    seen, patch = [], pytest.MonkeyPatch()
    after = Shrinkage.after

    def watched(self, step):
        seen.append((step.task, step.phase, step.lr, self.threshold(step)))
        after(self, step)

    with patch.context() as context:
        context.setattr(Shrinkage, "after", watched)
        return run(tmp_path_factory.mktemp("sora") / "run"), seen


def test_sora_8_every_stage_is_a_phase_with_its_threshold_and_its_own_rates(staged):
    _, seen = staged
    assert len(seen) == 2 * (4 + BUDGET + BUDGET)
    for task in range(2):
        for number, (xi, steps) in enumerate(zip(LEVELS, (4, BUDGET, BUDGET), strict=True)):
            mine = [s for s in seen if s[:2] == (task, f"stage-{number}")]
            assert len(mine) == steps
            assert {s[3] for s in mine} == {xi}
            assert_close(max(s[2] for s in mine), 1e-2)
            assert mine[-1][2] < 0.9e-2


def test_every_stage_is_evaluated_and_its_kept_ranks_are_shown(staged):
    result, _ = staged
    names = [entry["name"] for entry in result.results["systems"]]
    assert names == ["sora", "sora@stage-0", "sora@stage-1"]
    for entry in result.results["systems"]:
        assert all(isinstance(x, float) for x in entry["unrestricted"][1])
    (figure,) = result.system()["figures"]
    tasks = [task.name for task in few_digits(rows=16, tasks=2)]
    assert list(figure["columns"]) == [f"{t} stage-{n}" for t in tasks for n in range(3)]
    adapter = pr.adapter_of(result.model)
    assert list(figure["rows"]) == [layer.site.path for layer in adapter.layers]
    columns = list(zip(*figure["values"], strict=True))
    # Without a threshold nothing is lost, and the last column is the live adapter.
    assert set(columns[0]) == {4.0}
    assert columns[5] == tuple(kept_ranks(adapter).values())
    assert sum(columns[5]) < sum(columns[4]) <= sum(columns[3])
    gates = [id(gate) for _, gate in static_gates(adapter)]
    for number in range(2):
        pairs = adapter.pairs(f"stage-{number}")
        kept = [int((copy != 0).sum()) for copy, live in pairs if id(live) in gates]
        assert columns[3 + number] == tuple(kept)


def test_every_stage_is_exported_as_a_plain_lora_that_answers_like_it(staged):
    result, _ = staged
    exports = result.system()["exports"]
    assert list(exports) == ["pruned", "stage-0", "stage-1"]
    (figure,) = result.system()["figures"]
    columns = list(zip(*figure["values"], strict=True))
    pixels = torch.randn(3, 1, 8, 8, generator=keyed("pixels"))
    model, answers = result.model.eval(), []
    for (name, folder), counts in zip(exports.items(), [columns[5], *columns[3:5]], strict=True):
        saved = read_saved(result.path / folder)
        assert saved.config["peft_type"] == "LORA"
        assert tuple(saved.plan["ranks"].values()) == counts
        plain = PeftModel.from_pretrained(tiny_vit(len(saved.plan["labels"])), result.path / folder)
        with torch.no_grad(), pr.view(model, name.replace("pruned", "")):
            expected = model(pixel_values=pixels).logits
        with torch.no_grad():
            assert_close(plain.eval()(pixel_values=pixels).logits, expected)
        answers.append(expected)
    assert not any(map(torch.equal, answers, answers[1:]))


def test_an_adapter_with_its_stages_is_loaded_with_all_of_them(staged):
    result, _ = staged
    loaded = pr.load(tiny_vit(), result.path / result.system()["adapter"]).eval()
    pixels = torch.randn(3, 1, 8, 8, generator=keyed("pixels"))
    found = []
    for model in (result.model.eval(), loaded):
        for name in ("", "stage-0", "stage-1"):
            with torch.no_grad(), pr.view(model, name):
                found.append(model(pixel_values=pixels).logits)
    assert len({str(logits.tolist()) for logits in found[:3]}) == 3
    for ours, theirs in zip(found[:3], found[3:], strict=True):
        assert_close(theirs, ours)


def test_with_rates_of_zero_later_stages_are_the_first_one_shrunk(tmp_path):
    result = run(tmp_path / "run", shrink_only=True, form="released")
    adapter = pr.adapter_of(result.model)
    gates = {id(gate) for _, gate in static_gates(adapter)}
    moved = 0
    for first, live in adapter.pairs("stage-0"):
        expected = first
        for xi in LEVELS[1:] if id(live) in gates else ():
            for _ in range(BUDGET):
                expected = shrink(expected, xi, "released")
        assert torch.equal(live, expected)
        moved += not torch.equal(live, first)
    assert moved == len(gates)


def test_without_stages_it_is_one_phase_and_one_system(tmp_path):
    result = run(tmp_path / "run", schedule="none", xi=0.02, stage_steps=0)
    assert [entry["name"] for entry in result.results["systems"]] == ["sora"]
    (figure,) = result.system()["figures"]
    assert list(figure["columns"]) == [task.name for task in few_digits(rows=16, tasks=2)]
    assert not any(
        m.polyrank_replica for m in result.model.modules() if isinstance(m, AdaptedLinear)
    )


def test_what_is_in_the_base_alone_is_not_exported(tmp_path, caplog):
    result = engine.run(
        tiny_vit(),
        few_digits(rows=8, tasks=2),
        pr.method("sora", r=2),
        strategies=["absorb"],
        references=[],
        train={"epochs": 1, "batch_size": 8},
        progress=False,
        out=tmp_path / "run",
    )
    assert "exports" not in result.system()
    assert "nothing is exported, since updates were absorbed and not archived" in caplog.text
    assert result.system()["figures"]


def test_a_base_that_changes_has_no_stages():
    method = pr.method("sora", r=2, schedule=[0.0, 0.1])
    with pytest.raises(ConfigError, match="absorb: ends the replicas that sora shows"):
        engine.run(
            tiny_vit(), few_digits(rows=8, tasks=2), method, strategies=["absorb"], progress=False
        )


def test_a_stream_that_is_read_once_has_no_stages():
    stream = replace(few_digits(rows=8, tasks=2), passes=1)
    method = pr.method("sora", r=2, schedule=[0.0, 0.1])
    with pytest.raises(ConfigError, match=r"passes"):
        engine.run(tiny_vit(), stream, method, progress=False)


def test_looks_at_validation_rows_need_some_before_anything_is_loaded():
    stream = few_digits(rows=8, tasks=2)
    assert "validation_rows" in engine.plan.offered(stream)
    bare = [
        replace(task, data={k: rows for k, rows in task.data.items() if k != "validation"})
        for task in stream
    ]
    method = pr.method("sora", r=2, schedule=[0.0, 0.1], check_every=2)
    with pytest.raises(ConfigError, match=r"sora: needs validation rows, which stream"):
        engine.run(None, replace(stream, tasks=tuple(bare)), method, progress=False)
