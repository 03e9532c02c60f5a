"""altlora in use: groups, clipping, gates, resumption, processes, PEFT's own LoRA, refusals."""

import copy
import json
import multiprocessing
import os

import peft
import pytest
import torch
import torch.distributed as dist
from peft.optimizers import create_riemannian_optimizer
from torch import nn

import polyrank as pr
from polyrank import engine
from polyrank.engine.state import optimizer_state, restore_optimizer
from polyrank.errors import CheckpointError, ConfigError, RunError
from polyrank.frame import keyed
from polyrank.parts import pairs
from polyrank.parts.alternating import Alternating
from polyrank.parts.gates import StaticGate
from polyrank.testing import assert_close
from polyrank.testing.streams import few_digits, tiny_vit

D_IN, WIDTH = 6, 10


def draw(*shape, key=0, dtype=torch.float64):
    return torch.randn(*shape, generator=keyed("altlora-use", key, *shape), dtype=dtype)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(D_IN, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.embed, self.last = nn.Embedding(5, D_IN), nn.Linear(WIDTH, 3)

    def forward(self, x, ids=None):
        x = x if ids is None else x + self.embed(ids)
        return self.last(self.second(self.first(x).tanh()).tanh())


def net(dtype=torch.float64):
    made = Net().to(dtype)
    with torch.no_grad():
        for key, p in enumerate(made.parameters()):
            p.copy_(draw(*p.shape, key=key) / p.shape[-1] ** 0.5)
    return made


def adapted(method="altlora", dtype=torch.float64, head=True, **options):
    place = {"modules_to_save": ["last"]} if head else {}
    made = pr.method(method, **{"r": 3, **options})
    return pr.adapt(net(dtype), made, ["first", "second"], seed=1, **place).to(dtype)


def batch(n, rows=8, dtype=torch.float64):
    return draw(rows, D_IN, key=100 + n, dtype=dtype), draw(rows, 3, key=200 + n, dtype=dtype)


def loss_of(model, n, part=slice(None), dtype=torch.float64):
    x, y = (t[part] for t in batch(n, dtype=dtype))
    return (model(x) - y).square().sum() / 8


def train(model, steps=4, lr=0.05, clip=0.0, micro=1, start=0, optimizer=None, scaler=None):
    dtype = pr.adapter_of(model).layers[0].A.dtype
    optimizer = optimizer or pr.optimizer(model, lr, weight_decay=0.01)
    attachment = pr.attach(optimizer, model, accumulation=micro, scaler=scaler)
    model.train()
    for n in range(start, start + steps):
        for part in range(micro):
            loss = loss_of(model, n, slice(part, None, micro), dtype)
            (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(optimizer)
        attachment.before_clip()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        optimizer.zero_grad()
    attachment.detach()
    return optimizer


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def group_of(optimizer):
    return next(g for g in optimizer.param_groups if g.get("update") == "altlora")


def test_factors_alternate_and_a_head_trains_by_adamw_at_its_own_rate():
    model = adapted(factor_lr=4.0)
    optimizer = pr.optimizer(model, 0.05)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.05, 0.05]
    moved = []
    for n in range(3):
        before = weights(model)
        train(model, 1, optimizer=optimizer, start=n)
        after = weights(model)
        moved.append({n for n in after if not torch.equal(after[n], before[n])})
    heads = {n for n in before if "last" in n}
    factors = [{n for n in before if f"polyrank_{side}" in n} for side in "AB"]
    assert len(heads) == len(factors[0]) == len(factors[1]) == 2
    assert moved == [heads | factors[1], heads | factors[0], heads | factors[1]]
    assert {"exp_avg"} <= set(optimizer.state[dict(model.named_parameters())[min(heads)]])


@pytest.mark.parametrize("plus", [False, True])
def test_altlora_10_goes_on_to_the_same_bits_phase_included(plus):
    options = {"plus": plus, "balance_every": 2}
    whole, cut, again = (adapted(dtype=torch.float32, **options) for _ in range(3))
    train(whole, 5)
    first = train(cut, 2)
    kept = json.loads(json.dumps(optimizer_state(first)["groups"]))
    state = copy.deepcopy(optimizer_state(first)["state"])
    again.load_state_dict(cut.state_dict())
    second = pr.optimizer(again, 0.05, weight_decay=0.01)
    restore_optimizer(second, {"state": state, "groups": kept})
    assert group_of(second)["step"] == 2
    with pytest.raises(AssertionError):
        same(weights(whole), weights(again))
    train(again, 3, start=2, optimizer=second)
    same(weights(whole), weights(again))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"first": "A"}, "first='B'"),
        ({"switch_every": 3}, "snapshots=False"),
        ({"plus": True}, "plus=False"),
        ({"joint": True}, "joint=False"),
    ],
)
def test_a_checkpoint_of_another_order_of_factors_is_refused(options, word):
    first = train(adapted(first="B"), 2)
    other = pr.optimizer(adapted(**options), 0.05)
    with pytest.raises(CheckpointError, match=f"written with {word} of the update 'altlora'"):
        other.load_state_dict(first.state_dict())


def test_a_scheduler_is_followed():
    model = adapted(head=False)
    optimizer = pr.optimizer(model, 0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 1))
    before = weights(model)
    for n in range(2):
        train(model, 1, start=n, optimizer=optimizer)
        schedule.step()
        same(before, weights(model))
    train(model, 1, start=2, optimizer=optimizer)
    assert any(not torch.equal(before[n], p) for n, p in weights(model).items())


def test_clipping_does_not_see_the_factor_that_stands_still():
    model = adapted(head=False)
    train(model, 3)
    optimizer = pr.optimizer(model, 0.05)
    attachment = pr.attach(optimizer, model)
    model.train()
    loss_of(model, 0).backward()
    views = pr.adapter_of(model).layers
    assert all(view.A.grad.any() and view.B.grad.any() for view in views)
    expected = nn.utils.get_total_norm([view.B.grad for view in views])
    assert attachment.before_clip()
    assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1e9), expected)
    assert all(view.A.grad is None for view in views)
    attachment.detach()
    joint = adapted(head=False, joint=True)
    attachment = pr.attach(pr.optimizer(joint, 0.05), joint)
    joint.train()
    loss_of(joint, 0).backward()
    attachment.before_clip()
    assert all(view.A.grad is not None for view in pr.adapter_of(joint).layers)
    attachment.detach()


def test_micro_batches_and_a_loss_scaler_change_nothing():
    ends = []
    for micro, scaled in ((1, False), (4, False), (1, True)):
        model = adapted(plus=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
        train(model, 4, micro=micro, clip=0.5, scaler=scaler)
        ends.append(weights(model))
    for found in ends[1:]:
        for name, value in ends[0].items():
            assert_close(found[name], value, tol=1e-9, reason="sums in another order, four steps")


def test_a_step_that_a_scaler_skips_leaves_momentum_and_turn_alone():
    model = adapted(dtype=torch.float32)
    optimizer = train(model, 2)
    kept = copy.deepcopy(optimizer.state_dict())
    before = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    attachment = pr.attach(optimizer, model, scaler=scaler)
    model.train()
    scaler.scale(loss_of(model, 0, dtype=torch.float32) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    attachment.detach()
    same(before, weights(model))
    now = optimizer.state_dict()
    assert kept["param_groups"] == now["param_groups"]
    assert kept["state"].keys() == now["state"].keys()
    assert any("momentum" in state for state in kept["state"].values())
    for key, state in kept["state"].items():
        same({n: torch.as_tensor(v) for n, v in state.items()}, now["state"][key])


@pytest.mark.parametrize("first", ["A", "B"])
def test_with_a_constant_gate_the_gradient_is_projected_through_it(first, monkeypatch):
    method = type(pr.method("altlora"))
    monkeypatch.setattr(method, "core", lambda self, site: StaticGate(site.r))
    model = adapted(alpha=6.0, first=first, beta1=0.0, damping=0.0, head=False)
    views = pr.adapter_of(model).layers
    with torch.no_grad():
        for view in views:
            view.B.copy_(draw(WIDTH, 3, key=5))
    model.train()
    loss_of(model, 0).backward()
    old = [(v.A.detach().clone(), v.B.detach() * v.core.gate.detach()) for v in views]
    grads = [(v.A.grad.clone(), v.B.grad.clone(), v.core.gate.detach().clone()) for v in views]
    model.zero_grad()
    optimizer = pr.optimizer(model, 1.0)
    assert group_of(optimizer)["snapshots"]
    with pytest.raises(RunError, match="nobody told the gate"):
        optimizer.step()
    train(model, 1, optimizer=optimizer)
    for view, (A, B), (gA, gB, gate) in zip(views, old, grads, strict=True):
        s = view.scale
        if first == "A":
            moved = s * B @ (A - view.A.detach())
            expected = B @ torch.linalg.pinv(B.T @ B) @ gA / s
        else:
            F = gate[:, None] * A
            moved = s * (B / gate - view.B.detach()) @ F
            expected = gB @ torch.linalg.pinv(F @ F.T) @ F / s
        assert_close(moved, expected, tol=1e-9, reason="differences of larger numbers")


def test_every_task_begins_with_a_fresh_momentum_and_turn(monkeypatch):
    moved, real = [], Alternating._move

    def watched(self, group, side):
        known = [self.state[group["params"][pair[side]]] for pair in group["pairs"]]
        moved.append((group["step"], side, any("momentum" in state for state in known)))
        real(self, group, side)

    monkeypatch.setattr(Alternating, "_move", watched)
    engine.run(
        tiny_vit(), few_digits(rows=24, tasks=2), pr.method("altlora", r=2), references=[],
        train={"epochs": 1, "batch_size": 8, "lr": 1e-2}, progress=False, out="run",
    )  # fmt: skip
    assert moved == 2 * [(0, "B", False), (1, "A", False), (2, "B", True)]


def ranked(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = adapted()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = pr.optimizer(model, 0.05, weight_decay=0.01)
    attachment = pr.attach(optimizer, model)
    model.train()
    for n in range(4):
        # Each rank divides by its own rows, and the mean over ranks divides again.
        (2 * loss_of(wrapped, n, slice(rank, None, 2))).backward()
        attachment.before_clip()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    found = {name: value.tolist() for name, value in weights(model).items()}
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=ranked, args=(rank, tmp_path)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    model = adapted()
    train(model, 4, clip=0.5)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for name, value in weights(model).items():
        found = torch.tensor(first[name], dtype=torch.float64)
        assert_close(found, value, tol=1e-9, reason="sums in another order, four steps")


def test_lent_to_plain_lora_it_is_altlora():
    ours, theirs = adapted(), adapted("lora", optim_by="altlora")
    train(ours, 4)
    train(theirs, 4)
    same(weights(ours), weights(theirs))


def test_where_a_rule_writes_factors_the_last_subspace_is_kept_whole():
    written = adapted("allora", apply_to="update", optim_by="altlora")
    kept = [group_of(pr.optimizer(m, 0.1))["snapshots"] for m in (written, adapted())]
    assert kept == [True, False]
    optimizer = train(written, 3)
    old = [
        (view.B.detach().clone(), {k: v.clone() for k, v in optimizer.state[view.A].items()})
        for view in pr.adapter_of(written).layers
    ]
    twin = copy.deepcopy(written).train()
    loss_of(twin, 3).backward()
    grads = [view.A.grad for view in pr.adapter_of(twin).layers]
    train(written, 1, start=3, optimizer=optimizer)
    for view, (B, state), grad in zip(pr.adapter_of(written).layers, old, grads, strict=True):
        # B has moved since, and was written once more behind its step.
        assert not torch.equal(state["anchor"], B)
        K = torch.linalg.inv(B.T @ B + 1e-6 * torch.eye(3))
        carried = 0.9 * K @ B.T @ state["anchor"] @ state["momentum"]
        expected = carried + 0.1 * K @ grad / view.scale**2
        found = optimizer.state[view.A]["momentum"]
        assert_close(found, expected, tol=1e-8, reason="an inverse in place of a factorisation")


def test_lent_to_gated_methods_it_moves_factors_and_leaves_gates_as_they_are():
    model = adapted("sora", optim_by="altlora:plus=true", xi=0.0, gate_lr=0.5, head=False)
    optimizer = pr.optimizer(model, 0.05)
    assert [g["update"] for g in optimizer.param_groups] == ["altlora", "adam-gate"]
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.025]
    before = weights(model)
    train(model, 2, optimizer=optimizer)
    assert all(not torch.equal(before[n], p) for n, p in weights(model).items())
    assert "anchor" in optimizer.state[pr.adapter_of(model).layers[0].A]


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("smora", {"r": 4, "k": 2, "scaling": "alpha/r"}, "and smora has RankGate"),
        ("lora", {"lr_ratio": 16.0}, "lora has its own optimiser"),
        ("allora", {}, "'idle' expects an untouched true_grad, but 'scaledgradient' changes it"),
        ("allora", {"form": "output"}, "and allora has ByOutput"),
    ],
)
def test_it_is_not_lent_where_its_mathematics_does_not_hold(method, options, reason):
    with pytest.raises(ConfigError, match=reason):
        pr.method(method, optim_by="altlora", **options)


def stock(dtype=torch.float64, **options):
    options = {"r": 3, "lora_alpha": 3, "target_modules": ["first", "second"], **options}
    model = peft.get_peft_model(net(dtype), peft.LoraConfig(**options)).to(dtype)
    with torch.no_grad():
        for key, (name, p) in enumerate(model.named_parameters()):
            if "lora_A" in name or "lora_B" in name:
                p.copy_(draw(*p.shape, key=key) * 0.3)
    return model


def run(model, optimizer, steps=1, dtype=torch.float64):
    found = []
    for n in range(steps):
        loss = loss_of(model, n % 2, dtype=dtype)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("plus", [False, True])
def test_pefts_own_lora_is_trained(plus):
    model = stock(torch.float32, modules_to_save=["last"], use_dora=plus)
    optimizer = pr.altlora_optimizer(model, 0.02, 0.01, plus=plus, damping=1e-4)
    count = len(group_of(optimizer)["pairs"])
    assert count == 2
    names = {id(p): n for n, p in model.named_parameters()}
    others = [names[id(p)] for g in optimizer.param_groups[1:] for p in g["params"]]
    assert len(others) == 4 if plus else 2
    assert all("last" in n or "magnitude" in n for n in others)
    losses = run(model, optimizer, 30, torch.float32)
    assert losses[-1] < 0.7 * losses[1]


def test_pefts_own_lora_takes_the_steps_of_ours():
    ours, theirs = adapted(head=False, alpha=3.0), stock()
    pairs_of = [
        (m.lora_A["default"].weight, m.lora_B["default"].weight)
        for m in theirs.modules()
        if isinstance(m, peft.tuners.lora.Linear)
    ]
    with torch.no_grad():
        for view, (A, B) in zip(pr.adapter_of(ours).layers, pairs_of, strict=True):
            view.A.copy_(A)
            view.B.copy_(B)
    train(ours, 4)
    optimizer = pr.altlora_optimizer(theirs, 0.05, 0.01)
    for n in range(4):
        loss_of(theirs, n).backward()
        optimizer.step()
        optimizer.zero_grad()
    for view, (A, B) in zip(pr.adapter_of(ours).layers, pairs_of, strict=True):
        assert_close(A, view.A.detach(), tol=1e-9, reason="two forms of one forward, four steps")
        assert_close(B, view.B.detach(), tol=1e-9, reason="two forms of one forward, four steps")


@pytest.mark.parametrize("alpha", [3, 6])
def test_altlora_8_without_momentum_a_takes_pefts_riemannian_step_over_s_squared(alpha):
    ours, theirs = stock(lora_alpha=alpha), stock(lora_alpha=alpha)
    start = {n: p.detach().clone() for n, p in ours.named_parameters()}
    run(ours, pr.altlora_optimizer(ours, 0.1, beta1=0.0, damping=1e-2, first="A"))
    run(theirs, create_riemannian_optimizer(theirs, torch.optim.SGD, lr=0.1, reg=1e-2))
    other = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if "lora_A" in name:
            step, riemannian = (start[name] - q.detach() for q in (p, other[name]))
            assert_close(step, riemannian / (alpha / 3) ** 2, tol=1e-9, reason="PEFT uses a pinv")


def test_embeddings_and_convolutions_of_peft_are_left_to_adamw():
    model = stock(target_modules=["first", "embed"])
    optimizer = pr.altlora_optimizer(model, 0.05)
    assert [pair["name"].split(".")[-1] for pair in group_of(optimizer)["pairs"]] == ["first"]
    assert sum(len(g["params"]) for g in optimizer.param_groups[1:]) == 2


def test_what_is_no_lora_of_peft_is_refused():
    with pytest.raises(ConfigError, match="holds no trained LoRA of PEFT"):
        pr.altlora_optimizer(adapted(), 0.1)
    with pytest.raises(ConfigError, match=r"unknown option 'dampin'.*did you mean 'damping'"):
        pr.altlora_optimizer(stock(), 0.1, dampin=1.0)


def test_cores_that_weigh_tokens_lone_factors_and_half_precision_are_refused():
    routed = pr.adapter_of(adapted("smora", r=4, k=2))
    with pytest.raises(ConfigError, match=r"altlora at first: the core RankGate may weigh ranks"):
        pairs.pair_group(routed, {})
    lone = adapted(head=False)
    for view in pr.adapter_of(lone).layers:
        view.B.requires_grad_(False)
    with pytest.raises(ConfigError, match="altlora at second: A trains alone"):
        pr.optimizer(lone, 0.1)
    with pytest.raises(ConfigError, match=r"got torch.bfloat16, expected factors in float32"):
        pr.optimizer(adapted(dtype=torch.bfloat16), 0.1)


def test_a_factor_without_gradient_is_an_error_and_moves_nothing():
    model = adapted(head=False)
    optimizer = pr.optimizer(model, 0.1)
    loss_of(model, 0).backward()
    pr.adapter_of(model).layers[1].B.grad = None
    before = weights(model)
    with pytest.raises(RunError, match="altlora at second: B is to move and has no gradient"):
        optimizer.step()
    same(before, weights(model))


def test_a_singular_gram_matrix_is_an_error_that_tells_its_condition():
    model = adapted(head=False, damping=0.0, first="A")
    optimizer = pr.optimizer(model, 0.1)
    before = weights(model)
    loss_of(model, 0).backward()
    with pytest.raises(RunError, match="Gram matrix of B has condition number inf and cannot"):
        optimizer.step()
    same(before, weights(model))
    (view, _) = pr.adapter_of(model).layers
    with torch.no_grad():
        view.B.copy_(draw(WIDTH, 3) @ torch.diag(torch.tensor([1.0, 1.0, 1e-9]).double()))
    with pytest.raises(RunError, match=r"altlora at (first|second): .* condition number"):
        optimizer.step()


def test_a_gradient_that_is_not_finite_is_an_error_that_names_the_layer():
    model = adapted(head=False)
    optimizer = pr.optimizer(model, 0.1)
    loss_of(model, 0).backward()
    pr.adapter_of(model).layers[1].B.grad[0, 0] = torch.nan
    before = weights(model)
    with pytest.raises(RunError, match="altlora at second: the gradient of B or the other factor"):
        optimizer.step()
    same(before, weights(model))


def test_an_optimiser_that_does_not_alternate_is_refused():
    model = adapted()
    with pytest.raises(ConfigError, match=r"asks for the updates \['altlora'\]"):
        pr.attach(torch.optim.AdamW(pr.parameter_groups(model, 0.1)), model)
