"""pr.attach in one's own loop: when rules run, what a loss scaler changes, what is refused."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

import polyrank as pr
from polyrank.frame import PenaltyRule, inject
from polyrank.parts.cores import RankGate
from polyrank.testing import assert_close

FUSED = pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])


def adamw(model, lr=1e-2, **options):
    return torch.optim.AdamW(pr.parameter_groups(model, lr), **options)


def update(tools, model, optimizer, rows, scaler=None):
    """One update of one micro-batch; returns the loss."""
    batch = tools.stack(rows)
    loss = model(**batch).loss
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("called", [True, False], ids=["before_clip", "hook"])
def test_begin_grads_after_in_order_once_per_update(tools, called, accumulation):
    one, two = tools.Recorder("a"), tools.Recorder("b")
    one.order = two.order + 1
    told = []
    for rule in (one, two):
        rule.calls = told
    model = tools.adapted("smora")
    optimizer = adamw(model)
    attachment = pr.attach(
        optimizer, model, strategies=[tools.toy(one, two)], accumulation=accumulation
    )
    model.train()
    for index in range(2):
        for micro in range(accumulation):
            tools.step(model, [tools.stack(tools.rows(2, seed=10 * index + micro))])
        if called:
            assert attachment.before_clip()
            assert attachment.before_clip()
        optimizer.step()
        optimizer.zero_grad()
        assert attachment.index == index + 1
    attachment.detach()
    per_update = [(what, i) for i in range(2) for what in ("begin", "grads", "after")]
    assert told == [call for call in per_update for _ in range(2)]


@pytest.fixture
def fresh_accelerate():
    """Its settings live as long as the process, and other tests' trainers have made theirs."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


def test_a_loop_on_accelerate_equals_a_plain_one(tools, fresh_accelerate):
    rows = tools.rows(8)
    plain, theirs = tools.adapted("smora"), tools.adapted("smora")
    losses, _ = tools.loop(plain, rows, accumulation=2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(theirs, adamw(theirs, fused=True))
    rule = tools.Recorder()
    attachment = pr.attach(optimizer, model, strategies=[tools.toy(rule)], accumulation=2)
    model.train()
    batches = tools.chunks(rows, 2)
    counts = [
        sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches[i : i + 2]) for i in (0, 2)
    ]
    found = []
    for index, batch in enumerate(batches):
        with accelerator.accumulate(model):
            loss = model(**batch, num_items_in_batch=torch.tensor(counts[index // 2])).loss
            # accelerate divides by the micro-batches, which the count of tokens did already.
            accelerator.backward(loss * 2)
            optimizer.step()
            optimizer.zero_grad()
        found.append(float(loss.detach()))
    attachment.detach()
    assert_close([found[0] + found[1], found[2] + found[3]], losses, dtype=torch.float32)
    assert rule.calls == [(what, i) for i in range(2) for what in ("begin", "grads", "after")]
    for key, value in tools.trained(theirs).items():
        assert torch.equal(value, tools.trained(plain)[key]), key


def test_rules_are_released_once_when_they_are_detached(tools):
    class Leaving(tools.Recorder):
        def release(self):
            self.calls.append("release")

    rule, model = Leaving(), tools.adapted("smora")
    attachment = pr.attach(adamw(model), model, strategies=[tools.toy(rule)])
    assert rule.calls == []
    attachment.detach()
    attachment.detach()
    assert rule.calls == ["release"]


def test_nothing_runs_in_evaluation_nor_after_detach(tools):
    rule = tools.Recorder()
    model = tools.adapted("smora")
    optimizer = adamw(model)
    attachment = pr.attach(optimizer, model, strategies=[tools.toy(rule)])
    batch = tools.stack(tools.rows(2))
    model.eval()
    model(**batch)
    model.train()
    with torch.no_grad():
        model(**batch)
    assert rule.calls == []
    assert all(layer.core.counts is None for layer in pr.adapter_of(model).layers)
    update(tools, model, optimizer, tools.rows(2))
    assert [what for what, _ in rule.calls] == ["begin", "grads", "after"]
    attachment.detach()
    attachment.detach()
    optimizer.step()
    assert len(rule.calls) == 3
    assert not optimizer._optimizer_step_pre_hooks


def test_a_rule_that_trains_on_other_data_begins_no_update(tools):
    class Memory(tools.Recorder):
        def grads(self, step):
            super().grads(step)
            loss = model(**tools.stack(tools.rows(2, seed=5))).loss
            torch.autograd.grad(loss, self.adapter.trained(), allow_unused=True)

    rule = Memory()
    model = tools.adapted("smora")
    optimizer = adamw(model)
    pr.attach(optimizer, model, strategies=[tools.toy(rule)])
    model.train()
    for _ in range(2):
        update(tools, model, optimizer, tools.rows(2))
    assert rule.calls == [(what, i) for i in range(2) for what in ("begin", "grads", "after")]


def test_penalty_adds_its_gradient_once_and_before_other_rules(tools):
    weight = 0.5
    norms = []
    for penalties in ((), (tools.SumOfB(weight),)):
        rule = tools.Recorder()
        model = tools.adapted("lora")
        optimizer = adamw(model)
        attachment = pr.attach(
            optimizer, model, strategies=[tools.toy(rule, penalties=penalties)], accumulation=3
        )
        model.train()
        tools.step(model, tools.chunks(tools.rows(6), 2))
        attachment.before_clip()
        norms.append([layer.B.grad.clone() for layer in pr.adapter_of(model).layers])
        optimizer.step()
    for bare, held in zip(*norms, strict=True):
        assert_close(held - bare, torch.full_like(bare, weight))
    found = next(r for r in attachment.rules if isinstance(r, PenaltyRule))
    assert attachment.rules.index(found) < attachment.rules.index(rule)


@FUSED
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscale_"])
def test_a_step_that_the_scaler_skips_is_no_update(tools, fused, unscaled):
    rule = tools.Recorder()
    model = tools.adapted("smora")
    optimizer = adamw(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    attachment = pr.attach(optimizer, model, strategies=[tools.toy(rule)], scaler=scaler)
    model.train()
    batch = tools.stack(tools.rows(2))
    for index, broken in enumerate((False, True, False)):
        before = tools.trained(model)
        scaler.scale(model(**batch).loss).backward()
        if broken:
            pr.adapter_of(model).layers[0].B.grad[0, 0] = torch.inf
        if unscaled:
            scaler.unscale_(optimizer)
            attachment.before_clip()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert attachment.index == (1, 1, 2)[index]
        moved = any(not torch.equal(v, before[k]) for k, v in tools.trained(model).items())
        assert moved is not broken
    attachment.detach()
    after = [i for what, i in rule.calls if what == "after"]
    assert after == [0, 1]
    # A skip that nobody told of, as the gradients were not seen, is no second beginning.
    told = [] if not fused and not unscaled else [("begin", 1)]
    assert rule.calls == [
        *[("begin", 0), ("grads", 0), ("after", 0)],
        *[("begin", 1), *([("grads", 1)] if unscaled else [])],
        *[*told, ("grads", 1), ("after", 1)],
    ]


@FUSED
def test_scaled_training_equals_unscaled(tools, fused):
    losses, norms = [], []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        rule = tools.Recorder()
        model = tools.adapted("smora")
        optimizer = adamw(model, fused=fused)
        attachment = pr.attach(
            optimizer,
            model,
            strategies=[tools.toy(rule, penalties=[tools.SumOfB(0.1)])],
            scaler=scaler,
        )
        model.train()
        rows = tools.rows(6)
        losses.append([update(tools, model, optimizer, rows[i : i + 2], scaler) for i in (0, 2, 4)])
        norms.append(rule.norms)
        attachment.detach()
    # A power of two scales without rounding.
    assert losses[0] == losses[1]
    assert norms[0] == norms[1]


@FUSED
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("scale", [None, 2.0**8])
def test_injected_losses_are_scaled_and_averaged_over_micro_batches(
    tools, monkeypatch, fused, scale, accumulation
):
    weight = 0.5

    def router_sum(core, h, z, flow):
        # Σ W_g per layer and micro-batch: its gradient is `weight` in every entry.
        return inject(h * 0.0, weight * core.router.weight.sum(), flow)

    monkeypatch.setattr(RankGate, "epilogue", "python")
    monkeypatch.setattr(RankGate, "forward", router_sum)
    model = tools.adapted("smora")
    optimizer = adamw(model, fused=fused)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    seen = []

    class Look(tools.Recorder):
        def grads(self, step):
            seen.extend(layer.core.router.weight.grad.clone() for layer in self.adapter.layers)

    attachment = pr.attach(
        optimizer,
        model,
        strategies=[tools.toy(Look())],
        scaler=scaler,
        accumulation=accumulation,
    )
    model.train()
    for batch in tools.chunks(tools.rows(accumulation), 1):
        loss = model(**batch).loss / accumulation
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
    attachment.detach()
    assert len(seen) == len(pr.adapter_of(model).layers)
    for grad in seen:
        assert_close(grad, torch.full_like(grad, weight))


def test_attaching_twice_is_refused_until_detached(tools):
    model = tools.adapted("smora")
    attachment = pr.attach(adamw(model), model)
    with pytest.raises(pr.ConfigError, match=r"attached already; call detach\(\)"):
        pr.attach(adamw(model), model)
    attachment.detach()
    pr.attach(adamw(model), model).detach()


def test_an_optimiser_without_some_tensor_is_refused(tools):
    model = tools.adapted("smora")
    routers = {id(layer.core.router.weight) for layer in pr.adapter_of(model).layers}
    optimizer = torch.optim.AdamW(p for p in model.parameters() if id(p) not in routers)
    with pytest.raises(pr.ConfigError, match=r"misses 14 trainable tensors.*parameter_groups"):
        pr.attach(optimizer, model)


@pytest.mark.parametrize("warm", [False, True], ids=["constant", "warm-up"])
def test_lora_plus_without_its_rates_is_refused(tools, warm):
    model = tools.adapted("lora", lr_ratio=16.0)

    def scheduled(optimizer):
        if warm:
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
        return optimizer

    wrong = scheduled(torch.optim.AdamW(model.parameters(), lr=1e-2))
    with pytest.raises(pr.ConfigError, match="different rates"):
        pr.attach(wrong, model)
    pr.attach(scheduled(adamw(model)), model).detach()


def test_decay_of_a_gate_is_refused(tools, monkeypatch):
    monkeypatch.setattr(RankGate, "gates", frozenset({"router.weight"}))
    model = tools.adapted("smora")
    with pytest.raises(pr.ConfigError, match="decays gates"):
        pr.attach(torch.optim.AdamW(model.parameters(), weight_decay=0.1), model)
    groups = pr.parameter_groups(model, 1e-2, weight_decay=0.1)
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.1]
    pr.attach(torch.optim.AdamW(groups), model).detach()


def test_an_update_that_the_optimiser_does_not_serve_is_refused(tools, monkeypatch):
    model = tools.adapted("lora")
    method = type(pr.adapter_of(model).method)
    given = method.groups

    def replaced(self, adapter, args=None):
        found = given(self, adapter, args)
        return [type(g)(params=g.params, update="strange") for g in found]

    monkeypatch.setattr(method, "groups", replaced)
    with pytest.raises(pr.ConfigError, match=r"asks for the updates \['strange'\]"):
        pr.attach(adamw(model), model)


def test_a_model_without_adapter_is_refused(tools):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(pr.ConfigError, match=r"polyrank\.adapt"):
        pr.attach(torch.optim.SGD(model.parameters()), model)


@FUSED
@pytest.mark.parametrize(
    ("name", "options"), [("smora", {}), ("lora", {"lr_ratio": 16.0})], ids=["smora", "lora+"]
)
def test_an_unattached_loop_stops_at_the_second_update(tools, name, options, fused):
    model = tools.adapted(name, **options)
    optimizer = adamw(model, fused=fused)
    model.train()
    for _ in range(3):
        tools.step(model, tools.chunks(tools.rows(4), 2))
    optimizer.step()
    with pytest.raises(pr.InertError, match=r"polyrank\.attach\(optimizer, model\)"):
        tools.step(model, [tools.stack(tools.rows(2))])


def test_accumulation_and_evaluation_raise_nothing_without_attachment(tools):
    model = tools.adapted("smora")
    optimizer = adamw(model)
    model.train()
    tools.step(model, tools.chunks(tools.rows(8), 2))
    optimizer.step()
    model.eval()
    with torch.no_grad():
        model(**tools.stack(tools.rows(2)))
    model(**tools.stack(tools.rows(2))).loss.backward()


def test_plain_lora_needs_no_attachment(tools):
    model = tools.adapted("lora")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    losses = [update(tools, model, optimizer, tools.rows(4)) for _ in range(3)]
    assert losses[2] < losses[0]


def test_an_optimiser_other_than_the_attached_one_is_noticed(tools):
    model = tools.adapted("smora")
    pr.attach(adamw(model), model)
    other = adamw(model)
    model.train()
    for _ in range(2):
        update(tools, model, other, tools.rows(2))
    with pytest.raises(pr.InertError, match="with the one that trains"):
        update(tools, model, other, tools.rows(2))


def test_weights_loaded_between_updates_are_no_alarm(tools):
    model = tools.adapted("smora")
    optimizer = adamw(model)
    attachment = pr.attach(optimizer, model)
    model.train()
    saved = tools.trained(model)
    for _ in range(3):
        update(tools, model, optimizer, tools.rows(2))
        tools.step(model, [tools.stack(tools.rows(2))])
        model.load_state_dict(saved, strict=False)
    assert attachment.index == 3


def test_state_survives_a_folder(tools, tmp_path):
    rule = tools.Recorder()
    model = tools.adapted("smora")
    optimizer = adamw(model)
    attachment = pr.attach(optimizer, model, strategies=[tools.toy(rule)])
    model.train()
    for _ in range(2):
        update(tools, model, optimizer, tools.rows(2))
    attachment.save(tmp_path)
    attachment.detach()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "polyrank_rules.json",
        "polyrank_rules.safetensors",
    ]
    fresh = tools.Recorder()
    attachment = pr.attach(adamw(model), model, strategies=[tools.toy(fresh)])
    attachment.load(tmp_path)
    assert (attachment.index, attachment.peak) == (2, 1e-2)
    assert fresh.restored["calls"] == 6
    assert torch.equal(fresh.restored["norms"], torch.tensor(rule.norms))
