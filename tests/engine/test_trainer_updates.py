"""Methods with an update of their own inside pr.Trainer: as in a plain loop, and resumed."""

import pytest
import torch

import polyrank as pr

METHODS = {
    "altlora": ("altlora", {"clip": 0.5}),
    "altlora-plus": ("altlora", {"plus": True, "switch_every": 2}),
    "allora": ("allora", {}),
    "allora-update": ("allora", {"apply_to": "update"}),
}


def looped(tools, model, rows, accumulation):
    optimizer = pr.optimizer(model, 1e-2, 0.1, fused=True)
    attachment = pr.attach(optimizer, model, accumulation=accumulation, seed=7)
    model.train()
    losses, batches = [], tools.chunks(rows, 2)
    for i in range(0, len(batches), accumulation):
        losses.append(tools.step(model, batches[i : i + accumulation]))
        attachment.before_clip()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    attachment.detach()
    return losses


def trainer_of(tools, model, rows, folder, **options):
    arguments = tools.arguments(folder, seed=7, weight_decay=0.1, max_grad_norm=0.5, **options)
    return pr.Trainer(model, arguments, train_dataset=rows)


def same(one, two):
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.parametrize("method", METHODS)
def test_equals_a_plain_loop_bit_for_bit(tools, tmp_path, method):
    name, options = METHODS[method]
    rows = tools.rows(8)
    one, two = tools.adapted(name, **options), tools.adapted(name, **options)
    losses = looped(tools, one, rows, 2)
    trainer = trainer_of(tools, two, rows, tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    assert tools.losses(trainer) == losses
    same(tools.trained(one), tools.trained(two))
    assert all(layer.row_scale is None for layer in pr.adapter_of(two).layers)


@pytest.mark.parametrize("method", ["altlora", "altlora-plus"])
def test_resumed_equals_uninterrupted_bit_for_bit(tools, tmp_path, method):
    name, options = METHODS[method]
    rows, ends = tools.rows(8), []
    for resume in (None, str(tmp_path / "whole" / "checkpoint-3")):
        model = tools.adapted(name, **options)
        trainer = trainer_of(
            tools, model, rows, tmp_path / "whole",
            save_strategy="steps", save_steps=3, lr_scheduler_type="linear", num_train_epochs=2,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        ends.append(tools.trained(model))
    assert trainer.state.global_step == 8
    same(*ends)
