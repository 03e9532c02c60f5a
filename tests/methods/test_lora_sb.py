"""lora-sb and lora-xs: a square core between frozen factors, from an update or the weight."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from torch import nn

import polyrank as pr
from polyrank.errors import CheckpointError, ConfigError, MergeError
from polyrank.frame import keyed
from polyrank.layers import absorb, adapter_of, append, keep, saved_of
from polyrank.parts.square import mixed
from polyrank.parts.starts import UpdateStart
from polyrank.parts.transforms import plain_lora
from polyrank.testing import assert_close

NARROW, WIDE, ROWS = 13, 21, 12


class Net(nn.Module):
    """Two layers of which no width divides another."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(2)
        self.up, self.down = nn.Linear(NARROW, WIDE), nn.Linear(WIDE, NARROW)
        self.to(dtype)

    def forward(self, x):
        return self.down(self.up(x).tanh())


def rows(dtype=torch.float32, count=ROWS, seed=0):
    rng = keyed("rows", seed)
    x = torch.randn(count, NARROW, generator=rng)
    return {"x": x.to(dtype), "y": torch.randn(count, NARROW, generator=rng).to(dtype)}


def loss(model, batch):
    return (model(batch["x"]) - batch["y"]).square().sum(1).mean()


def start(dtype=torch.float32, scaled=1.0, batches=None, name="lora-sb", **options):
    own = {"rows": ROWS, "eta": 1e-2} if name == "lora-sb" else {}
    made = pr.method(name, **{"r": 3, **own, **options})
    model = pr.adapt(Net(dtype), made, ["up", "down"], seed=1)
    if dtype == torch.float64:
        model.double()
    if name == "lora-sb":
        batches = [rows(dtype)] if batches is None else batches
        pr.initialise(model, batches, lambda m, b: scaled * loss(m, b))
    return model


def layers(model):
    return {view.site.path: view for view in adapter_of(model).layers}


def sums(dtype=torch.float32):
    """Σ over rows of the gradient by each base weight."""
    base = Net(dtype)
    (ROWS * loss(base, rows(dtype))).backward()
    return {path: base.get_submodule(path).weight.grad for path in ("up", "down")}


def gradient(model, batch):
    """The gradient of the loss by the weight that acts, by layer."""
    whole = copy.deepcopy(model).merge_and_unload()
    whole.requires_grad_(True)
    loss(whole, batch).backward()
    return {path: whole.get_submodule(path).weight.grad for path in ("up", "down")}


def R_of(view):
    return view.core.weight


@pytest.mark.parametrize("name", ["lora-sb", "lora-xs"])
def test_sb_1_only_the_square_trains(name):
    model = start(name=name)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    assert set(trained.values()) == {9}
    assert all("polyrank_core" in n for n in trained)
    for view in layers(model).values():
        A, B = view.A, view.B
        assert_close(A @ A.T, torch.eye(3))
        if name == "lora-sb":
            assert_close(B.T @ B, torch.eye(3))
    for verb in (lambda: model.set_adapter("default"), model.base_model.enable_adapter_layers):
        verb()
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trained.keys()


@pytest.mark.parametrize("r", [3, NARROW], ids=["low", "full"])
@pytest.mark.parametrize("scaling", [1.0, 0.4])
def test_sb_2_the_start_is_the_best_approximation_of_the_update(r, scaling):
    model, found = start(r=r, scaling=scaling), sums()
    for path, view in layers(model).items():
        D = -1e-2 * found[path].sign()
        S = torch.linalg.svdvals(D)
        update = view.delta()
        assert_close(view.scale * view.B @ R_of(view) @ view.A, update)
        rest = (update - D).square().sum()
        assert_close(rest + S[:r].square().sum(), S.square().sum())
        assert_close(torch.linalg.svdvals(update)[:r], S[:r])
        if r == NARROW:
            assert_close(update, D)


def test_sb_2_a_drawn_decomposition_of_signs_is_good_with_oversampling_only():
    from polyrank.parts.decompose import leading

    D = torch.randn(300, 400, generator=keyed("signs")).sign()
    total, best = D.square().sum(), torch.linalg.svdvals(D)[:16].square().sum()
    wide = leading(D, 16, keyed(1), width=32, passes=10, exact=0)[1].square().sum()
    bare = leading(D, 16, keyed(1), width=16, passes=10, exact=0)[1].square().sum()
    reason = "published bound for the error that is left, at twice the ranks"
    assert_close(total - wide, total - best, tol=1e-3, reason=reason)
    assert best > wide > bare


def test_sb_3_the_update_has_three_values_and_knows_the_sign_of_the_loss_alone():
    init = UpdateStart(step="sign", eta=1e-2, samples=0, training=True, released=False)
    total = torch.tensor([[2.0, 0.0, -3.0], [1e-20, -5.0, 0.5]])
    stat = {"weight_grad": total, "count": torch.tensor(4.0)}
    D = init.update(stat)
    assert sorted({float(v) for v in D.flatten()}) == pytest.approx([-0.01, 0.0, 0.01])
    assert torch.equal(D, -0.01 * total.sign())
    assert torch.equal(init.update({**stat, "weight_grad": 7 * total}), D)
    assert torch.equal(init.update({**stat, "weight_grad": -total}), -D)
    init.step = "sgd"
    assert_close(init.update(stat), -0.01 * total / 4)
    plain, larger, turned = start(), start(scaled=8.0), start(scaled=-1.0)
    for path, view in layers(plain).items():
        assert torch.equal(layers(larger)[path].delta(), view.delta())
        assert_close(layers(turned)[path].delta(), -view.delta())


@pytest.mark.parametrize("scaling", [1.0, 0.4])
def test_sb_4_and_5_the_gradient_of_the_square_is_the_projected_one(scaling):
    model, batch = start(torch.float64, scaling=scaling), rows(torch.float64)
    grads, s = gradient(model, batch), scaling
    loss(model, batch).backward()
    for path, view in layers(model).items():
        A, B, G = view.A.detach(), view.B.detach(), grads[path]
        g = R_of(view).grad
        assert_close(g, s * B.T @ G @ A.T, dtype=torch.float32)
        assert A.grad is None
        assert view.A.grad is None
        assert view.B.grad is None
        # The best gradient g / s² acts on W as the two-sided projection of G, whatever s.
        reason = "factors were found in fp32, from a gradient in fp32"
        best = B @ B.T @ G @ A.T @ A
        assert_close(s * B @ (g / s**2) @ A, best, tol=1e-6, reason=reason)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_sb_6_no_other_gradient_comes_closer(orthonormal):
    rng = keyed("six")
    G = torch.randn(WIDE, NARROW, generator=rng, dtype=torch.float64)
    B = torch.randn(WIDE, 3, generator=rng, dtype=torch.float64)
    A = torch.randn(3, NARROW, generator=rng, dtype=torch.float64)
    s = 0.7
    if orthonormal:
        view = layers(start(torch.float64, scaling=s))["up"]
        A, B = view.A.detach(), view.B.detach()
    g = s * B.T @ G @ A.T
    best = torch.linalg.inv(B.T @ B) @ g @ torch.linalg.inv(A @ A.T) / s**2
    least = torch.linalg.norm(s * B @ best @ A - G)
    if orthonormal:
        assert_close(best, g / s**2, dtype=torch.float32)
    for scale in (1e-3, 1e-1, 1.0):
        E = scale * torch.randn(3, 3, generator=rng, dtype=torch.float64)
        assert torch.linalg.norm(s * B @ (best + E) @ A - G) > least


def test_sb_7_a_step_lowers_the_loss_by_the_square_of_the_projected_gradient():
    model, batch = start(torch.float64), rows(torch.float64)
    grads = gradient(model, batch)
    slope = sum(
        float((view.B.detach().T @ grads[path] @ view.A.detach().T).square().sum())
        for path, view in layers(model).items()
    )
    before, ends = loss(model, batch), []
    before.backward()
    steps = {view: R_of(view).grad.clone() for view in layers(model).values()}
    kept = {view: R_of(view).detach().clone() for view in steps}
    lr = 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            for view, g in steps.items():
                R_of(view).copy_(kept[view] - sign * lr * g)
            ends.append(float(loss(model, batch)))
    found = (ends[0] - ends[1]) / (2 * lr)
    assert_close(found, -slope, tol=1e-3, reason="central differences")


def test_sb_8_a_square_of_zero_answers_as_the_base():
    x = rows()["x"]
    for name in ("lora-sb", "lora-xs"):
        model = start(name=name)
        with torch.no_grad():
            for view in layers(model).values():
                R_of(view).zero_()
        assert torch.equal(model(x), Net()(x))
    assert torch.equal(start(name="lora-xs")(x), Net()(x))
    assert not torch.equal(start(name="lora-xs", std=0.1)(x), Net()(x))


def trained(model, steps=3, lr=1e-2):
    optimizer = pr.optimizer(model, lr)
    for step in range(steps):
        loss(model, rows(R_of(next(iter(layers(model).values()))).dtype, seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("name", ["lora-sb", "lora-xs"])
def test_sb_8_merging_and_unmerging_give_the_same_answers(name):
    model, x = trained(start(name=name)), rows()["x"]
    expected = model(x)
    weight = model.get_base_model().up.base_layer.weight
    before = weight.clone()
    model.merge_adapter()
    assert_close(model(x), expected, tol=1e-6, reason="1e-6 is asked for")
    model.unmerge_adapter()
    assert_close(weight, before, tol=1e-6, reason="1e-6 is asked for")
    assert_close(model(x), expected, tol=1e-6, reason="1e-6 is asked for")


def test_sb_9_flipping_singular_pairs_changes_nothing_under_adam():
    ends = []
    for flip in (False, True):
        model = start(torch.float64)
        if flip:
            sign = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
            with torch.no_grad():
                for view in layers(model).values():
                    view.A.copy_(sign @ view.A)
                    view.B.copy_(view.B @ sign)
                    R_of(view).copy_(sign @ R_of(view) @ sign)
        ends.append([view.delta() for view in layers(trained(model, 5)).values()])
    for a, b in zip(*ends, strict=True):
        assert_close(b, a, dtype=torch.float32)


def test_sb_10_the_start_does_not_depend_on_the_size_of_batches():
    whole = rows(torch.float64)
    singles = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(ROWS)]
    uneven = [{k: v[:7] for k, v in whole.items()}, {k: v[7:] for k, v in whole.items()}]
    first = layers(start(torch.float64))
    assert float(min(t.abs().min() / t.abs().max() for t in sums(torch.float64).values())) > 1e-7
    for batches in (singles, uneven):
        for path, view in layers(start(torch.float64, batches=batches)).items():
            assert_close(view.delta(), first[path].delta(), dtype=torch.float32)


def test_sb_10_a_batch_is_cut_where_the_rows_are_enough():
    batches = [rows(), rows(seed=1)]
    cut = start(rows=17, batches=batches)
    part = {k: v[:5] for k, v in batches[1].items()}
    again = start(rows=17, batches=[batches[0], part])
    for path, view in layers(cut).items():
        assert torch.equal(view.delta(), layers(again)[path].delta())
    with pytest.raises(ConfigError, match="hold 1 rows too few, expected 25"):
        start(rows=25, batches=batches)


def test_sb_11_the_start_lowers_the_loss_on_the_rows_it_was_made_of():
    for eta in (1e-4, 1e-3):
        assert loss(start(eta=eta), rows()) < loss(Net(), rows())


def test_the_first_rate_stands_for_eta():
    made = pr.method("lora-sb", r=3, rows=ROWS)
    model = pr.adapt(Net(), made, ["up", "down"], seed=1)
    with pytest.raises(ConfigError, match=r"takes a step of the first learning rate; give it as"):
        pr.initialise(model, [rows()], loss)
    pr.initialise(model, [rows()], loss, rate=1e-2)
    for path, view in layers(start()).items():
        assert torch.equal(view.delta(), layers(model)[path].delta())


def test_as_released_the_factors_are_rounded():
    exact, rounded = start(), start(released=True)
    for path, view in layers(rounded).items():
        assert torch.equal(view.A, view.A.bfloat16().float())
        eye = view.A @ view.A.T
        assert float((eye - torch.eye(3)).abs().max()) > 1e-4
        assert_close(eye, torch.eye(3), tol=1e-2, reason="bf16 keeps three digits")
        assert not torch.equal(view.delta(), layers(exact)[path].delta())


@pytest.mark.parametrize("name", ["lora-sb", "lora-xs"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_input_of_a_layer_is_not_kept_for_backward(name, autocast):
    """With A frozen only h and R h are (tokens, r); LoRA keeps x as well."""

    def saved(name):
        model, kept = start(name=name) if name != "lora" else lora(), []
        layer = adapter_of(model).layers[0].module
        x = torch.randn(50, NARROW, requires_grad=True)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
        with hooks, torch.autocast("cpu", enabled=autocast):
            layer(x)
        return [tuple(t.shape) for t in kept if t.dim() == 2 and t.shape[0] == 50]

    def lora():
        return pr.adapt(Net(), pr.method("lora", r=3), ["up", "down"], seed=1)

    assert (50, NARROW) in saved("lora")
    assert set(saved(name)) == {(50, 3)}
    assert len(saved(name)) == 1


def test_xs_the_factors_are_the_weights_own():
    model = start(name="lora-xs")
    for view in layers(model).values():
        U, S, Vt = torch.linalg.svd(view.weight(), full_matrices=False)
        assert_close(view.B @ view.A, U[:, :3] * S[:3] @ Vt[:3])
        assert not R_of(view).any()
    assert pr.method("lora-xs").neutral
    assert not pr.method("lora-xs", preset="paper").neutral


def family(count=3):
    """Adapters from one start, each trained on rows of its own, and the models they come from."""
    models = []
    for seed in range(count):
        model = start()
        optimizer = pr.optimizer(model, 1e-2)
        for _ in range(3):
            loss(model, rows(seed=seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    return models, [saved_of(model) for model in models]


@pytest.mark.parametrize("weights", [None, [0.5, -1.0, 2.0]])
def test_cores_of_one_start_mix_exactly(weights):
    models, saved = family()
    found = mixed(*saved, weights=weights)
    shares = weights or [1 / 3] * 3
    for path in ("up", "down"):
        view = layers(models[0])[path]
        expected = sum(
            w * layers(model)[path].delta() for w, model in zip(shares, models, strict=True)
        )
        R = found.tensors[f"base_model.model.{path}.polyrank_core.weight"]
        assert_close(view.scale * view.B @ R @ view.A, expected)
    assert found.plan == {"mixed": shares}
    again = mixed(*saved, weights=weights)
    assert all(torch.equal(t, again.tensors[key]) for key, t in found.tensors.items())


def test_cores_between_other_factors_are_refused():
    _, (first, _, _) = family()
    other = saved_of(start(eta=2e-2, batches=[rows(seed=5)]))
    with pytest.raises(ConfigError, match=r"adapters differ in .*polyrank_A.weight.*one start"):
        mixed(first, other)
    with pytest.raises(ConfigError, match="got 1 adapters and 2 weights"):
        mixed(first, weights=[1.0, 2.0])
    lora = saved_of(pr.adapt(Net(), pr.method("lora", r=3), ["up", "down"], seed=1))
    with pytest.raises(ConfigError, match="adapter of 'lora' has no square cores"):
        mixed(lora)


@pytest.mark.parametrize("name", ["lora-sb", "lora-xs"])
def test_saved_loaded_and_exported_it_answers_the_same(name, tmp_path):
    model, x = trained(start(name=name)).eval(), rows()["x"]
    model.save_pretrained(tmp_path / "own")
    about = json.loads((tmp_path / "own/adapter_config.json").read_text())
    assert all(shapes["started"] for shapes in about["sites"].values())
    again = PeftModel.from_pretrained(Net(), str(tmp_path / "own"), is_trainable=True)
    assert_close(again.eval()(x), model(x))
    trained(again.train(), 1)
    pr.export(model, tmp_path / "plain")
    about = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"]) == (3, 3)
    assert_close(PeftModel.from_pretrained(Net(), str(tmp_path / "plain")).eval()(x), model(x))
    assert plain_lora(saved_of(model)).plan["ranks"] == {"up": 3, "down": 3}


def test_without_its_factors_it_is_not_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    start().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if "polyrank_B" not in k}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="polyrank_B"):
        PeftModel.from_pretrained(Net(), str(tmp_path))


def test_ranks_are_kept_by_both_axes_and_a_bank_is_refused():
    model = trained(start())
    view = layers(model)["up"]
    A, B, R = view.A.clone(), view.B.clone(), R_of(view).clone()
    keep(model, view, torch.tensor([2, 0]))
    assert torch.equal(R_of(view), R[[2, 0]][:, [2, 0]])
    assert_close(view.delta(), B[:, [2, 0]] @ R[[2, 0]][:, [2, 0]] @ A[[2, 0]])
    with pytest.raises(ConfigError, match="does not define banked"):
        append(model)


def test_absorbed_it_waits_for_the_next_start():
    model, x = trained(start()).eval(), rows()["x"]
    expected = model(x)
    absorb(model)
    assert_close(model(x), expected)
    assert all(view.waiting for view in layers(model).values())
    pr.initialise(model, [rows(seed=3)], loss, key="next")
    assert not any(view.waiting for view in layers(model).values())
    with pytest.raises(AssertionError, match="values differ"):
        assert_close(model(x), expected)


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError) as told:
        pr.method("lora-sb", rows=0, eta=0.0, step="adam", scaling="alpha/r", r=0)
    assert len(told.value.problems) == 5
    for eta in (-1.0, float("nan"), float("inf"), True, "many"):
        with pytest.raises(ConfigError, match="eta: got"):
            pr.method("lora-sb", eta=eta)
    with pytest.raises(ConfigError, match="scaling: got 0"):
        pr.method("lora-sb", scaling=0.0)
    for name in ("lora-sb", "lora-xs"):
        with pytest.raises(ConfigError, match=r"r at up: got 14, expected r <= 13"):
            pr.adapt(Net(), pr.method(name, r=14), ["up", "down"])
    with pytest.raises(ConfigError, match="std: got -1"):
        pr.method("lora-xs", std=-1.0)


def test_xs_needs_a_weight_that_can_be_read(monkeypatch):
    from polyrank.layers import AdaptedLinear

    monkeypatch.setattr(AdaptedLinear, "quantised", lambda self: True)
    with pytest.raises(MergeError, match="polyrank needs a dense one"):
        start(name="lora-xs")
