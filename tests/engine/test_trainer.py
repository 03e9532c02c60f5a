"""pr.Trainer against a plain loop: the same losses, weights and rules; checkpoints; refusals."""

import contextlib
import io
import re

import pytest
import torch
from transformers import Trainer as PlainTrainer
from transformers import TrainerCallback

import polyrank as pr
from polyrank.frame import Rule, Step
from polyrank.testing import assert_close

METHODS = {
    "lora": ("lora", {}),
    "lora+": ("lora", {"lr_ratio": 16.0}),
    "smora": ("smora", {}),
    "smora-dropout": ("smora", {"dropout": 0.2}),
}


def make(tools, model, rows, folder, *, strategies=(), kind=pr.Trainer, callbacks=None, **options):
    arguments = tools.arguments(folder, **options)
    evaluated = rows[:2] if options.get("eval_strategy") else None
    trainer = kind(
        model, arguments, train_dataset=rows, eval_dataset=evaluated, callbacks=callbacks
    )
    if strategies:
        trainer.strategies = tuple(strategies)
    return trainer


def same(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_equals_a_plain_loop_bit_for_bit(tools, tmp_path, method, accumulation):
    name, options = METHODS[method]
    rows = tools.rows(8)
    one, two = tools.adapted(name, **options), tools.adapted(name, **options)
    losses, _ = tools.loop(one, rows, accumulation=accumulation, decay=0.1, clip=0.5, seed=7)
    trainer = make(
        tools,
        two,
        rows,
        tmp_path,
        seed=7,
        gradient_accumulation_steps=accumulation,
        weight_decay=0.1,
        max_grad_norm=0.5,
    )
    trainer.train()
    assert tools.losses(trainer) == losses
    assert len(losses) == 4 // accumulation
    same(tools.trained(two), tools.trained(one))


def test_weight_decay_shrinks_factors_and_router_but_no_gate(tools):
    # A gate with a gradient of zero must stay where it is; a decayed one would shrink.
    model = tools.adapted("smora")
    groups = pr.parameter_groups(model, lr=0.1, weight_decay=0.5)
    before = tools.trained(model)
    optimizer = torch.optim.AdamW(groups)
    attachment = pr.attach(optimizer, model)
    for param in pr.adapter_of(model).trained():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    attachment.detach()
    for key, value in tools.trained(model).items():
        kept = 1.0 if "balance_bias" in key else 1 - 0.1 * 0.5
        assert_close(value, before[key] * kept)


@pytest.mark.parametrize("method", METHODS)
def test_optimiser_trainable_and_printed_tensors_are_one_set(tools, tmp_path, method):
    name, options = METHODS[method]
    model = tools.adapted(name, **options)
    trainer = make(tools, model, tools.rows(2), tmp_path)
    optimizer = trainer.create_optimizer()
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    assert len(held) == len(set(held))
    assert set(held) == set(wanted)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        model.print_trainable_parameters()
    printed = int(re.search(r"trainable params: ([\d,]+)", out.getvalue())[1].replace(",", ""))
    assert printed == sum(wanted.values())
    assert printed == sum(
        layer.method.parameters_per_site(layer.site) for layer in pr.adapter_of(model).layers
    )


def test_what_trains_beside_the_adapter_is_in_the_optimiser(tools):
    model = tools.adapted("smora")
    norm = model.base_model.model.model.norm.weight.requires_grad_(True)
    head = model.base_model.model.lm_head.weight.requires_grad_(True)
    groups = pr.parameter_groups(model, lr=0.1, weight_decay=0.5)
    place = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert place[id(norm)] == 0.0
    assert place[id(head)] == 0.5
    assert set(place) == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_rules_run_once_per_update_on_gradients_not_yet_clipped(
    tools, tmp_path, clip, accumulation
):
    rows = tools.rows(6)
    recorder, late = tools.Recorder(), tools.Recorder("z-late")
    model = tools.adapted("smora")
    trainer = make(
        tools,
        model,
        rows,
        tmp_path,
        strategies=[tools.toy(late, recorder)],
        max_grad_norm=clip,
        gradient_accumulation_steps=accumulation,
        seed=7,
    )
    trainer.task_index, trainer.phase_name = 2, "second"
    trainer.train()
    updates = 3 // accumulation
    wanted = [(what, i) for i in range(updates) for what in ("begin", "grads", "after")]
    assert recorder.calls == late.calls == wanted
    assert recorder.last == Step(
        index=updates - 1, total=updates, lr=1e-2, peak=1e-2, task=2, phase="second", seed=7
    )
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    # Older versions measure only what they clip.
    if clip or logged:
        assert_close(recorder.norms, [float(norm) for norm in logged], dtype=torch.float32)
    assert min(recorder.norms) > 1e-3, "nothing would have been clipped"


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_what_a_rule_makes_of_gradients_is_what_the_optimiser_sees(tools, tmp_path, clip):
    recorder = tools.Recorder()
    recorder.drops = True
    model = tools.adapted("smora", balance=0.0)
    before = tools.trained(model)
    make(
        tools,
        model,
        tools.rows(4),
        tmp_path,
        strategies=[tools.toy(recorder)],
        max_grad_norm=clip,
    ).train()
    assert min(recorder.norms) > 0
    same(tools.trained(model), before)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_penalty_counts_once_per_update(tools, tmp_path, accumulation):
    rows, weight = tools.rows(3), 0.25
    plain, held = tools.Recorder(), tools.SumOfB(weight)
    sums = []

    class Sum(tools.Recorder):
        def grads(self, step):
            sums.append(sum(float(layer.B.grad.sum()) for layer in self.adapter.layers))

    count = 0
    for penalties in ([], [held]):
        model = tools.adapted("smora")
        count = sum(layer.B.numel() for layer in pr.adapter_of(model).layers)
        trainer = make(
            tools,
            model,
            rows,
            tmp_path,
            strategies=[tools.toy(plain, Sum("sum"), penalties=penalties)],
            per_device_train_batch_size=3 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
    assert held.times == 1
    assert_close(
        sums[1] - sums[0], weight * count, tol=1e-4, reason="difference of two sums of fp32 numbers"
    )


def test_plain_trainer_of_a_method_with_rules_stops(tools, tmp_path):
    trainer = make(tools, tools.adapted("smora"), tools.rows(8), tmp_path, kind=PlainTrainer)
    with pytest.raises(pr.InertError, match=r"polyrank\.TrainerMixin"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("smora", {"balance": 0.0}),
        ("smora", {"balance_every": "micro_batch"}),
    ],
    ids=["lora", "unbalanced", "per-forward"],
)
def test_plain_trainer_of_a_method_without_rules_works(tools, tmp_path, method, options):
    one, two = (tools.adapted(method, **options) for _ in range(2))
    rows = tools.rows(6)
    plain = make(tools, one, rows, tmp_path, kind=PlainTrainer)
    plain.train()
    ours = make(tools, two, rows, tmp_path)
    ours.train()
    assert tools.losses(plain) == tools.losses(ours)


def test_attach_automatically_serves_a_plain_trainer_and_the_next_one(tools, tmp_path):
    one, two = tools.adapted("smora"), tools.adapted("smora")
    rows = tools.rows(8)
    handle = pr.attach_automatically()
    try:
        for _ in range(2):
            make(
                tools, one, rows, tmp_path, kind=PlainTrainer, gradient_accumulation_steps=2
            ).train()
    finally:
        handle.remove()
    for _ in range(2):
        make(tools, two, rows, tmp_path, gradient_accumulation_steps=2).train()
    assert tools.biases(one).abs().sum() > 0
    same(tools.trained(one), tools.trained(two))
    with pytest.raises(pr.InertError):
        make(tools, one, rows, tmp_path, kind=PlainTrainer).train()


@pytest.mark.parametrize("moment", ["begin", "grads"])
def test_attach_automatically_refuses_rules_that_come_too_late(
    tools, tmp_path, monkeypatch, moment
):
    class Early(tools.Recorder):
        pass

    for other in {"begin", "grads"} - {moment}:
        setattr(Early, other, getattr(Rule, other))
    model = tools.adapted("smora")
    monkeypatch.setattr(type(pr.adapter_of(model).method), "rules", lambda self: [Early()])
    handle = pr.attach_automatically()
    try:
        with pytest.raises(pr.InertError, match="cannot join"):
            make(tools, model, tools.rows(2), tmp_path, kind=PlainTrainer).train()
    finally:
        handle.remove()


def test_own_optimiser_with_wrong_groups_is_refused(tools, tmp_path):
    model = tools.adapted("lora", lr_ratio=16.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = pr.Trainer(
        model,
        tools.arguments(tmp_path),
        train_dataset=tools.rows(2),
        optimizers=(optimizer, None),
    )
    with pytest.raises(pr.ConfigError, match="different rates"):
        trainer.train()


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "rmsprop"])
def test_every_optimiser_gets_the_groups_of_the_method(tools, tmp_path, optim):
    model, rows = tools.adapted("lora", lr_ratio=16.0), tools.rows(4)
    trainer = make(
        tools, model, rows, tmp_path, optim=optim, learning_rate=1e-3, lr_scheduler_type="linear"
    )
    optimizer = trainer.create_optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 16e-3]
    before = tools.trained(model)
    trainer.train()
    assert trainer.attachment.index == 2
    moved = [
        key for key, value in tools.trained(model).items() if not torch.equal(value, before[key])
    ]
    assert len(moved) == len(before)


def test_one_process_with_two_devices_is_refused(tools, tmp_path):
    arguments = tools.arguments(tmp_path)
    arguments._n_gpu = 2
    with pytest.raises(pr.ConfigError, match="torchrun"):
        pr.Trainer(tools.adapted("lora"), arguments, train_dataset=tools.rows(2))


def test_sharded_weights_are_refused_for_methods_with_rules_only(tools, tmp_path, monkeypatch):
    monkeypatch.setattr(pr.TrainerMixin, "_kind", lambda self: "DEEPSPEED")
    with pytest.raises(pr.ConfigError, match=r"DEEPSPEED hides or shards.*use DDP"):
        make(tools, tools.adapted("smora"), tools.rows(2), tmp_path)
    trainer = make(tools, tools.adapted("lora"), tools.rows(2), tmp_path)
    trainer.create_optimizer()
    assert trainer.attachment is None


class Crash(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("power cut")


def test_training_that_broke_off_leaves_the_model_free(tools, tmp_path):
    model, rows = tools.adapted("smora"), tools.rows(4)
    with pytest.raises(RuntimeError, match="power cut"):
        make(tools, model, rows, tmp_path, callbacks=[Crash()]).train()
    trainer = make(tools, model, rows, tmp_path)
    trainer.train()
    assert trainer.attachment.index == 2


class Stop(TrainerCallback):
    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.after


@pytest.mark.parametrize(
    ("method", "accumulation"), [("smora", 1), ("smora-dropout", 2), ("lora+", 1)]
)
def test_resumed_equals_uninterrupted_bit_for_bit(tools, tmp_path, method, accumulation):
    name, options = METHODS[method]
    rows, weight = tools.rows(8), 0.01
    shared = {
        "train_sampling_strategy": "random",
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "linear",
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_grad_norm": 1.0,
    }

    def one(folder, resume=None, callbacks=None):
        model, recorder = tools.adapted(name, **options), tools.Recorder()
        trainer = make(
            tools,
            model,
            rows,
            folder,
            strategies=[tools.toy(recorder, penalties=[tools.SumOfB(weight)])],
            callbacks=callbacks,
            **shared,
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer, recorder

    whole, _, _ = one(tmp_path / "whole")
    one(tmp_path / "cut", callbacks=[Stop(2)])
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert (checkpoint / "polyrank_rules.json").is_file()
    resumed, trainer, recorder = one(tmp_path / "cut", resume=str(checkpoint))
    same(tools.trained(resumed), tools.trained(whole))
    assert trainer.attachment.index == trainer.state.global_step == 8 // accumulation
    assert recorder.restored["calls"] == 6
    assert len(recorder.restored["norms"]) == 2
    assert recorder.calls[0] == ("begin", 2)


def test_a_checkpoint_of_other_rules_is_refused(tools, tmp_path):
    rows = tools.rows(4)
    shared = {"save_strategy": "steps", "save_steps": 1}
    make(tools, tools.adapted("smora"), rows, tmp_path, **shared).train()
    strange = make(
        tools,
        tools.adapted("smora"),
        rows,
        tmp_path,
        strategies=[tools.toy(tools.Recorder())],
        **shared,
    )
    with pytest.raises(ValueError, match="the checkpoint holds") as caught:
        strange.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert isinstance(caught.value, pr.CheckpointError)
    (tmp_path / "checkpoint-1" / "polyrank_rules.json").unlink()
    with pytest.raises(pr.CheckpointError, match="without polyrank"):
        make(tools, tools.adapted("smora"), rows, tmp_path, **shared).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


class Watch(TrainerCallback):
    """Remembers the adapter after each evaluation."""

    def __init__(self, tools, model):
        self.tools, self.model, self.seen = tools, model, []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.seen.append((metrics["eval_loss"], self.tools.trained(self.model)))


def test_the_best_model_is_loaded_at_the_end(tools, tmp_path):
    model = tools.adapted("smora")
    watch = Watch(tools, model)
    trainer = make(
        tools,
        model,
        tools.rows(8),
        tmp_path,
        callbacks=[watch],
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = [loss for loss, _ in watch.seen]
    best = losses.index(min(losses))
    assert len(losses) == 4
    assert best < 3, "the last one is the best, and loading would change nothing"
    same(tools.trained(model), watch.seen[best][1])
    model.train()
    for _ in range(2):
        tools.step(model, [tools.stack(tools.rows(2))])


def test_evaluation_inside_an_update_changes_nothing(tools, tmp_path):
    rows = tools.rows(8)
    one, two = (tools.adapted("smora", dropout=0.2) for _ in range(2))
    make(tools, one, rows, tmp_path).train()
    make(tools, two, rows, tmp_path, eval_strategy="steps", eval_steps=1).train()
    same(tools.trained(one), tools.trained(two))
