"""lora-ga: the gradient's directions, the law of the first step, a start that changes nothing."""

import copy
import importlib.util
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

import polyrank as pr
from polyrank.errors import CheckpointError, ConfigError, MergeError
from polyrank.frame import keyed
from polyrank.layers import absorb, adapter_of, append, redraw, saved_of
from polyrank.parts.decompose import leading
from polyrank.parts.starts import split
from polyrank.parts.transforms import plain_lora
from polyrank.testing import assert_close

DIRECTIONS = ["ArB2r", "A2rBr", "ArBr", "random"]
MAGNITUDES = ["stable", "unit", "gd", "weightS"]
NARROW, WIDE = 13, 21


class Net(nn.Module):
    """Two layers of which no width divides another."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(2)
        self.up, self.down = nn.Linear(NARROW, WIDE), nn.Linear(WIDE, NARROW)
        self.to(dtype)

    def forward(self, x):
        return self.down(self.up(x).tanh())


def rows(dtype=torch.float32, count=40, seed=0):
    rng = keyed("rows", seed)
    x = torch.randn(count, NARROW, generator=rng, dtype=torch.float64)
    return {"x": x.to(dtype), "y": torch.randn(count, NARROW, generator=rng).to(dtype)}


def loss(model, batch):
    return (model(batch["x"]) - batch["y"]).square().sum(1).mean()


def start(dtype=torch.float32, scaled=1.0, base=None, batches=None, **options):
    options = {"r": 3, "alpha": 4.0, **options}
    base = Net(dtype) if base is None else base
    model = pr.adapt(base, pr.method("lora-ga", **options), ["up", "down"], seed=1)
    if dtype == torch.float64:
        model.double()
    batches = [rows(dtype)] if batches is None else batches
    pr.initialise(model, batches, lambda m, b: scaled * loss(m, b))
    return model


def gradient(model, batch):
    """The gradient of the loss by the weight that acts, by layer."""
    whole = copy.deepcopy(model).merge_and_unload()
    whole.requires_grad_(True)
    loss(whole, batch).backward()
    return {path: whole.get_submodule(path).weight.grad for path in ("up", "down")}


def layers(model):
    return {view.site.path: view for view in adapter_of(model).layers}


def factor(view):
    """f by its definition, from the square of what was written."""
    return float((view.A @ view.A.T).diagonal().mean().detach().sqrt())


def best(G, ranks):
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    return U[:, :ranks] * S[:ranks] @ Vt[:ranks]


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_ga_1_start_and_shadow_add_up_to_the_weight(magnitude):
    model = start(magnitude=magnitude)
    for view in layers(model).values():
        weight = view.module.get_base_layer().weight.detach()
        offset = view.scale * view.B.detach() @ view.A.detach()
        assert offset.any()
        A0, B0, _ = view.shadow
        assert torch.equal(A0, view.A)
        assert torch.equal(B0, view.B)
        bound = 4 * torch.finfo(torch.float32).eps * max(weight.abs().max(), offset.abs().max())
        view.module.merge()
        assert float((view.module.get_base_layer().weight - weight).abs().max()) <= bound
        view.module.unmerge()
        # What is subtracted stays where it was when the live factors go elsewhere.
        x = rows()["x"] if weight.shape[1] == NARROW else torch.randn(5, WIDE)
        with torch.no_grad():
            view.B.zero_()
            assert_close(view.module(x), view.module.get_base_layer()(x) - x @ offset.T)


def test_ga_1_a_base_of_bf16_keeps_its_bits():
    base = Net(torch.bfloat16)
    before = {n: p.clone() for n, p in base.named_parameters()}
    model = start(torch.bfloat16, base=base)
    for path, view in layers(model).items():
        assert torch.equal(view.module.get_base_layer().weight, before[f"{path}.weight"])
        assert view.A.dtype == torch.float32
        assert not view.delta().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ga_2_the_start_answers_as_the_base_bit_for_bit(direction, dtype):
    model, x = start(dtype, direction=direction), rows(dtype)["x"]
    expected = Net(dtype)(x)
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ga_3_the_factors_are_orthogonal_and_of_one_size(direction, magnitude):
    model = start(direction=direction, magnitude=magnitude, gamma=9.0, scaling=0.7)
    for view in layers(model).values():
        f = {
            "stable": view.site.d_out**0.25 / 3,
            "unit": 1.0,
            "gd": 1 / 0.7,
            "weightS": (torch.linalg.svdvals(view.weight())[:3] / 0.7).sqrt().mean(),
        }[magnitude]
        eye = torch.eye(3) * float(f) ** 2
        assert_close(view.A @ view.A.T, eye)
        assert_close(view.B.T @ view.B, eye)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ga_4_the_factors_span_the_leading_singular_vectors(direction):
    model = start(torch.float64, direction=direction)
    grads = gradient(model, rows(torch.float64))
    for path, view in layers(model).items():
        U, S, Vt = torch.linalg.svd(grads[path])
        assert S[5] > 1.05 * S[6]
        chosen, other = split(direction, 3, keyed(1, "default", path, "start"))
        assert sorted([*chosen.tolist(), *other.tolist()]) == list(range(6))
        f = factor(view)
        assert_close(view.A.T @ view.A, f**2 * Vt[chosen].T @ Vt[chosen], dtype=torch.float32)
        assert_close(view.B @ view.B.T, f**2 * U[:, other] @ U[:, other].T, dtype=torch.float32)


def test_ga_4_which_vectors_are_whose_is_as_published():
    rng = keyed(0)
    assert [t.tolist() for t in split("ArB2r", 3, rng)] == [[0, 1, 2], [3, 4, 5]]
    assert [t.tolist() for t in split("A2rBr", 3, rng)] == [[3, 4, 5], [0, 1, 2]]
    assert [t.tolist() for t in split("ArBr", 3, rng)] == [[1, 3, 5], [0, 2, 4]]
    drawn = [split("random", 3, keyed(seed)) for seed in range(6)]
    assert len({str(t) for t in drawn}) > 3
    assert all(not {*a.tolist()} & {*b.tolist()} for a, b in drawn)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("r", [3, 6], ids=["leading", "nearly all"])
def test_ga_5_the_product_with_the_gradient_is_its_best_approximation(direction, r):
    model = start(direction=direction, r=r)
    grads = gradient(model, rows())
    for path, view in layers(model).items():
        A, B, G = view.A.detach(), view.B.detach(), grads[path]
        found = G @ A.T @ A + B @ B.T @ G
        reason = "1e-4 is asked for: an approximation from a gradient in fp32"
        assert_close(found, factor(view) ** 2 * best(G, 2 * r), tol=1e-4, reason=reason)


def test_ga_5_with_all_directions_it_is_the_gradient():
    class Even(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.Linear(8, 8)

        def forward(self, x):
            return self.up(x)

    model = pr.adapt(Even(), pr.method("lora-ga", r=4), ["up"], seed=1)
    x = torch.randn(30, 8)
    pr.initialise(model, [x], lambda m, b: m(b).pow(3).mean())
    (view,) = adapter_of(model).layers
    base = Even()
    base(x).pow(3).mean().backward()
    A, B, G = view.A.detach(), view.B.detach(), base.up.weight.grad
    assert_close(G @ A.T @ A + B @ B.T @ G, factor(view) ** 2 * G)


def test_ga_6_the_scale_of_the_loss_does_not_matter_and_its_sign_only_for_signs():
    first, larger, turned = start(), start(scaled=1024.0), start(scaled=-1.0)
    for path, view in layers(first).items():
        again, other = layers(larger)[path], layers(turned)[path]
        assert torch.equal(view.A, again.A)
        assert torch.equal(view.B, again.B)
        assert_close(other.A.abs(), view.A.abs())
        assert_close(other.B.abs(), view.B.abs())
    third = start(scaled=0.3)
    for path, view in layers(first).items():
        # Singular vectors of a rounded matrix turn a little; their planes are what is compared.
        again = layers(third)[path]
        assert_close(again.A.T @ again.A, view.A.T @ view.A, dtype=torch.float32)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ga_7_one_step_follows_the_exact_law_and_lowers_the_loss(direction):
    model, batch = start(torch.float64, direction=direction), rows(torch.float64)
    grads, lr = gradient(model, batch), 1e-4
    optimizer = torch.optim.SGD(pr.parameter_groups(model, lr=lr))
    before = loss(model, batch)
    before.backward()
    optimizer.step()
    expected = 0.0
    for path, view in layers(model).items():
        A0, B0, _ = view.shadow
        G, s = grads[path], view.scale
        law = -lr * s**2 * (G @ A0.T @ A0 + B0 @ B0.T @ G)
        law = law + lr**2 * s**3 * (G @ A0.T) @ (B0.T @ G)
        assert_close(view.delta(), law, dtype=torch.float32)
        expected += lr * s**2 * factor(view) ** 2 * float(best(G, 6).square().sum())
    fallen = float((before - loss(model, batch)).detach())
    assert fallen > 0
    assert_close(fallen, expected, tol=5e-2, reason="to first order in a small step")


def trained(model, steps=3):
    optimizer = pr.optimizer(model, 1e-2)
    attached = pr.attach(optimizer, model)
    for _ in range(steps):
        loss(model, rows()).backward()
        optimizer.step()
        optimizer.zero_grad()
    attached.detach()
    return model.eval()


@pytest.mark.parametrize("scaling", ["alpha/sqrt(r)", "alpha/r", 0.3])
def test_ga_8_the_export_is_plain_lora_of_twice_the_rank_on_the_original_base(scaling, tmp_path):
    model = trained(start(scaling=scaling))
    x = rows()["x"]
    pr.export(model, tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (about["peft_type"], about["r"], about["init_lora_weights"]) == ("LORA", 6, True)
    plain = PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    assert_close(plain(x), model(x))
    assert ((model(x) - Net()(x)).abs() > 1e-2).any()
    nothing = plain_lora(saved_of(start(scaling=scaling)))
    for path in ("up", "down"):
        A, B = (nothing.tensors[f"base_model.model.{path}.lora_{s}.weight"] for s in "AB")
        assert A.shape[0] == 6
        size = (B[:, :3] @ A[:3]).abs().max()
        assert float((B @ A).abs().max()) <= 1e-6 * size


def test_ga_8_without_its_shadow_it_is_neither_exported_nor_loaded(tmp_path):
    model = trained(start())
    saved = saved_of(model)
    saved.tensors = {k: t for k, t in saved.tensors.items() if "shadow" not in k}
    with pytest.raises(CheckpointError, match=r"(up|down) lacks the factors that its start subtr"):
        plain_lora(saved)
    model.save_pretrained(tmp_path)
    save_file(saved.tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="polyrank_shadow"):
        PeftModel.from_pretrained(Net(), str(tmp_path))


def test_ga_8_saved_and_loaded_on_the_pristine_base_it_answers_as_trained(tmp_path):
    model = trained(start(norm_clip=True, magnitude="weightS"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), str(tmp_path), is_trainable=True)
    assert all(not view.waiting for view in adapter_of(again).layers)
    assert_close(again.eval()(rows()["x"]), model(rows()["x"]))
    # It trains on without statistics.
    trained(again.train(), 1)


def test_ga_8_merged_and_absorbed_it_answers_the_same():
    model, x = trained(start()), rows()["x"]
    expected = model(x)
    assert_close(copy.deepcopy(model).merge_and_unload()(x), expected)
    absorb(model)
    assert_close(model(x), expected)
    assert all(view.shadow is None and view.waiting for view in layers(model).values())
    pr.initialise(model, [rows(seed=1)], loss, key="next")
    assert all(view.shadow is not None for view in layers(model).values())
    assert_close(model(x), expected)


def test_a_bank_takes_the_shadow_along():
    made = pr.method("olora", r=3, init_by="lora-ga:direction=ArBr")
    model = pr.adapt(Net(), made, ["up", "down"], seed=1)
    pr.initialise(model, [rows()], loss)
    trained(model)
    expected = model(rows()["x"])
    append(model)
    assert_close(model(rows()["x"]), expected)
    for view in layers(model).values():
        assert view.bank[0].shape[0] == 6
        assert view.shadow is None
        assert view.waiting
    pr.initialise(model, [rows(seed=1)], loss, key="next")
    assert_close(model(rows()["x"]), expected)


def test_shrinking_keeps_the_offset_below_the_weight():
    clipped, free = start(norm_clip=True, gamma=0.01), start(gamma=0.01)
    for path, view in layers(clipped).items():
        most = view.weight().abs().max()
        assert_close(view.scale * (view.B @ view.A).abs().max(), most)
        other = layers(free)[path]
        assert view.scale * (other.B @ other.A).abs().max() > 1.5 * most
        assert_close(view.A / factor(view), other.A / factor(other))
    small, unclipped = start(norm_clip=True, gamma=1e4), start(gamma=1e4)
    for path, view in layers(small).items():
        assert torch.equal(view.A, layers(unclipped)[path].A)


def test_the_same_key_gives_the_same_start_and_another_one_another():
    options = {"direction": "random"}
    first, again = start(**options), start(**options)
    for path, view in layers(first).items():
        assert torch.equal(view.A, layers(again)[path].A)
    redraw(again)
    pr.initialise(again, [rows()], loss, key="other")
    assert any(not torch.equal(v.A, layers(again)[path].A) for path, v in layers(first).items())


@pytest.mark.parametrize("shape", [(300, 200), (150, 260)])
def test_a_drawn_decomposition_finds_the_leading_planes(shape):
    torch.manual_seed(0)
    M = torch.randn(shape[0], 40) @ torch.randn(40, shape[1]) + 0.1 * torch.randn(shape)
    found = leading(M, 6, keyed(1), width=24, exact=0)
    want = leading(M, 6, keyed(2))
    assert [t.shape for t in found] == [(shape[0], 6), (6,), (6, shape[1])]
    for (U, S, Vt), eye in ((found, torch.eye(6)), (want, torch.eye(6))):
        assert_close(U.T @ U, eye)
        assert_close(Vt @ Vt.T, eye)
        assert torch.equal(S, S.sort(descending=True).values)
    reason = "found by four power iterations with four times the ranks"
    assert_close(found[1], want[1], tol=1e-4, reason=reason)
    assert_close(found[2].T @ found[2], want[2].T @ want[2], tol=1e-2, reason=reason)
    again = leading(M, 6, keyed(1), width=24, exact=0)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert not torch.equal(leading(M, 6, keyed(3), width=24, exact=0)[2], found[2])


def test_all_faults_are_told_at_once_and_a_narrow_layer_by_name():
    with pytest.raises(ConfigError) as told:
        pr.method("lora-ga", gamma=0, direction="up", magnitude="large", batches=0, r=0)
    assert len(told.value.problems) == 5
    with pytest.raises(ConfigError, match=r"r at up: got 7, expected 2 r <= 13, its smaller wid"):
        pr.adapt(Net(), pr.method("lora-ga", r=7), ["up", "down"])
    with pytest.raises(ConfigError, match="adapts linear layers"):
        pr.adapt(nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4)), pr.method("lora-ga"), ["1"])


needs_bnb = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)


@needs_bnb
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_starts_from_its_gradient_as_well():
    import bitsandbytes as bnb

    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False).to("cpu")

        def forward(self, x):
            return self.up(x).tanh()

    x, y = torch.randn(9, 64), torch.randn(9, 128)
    model = pr.adapt(Quantised(), pr.method("lora-ga", r=2), ["up"], seed=1)
    pr.initialise(model, [{"x": x}], lambda m, b: (m(b["x"]) - y).square().mean())
    model.train()
    with torch.no_grad():
        assert torch.equal(model(x), Quantised()(x))
        out = Quantised()(x)
        G = ((2 / y.numel()) * (out - y) * (1 - out**2)).T @ x
    (view,) = adapter_of(model).layers
    A, B = view.A.detach(), view.B.detach()
    found = G @ A.T @ A + B @ B.T @ G
    reason = "1e-4 is asked for: an approximation from a gradient in fp32"
    assert_close(found, factor(view) ** 2 * best(G, 4), tol=1e-4, reason=reason)
    weighed = pr.adapt(Quantised(), pr.method("lora-ga", r=2, norm_clip=True), ["up"], seed=1)
    with pytest.raises(MergeError, match="is quantised"):
        pr.initialise(weighed, [{"x": x}], lambda m, b: (m(b["x"]) - y).square().mean())


def test_published_settings_have_names():
    assert pr.method("lora-ga", preset="paper") == pr.method("lora-ga")
    fork = pr.method("lora-ga", preset="fork", batches=2)
    assert (fork.r, fork.scaling, fork.batches) == (32, "alpha/r", 2)
