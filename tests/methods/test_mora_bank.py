"""mora's bank: how it grows, what is saved of it, whose ranks are read, what can be dropped."""

import json
import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

import polyrank as pr
from polyrank import engine
from polyrank.errors import CheckpointError
from polyrank.layers import append, compact, gate_statistics, replica, view
from polyrank.parts.boundaries import Append
from polyrank.testing import MODELS, Case, assert_close
from polyrank.testing.streams import few_digits, tiny_vit

R = 3


def grown(times=2, steps=2, low=None, **options):
    """A tiny model whose bank has grown, every growth trained."""
    case = Case(
        pr.method("mora", **{"r": R, "tau": 0.1, "delta": 0.2, **options}),
        0,
        low or MODELS["llama"],
    )
    model = case.build()
    for number in range(times + 1):
        if number:
            append(model, R, seed=number)
        case.train(model, steps=steps)
    return case, model


def layers(model):
    return pr.adapter_of(model).layers


def silenced(model, *places):
    """Take the values of some frozen ranks of the first layer."""
    with torch.no_grad():
        layers(model)[0].bank[1][:, list(places)] = 0
    return layers(model)[0]


# --- growth ---------------------------------------------------------------------------------------


def test_a_bank_must_not_grow_twice_without_training():
    _, model = grown(1)
    append(model, R)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(
        pr.ConfigError, match=r"no values yet.*train them first, or pass force=True"
    ):
        append(model, R)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    append(model, R, force=True)
    assert layers(model)[0].segments == [R, R, R]
    # Ranks that do not compete do no harm.
    plain = Case(pr.method("lora", r=R), 0, MODELS["llama"]).build()
    append(plain, R)


def test_layers_without_values_are_named():
    _, model = grown(1)
    append(model, R)
    case, _ = grown(0)
    case.train(model)
    dead, live = layers(model)[0], layers(model)[1:]
    with torch.no_grad():
        dead.B.zero_()
    with pytest.warns(UserWarning, match=rf"1 of {len(live) + 1} layers .*\({dead.site.path}\)"):
        append(model, R)
    assert layers(model)[0].segments == [R, R, R]
    _, model = grown(0, steps=0)
    with pytest.raises(pr.ConfigError, match=rf"no values yet \({dead.site.path}, .*\)"):
        append(model, R)


def test_the_boundary_grows_at_the_start_of_the_next_task_or_early_as_released(bench):
    for released, shapes in ((False, [0, 2, 4]), (True, [2, 4, 4])):
        work = bench("mora", dtype=torch.float32, r=2, tau=0.3, released=released)
        found = []
        for task in range(2):
            work.begin(task)
            work.steps(count=2)
            work.end()
            held = [layer.bank for layer in work.adapter.layers]
            found.append(0 if held[0] is None else len(held[0][0]))
            # Only as released do untrained ranks stand in what is evaluated.
            assert all(bool(layer.B.any()) is not released for layer in work.adapter.layers)
            work.first = False
            boundary = work.method.boundary()
            if task == 1:
                boundary.start(None, work, {})
                found.append(len(work.adapter.layers[0].bank[0]))
        assert found == shapes


def test_more_ranks_than_inputs_are_no_fault(bench, recwarn):
    work = bench("mora", dtype=torch.float32, r=5, tau=0.3)
    for task in range(3):
        work.begin(task)
        work.steps(count=2)
        work.end()
    assert work.adapter.layers[0].bank[0].shape == (10, 6)
    assert not recwarn


def test_a_stream_without_boundaries_is_refused(tmp_path):
    stream = replace(few_digits(rows=8, tasks=2), scenario="task-free", visible=None)
    with pytest.raises(pr.ConfigError, match="mora: needs boundary"):
        engine.run(tiny_vit(), stream, pr.method("mora", r=2), references=[], out=tmp_path / "run")


# --- a task of one class --------------------------------------------------------------------------


@pytest.mark.parametrize("released", [False, True])
def test_ranks_without_values_train_on_and_belong_to_the_task_that_gave_them_some(bench, released):
    work = bench("mora", dtype=torch.float32, r=2, tau=0.3, released=released)
    banks = []
    for task in range(3):
        work.begin(task, classes=1)
        kept = [layer.A for layer in work.adapter.layers]
        assert any(layer.B.any() for layer in work.adapter.layers) is False
        work.steps(count=2)
        work.end()
        banks.append(
            [0 if layer.bank is None else len(layer.bank[0]) for layer in work.adapter.layers]
        )
        if task == 0:
            # The softmax over one class teaches nothing, and the same ranks stay.
            assert all(layer.A is A for layer, A in zip(work.adapter.layers, kept, strict=True))
    assert banks == ([[0, 0], [2, 2], [4, 4]] if released else [[0, 0], [0, 0], [2, 2]])
    for layer in work.adapter.layers:
        assert layer.bank[1].any(0).all()
    torch.manual_seed(0)
    ranks = 6 if released else 4
    gate = torch.rand(3, 2, ranks)
    routing = {"layers": ["one", "two"], "tasks": ["a", "b", "c"], "gate": gate.tolist()}
    reuse, where = Append("mora").figures(work, routing)
    assert reuse.columns == ("b", "c", *(("untrained",) if released else ()))
    assert_close(torch.tensor(reuse.values), gate.view(3, 2, -1, 2).sum(-1).mean(1))
    own = torch.zeros(3, 2)
    own[1], own[2] = gate[1, :, :2].sum(-1), gate[2, :, 2:4].sum(-1)
    assert_close(torch.tensor(where.values).T, gate.sum(-1) - own)


def test_a_bank_from_before_the_stream_is_nobodys(bench):
    work = bench("mora", dtype=torch.float32, r=2, tau=0.3)
    work.nudge()
    work.append("mora")
    for task in range(2):
        work.begin(task)
        work.steps(count=2)
        work.end()
    gate = torch.ones(2, 2, 6).tolist()
    routing = {"layers": ["one", "two"], "tasks": ["a", "b"], "gate": gate}
    reuse, where = Append("mora").figures(work, routing)
    assert reuse.columns == ("ranks 1", "a", "b")
    assert where.values == ((4.0, 4.0), (4.0, 4.0))


def test_a_run_whose_first_task_has_one_class_goes_on(tmp_path):
    stream = few_digits(rows=8, tasks=6)
    assert len(stream[0].labels) == 1
    given = {"train": {"epochs": 1, "batch_size": 8, "lr": 1e-2}, "references": []}
    method = pr.method("mora", r=2, k=12, tau=0.1)
    result = engine.run(tiny_vit(), stream, method, out=tmp_path / "run", progress=False, **given)
    system = result.system()
    names = [task.name for task in stream]
    reuse = next(f for f in system["figures"] if f["name"] == "reuse")
    assert (reuse["rows"], reuse["columns"]) == (tuple(names), tuple(names[1:]))
    for layer in layers(pr.load(tiny_vit(), tmp_path / "run" / system["adapter"])):
        assert layer.segments == [2] * 4
        assert layer.bank[1].any(0).all()


# --- what is saved --------------------------------------------------------------------------------


def test_mora_12_a_saved_bank_holds_trained_ranks_only_and_answers_the_same(tmp_path):
    case, model = grown(2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.tiny.build(), str(tmp_path)).eval()
    assert torch.equal(case.answer(again), case.answer(model))
    for layer in layers(again):
        A, B, _, live_from = layer.factors(layer.module.flow)
        assert (A.shape[0], live_from) == (3 * R, 2 * R)
        assert B.any(0).all()
        assert layer.segments == [R, R]
        assert layer.owners == [0] * R + [1] * R + [2] * R


@pytest.mark.parametrize("name", ["mora", "olora"])
def test_segments_that_do_not_add_up_are_refused(name, tmp_path):
    case = Case(pr.method(name, r=R), 0, MODELS["llama"])
    model = case.build()
    for number in range(2):
        case.train(model)
        append(model, R, seed=number)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    about = json.loads(file.read_text())
    path, noted = next(iter(about["sites"].items()))
    assert noted["segments"] == [R, R]
    for change, says in (
        ({"segments": [R, R + 1]}, rf"segments at {path}: got \[3, 4\].*the bank's 6 ranks"),
        ({"segments": [2 * R + 1, -1]}, rf"segments at {path}"),
        ({"order": [0] * R + [1] * (R - 1) + [2]}, rf"order at {path}"),
    ):
        file.write_text(
            json.dumps({**about, "sites": {**about["sites"], path: {**noted, **change}}})
        )
        with pytest.raises(CheckpointError, match=says):
            PeftModel.from_pretrained(case.tiny.build(), str(tmp_path))


def test_a_bank_saved_without_segments_came_at_once(tmp_path):
    case, model = grown(1)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    about = json.loads(file.read_text())
    for noted in about["sites"].values():
        del noted["segments"]
    file.write_text(json.dumps(about))
    again = PeftModel.from_pretrained(case.tiny.build(), str(tmp_path))
    assert layers(again)[0].segments == [R]


# --- whose ranks are read -------------------------------------------------------------------------


def test_gates_of_a_bank_are_counted():
    case, model = grown(2, k=4)
    batch = {k: v for k, v in case.tiny.inputs().items() if k != "labels"}
    found = gate_statistics(model, layers(model), [batch])
    for stats in found:
        assert stats.mean().shape == (3 * R,)
        # Four ranks are kept of nine, and fewer where the threshold cuts.
        assert 0 < float(stats.load().sum()) <= 4
        assert 0 < float(stats.mean().sum()) <= 1 + 1e-6


def test_the_reuse_matrix_sums_gates_over_the_ranks_of_each_task(bench):
    work = bench("mora", dtype=torch.float32, r=2, tau=0.3)
    for task in range(3):
        work.begin(task)
        work.steps(count=2)
        work.end()
    torch.manual_seed(0)
    gate = torch.rand(3, 2, 6).tolist()
    work.adapter.layers[1].order = [1, 0, 0, 1]
    routing = {"layers": ["first", "second"], "tasks": ["a", "b", "c"], "gate": gate}
    found = {f.name: f for f in Append("mora").figures(work, routing)}
    assert set(found) == {"reuse", "reuse-by-layer"}
    reuse = found["reuse"]
    assert reuse.rows == reuse.columns == ("a", "b", "c")
    owners = [[0, 0, 1, 1, 2, 2], [1, 0, 0, 1, 2, 2]]
    for row in range(3):
        for column in range(3):
            parts = [
                gate[row][layer][rank]
                for layer in range(2)
                for rank in range(6)
                if owners[layer][rank] == column
            ]
            assert_close(reuse.values[row][column], sum(parts) / 2)
    others = found["reuse-by-layer"]
    assert (others.rows, others.columns) == (("first", "second"), ("a", "b", "c"))
    for layer in range(2):
        for task in range(3):
            parts = [g for g, o in zip(gate[task][layer], owners[layer], strict=True) if o != task]
            assert_close(others.values[layer][task], sum(parts))


def test_a_bank_that_never_grew_and_a_method_without_gates_have_no_reuse(bench):
    work = bench("mora", r=2)
    work.begin(0)
    routing = {"layers": ["first", "second"], "tasks": ["a"], "gate": [[[0.5, 0.5]] * 2]}
    assert Append("mora").figures(work, routing) == []
    assert Append("olora").figures(work, None) == []


# --- what can be dropped --------------------------------------------------------------------------


def test_a_rank_without_value_keeps_its_key_and_loses_its_column(tmp_path):
    case, model = grown(2, k=5)
    layer = silenced(model, 1, 4)
    expected, keys = case.answer(model), layer.bank[0].clone()
    found = compact(model)
    assert (found[0].ranks, found[0].silent, found[0].unreachable) == (2 * R, 2, 0)
    assert sum(entry.silent for entry in found) == 2
    A, B = layer.bank
    assert (A.shape[0], B.shape[1]) == (2 * R, 2 * R - 2)
    assert torch.equal(A, keys[torch.tensor([1, 4, 0, 2, 3, 5])])
    assert layer.owners == [0, 1, 0, 0, 1, 1, 2, 2, 2]
    assert_close(case.answer(model), expected)
    # Nothing is left to find.
    assert compact(model)[0].silent == 2
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.tiny.build(), str(tmp_path)).eval()
    assert layers(again)[0].owners == layer.owners
    assert_close(case.answer(again), expected)


def test_a_compacted_bank_trains_and_grows_as_the_whole_one_does():
    found = []
    for drops in (False, True):
        case, model = grown(2, k=5)
        silenced(model, 0, 1, 5)
        if drops:
            compact(model)
        case.train(model)
        append(model, R, seed=9)
        case.train(model)
        layer = layers(model)[0]
        found.append((case.answer(model), layer.A.detach(), layer.B.detach()))
        assert len(layer.owners) == 4 * R
        assert sorted(layer.owners) == [n for n in range(4) for _ in range(R)]
    for whole, less in zip(*found, strict=True):
        assert_close(less, whole, tol=1e-4, reason="sums in another order, through eight updates")


def test_a_rank_whose_leverage_is_below_the_square_of_the_threshold_never_acts():
    torch.manual_seed(0)
    core = pr.method("mora", r=8, delta=0.3).core(layers(grown(0)[1])[0].site).eval()
    A = torch.randn(8, 5, dtype=torch.float64)
    A[2] *= 0.05
    A[6] = 0
    projector = A @ torch.linalg.pinv(A.T @ A) @ A.T
    leverage = projector.diagonal()
    assert torch.equal(core.unreachable(A), leverage < 0.3**2)
    assert core.unreachable(A).nonzero().flatten().tolist() == [2, 6]
    # The largest s over all x is the root of the leverage, and x = (AᵀA)⁺ A_i reaches it.
    for rank in range(8):
        x = torch.cat(
            [
                torch.randn(20_000, 5, dtype=torch.float64),
                (torch.linalg.pinv(A.T @ A) @ A[rank])[None],
            ]
        )
        z = x @ A.T
        s = (z / z.norm(dim=-1, keepdim=True).clamp_min(1e-12))[:, rank]
        assert_close(s[-1], leverage[rank].sqrt())
        assert s.max() <= leverage[rank].sqrt() * (1 + 1e-12)


def test_keys_that_differ_by_rounding_alone_are_not_counted_out():
    core = pr.method("mora", r=4, delta=0.3).core(layers(grown(0)[1])[0].site)
    A = torch.eye(4, 6)
    A[3] = A[2] * (1 + 1e-6)
    A[3, 5] = 1e-9
    # Along its own tiny direction the last key is reached by a large x.
    assert not core.unreachable(A).any()


def test_in_evaluation_ranks_out_of_reach_go_too_and_training_is_refused(tmp_path):
    case, model = grown(2, delta=0.3)
    layer = layers(model)[0]
    with torch.no_grad():
        # Nine keys of 24 inputs are independent, and any of them can be met alone.
        assert not layer.core.unreachable(torch.cat([layer.bank[0], layer.A])).any()
        layer.bank[0][[0, 4]] = layer.bank[0][[1, 2]] / 128
    expected = case.answer(model)
    assert compact(model)[0].unreachable == 0
    found = compact(model, evaluation=True)
    assert found[0].unreachable == 2
    assert layer.bank[1].shape[1] == 2 * R - 2
    assert_close(case.answer(model), expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.tiny.build(), str(tmp_path), is_trainable=True)
    for held in (model, again):
        with pytest.raises(pr.ConfigError, match="compacted for evaluation"):
            case.loss(held.train())
        with torch.no_grad(), pytest.raises(pr.ConfigError, match="compacted for evaluation"):
            held.train()(**case.tiny.inputs())
        with view(held, "base"):
            held(**case.tiny.inputs())
        with pytest.raises(pr.ConfigError, match="compacted for evaluation"):
            append(held, R)
        assert_close(case.answer(held.eval()), expected)


def test_sixteen_bits_round_keys_and_what_they_reach_is_not_known():
    _, model = grown(1, delta=0.3)
    layer = layers(model)[0]
    with torch.no_grad():
        layer.bank[0][0] = layer.bank[0][1] / 128
    layer.module.base_layer.to(torch.bfloat16)
    with pytest.raises(pr.ConfigError, match=rf"{layer.site.path} .*bfloat16.*evaluation=False"):
        compact(model, evaluation=True)
    assert layer.bank[1].shape[1] == R
    assert compact(model)[0].silent == 0


def test_what_cannot_be_compacted_says_why():
    plain = Case(pr.method("olora", r=R), 0, MODELS["llama"]).build()
    with pytest.raises(pr.ConfigError, match="reads ranks independently"):
        compact(plain)
    _, model = grown(1)
    replica(model, "slow")
    with pytest.raises(pr.ConfigError, match="keeps replicas"):
        compact(model)


def test_a_mean_gate_covers_a_compacted_bank():
    case, model = grown(1, k=4)
    silenced(model, 0)
    batch = {k: v for k, v in case.tiny.inputs().items() if k != "labels"}
    twin = grown(1, k=4)[1]
    silenced(twin, 0)
    compact(model)
    ours, theirs = (pr.merge(m, approximate=[batch]) for m in (model, twin))
    with torch.no_grad():
        assert_close(ours(**batch).logits, theirs(**batch).logits)


# --- a stream -------------------------------------------------------------------------------------


def test_a_run_grows_resumes_shows_reuse_and_saves_trained_ranks_only(tmp_path):
    stream = few_digits(rows=16, tasks=3)
    given = {
        "train": {"epochs": 2, "batch_size": 8, "lr": 1e-2},
        "references": [],
        "progress": False,
    }
    method = pr.method("mora", r=2, k=6, tau=0.1)
    result = engine.run(tiny_vit(), stream, method, out=tmp_path / "run", **given)
    system = result.system()
    reuse = next(f for f in system["figures"] if f["name"] == "reuse")
    assert len(reuse["values"]) == 3
    assert all(0 < sum(row) <= 1 + 1e-6 for row in reuse["values"])
    loaded = pr.load(tiny_vit(), tmp_path / "run" / system["adapter"])
    for layer in layers(loaded):
        B = torch.cat([layer.bank[1], layer.B], dim=1)
        assert B.shape[1] == 6
        assert B.any(0).all()
        assert layer.segments == [2, 2]
    assert not math.isnan(result.metrics["average_accuracy"])
