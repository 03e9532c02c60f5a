"""Conditions and injected losses on their way from a batch through a trainer to the cores."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer as PlainTrainer

import polyrank as pr
from polyrank.layers import hook_of
from polyrank.testing import assert_close

TASK = {"router": "task", "tasks": 3, "r": 8, "experts": 4, "scaling": "alpha/r"}
AUX = {"router": "topk", "r": 8, "experts": 4, "k": 2}


def tasked(tools, count):
    return [{**row, "task": torch.tensor(i % 3)} for i, row in enumerate(tools.rows(count))]


def conditioned_loop(tools, model, rows, accumulation=1):
    """The plain loop, with each batch's task as the condition of its forward."""
    renamed = [
        {("polyrank_condition" if key == "task" else key): value for key, value in row.items()}
        for row in rows
    ]
    return tools.loop(model, renamed, accumulation=accumulation)[0]


@pytest.mark.parametrize(
    ("accumulation", "unused"), [(1, True), (2, False)], ids=["columns-removed", "columns-kept"]
)
def test_a_column_task_reaches_the_cores_and_not_the_model(tools, tmp_path, accumulation, unused):
    rows = tasked(tools, 8)
    one, two, same = (tools.adapted("moe-lora", **TASK) for _ in range(3))
    want = conditioned_loop(tools, one, rows, accumulation)
    data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows])
    arguments = tools.arguments(
        tmp_path,
        gradient_accumulation_steps=accumulation,
        remove_unused_columns=unused,
        eval_strategy="epoch",
    )
    trainer = pr.Trainer(two, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert tools.losses(trainer) == want
    for key, value in tools.trained(two).items():
        assert torch.equal(value, tools.trained(one)[key]), key
    alike = [{**row, "task": torch.tensor(0)} for row in rows]
    assert conditioned_loop(tools, same, alike, accumulation)[-1] != want[-1]
    assert hook_of(two).flow.ambient is None


@pytest.mark.parametrize("labelled", [True, False])
def test_prediction_runs_under_the_condition_of_its_batch(tools, tmp_path, labelled):
    rows = tasked(tools, 6)
    model = tools.adapted("moe-lora", **TASK)
    conditioned_loop(tools, model, rows)
    model.eval()
    if not labelled:
        rows = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    trainer = pr.Trainer(model, tools.arguments(tmp_path, per_device_eval_batch_size=2))
    found = torch.from_numpy(trainer.predict(rows).predictions)
    for index, batch in enumerate(tools.chunks(rows, 2)):
        task = batch.pop("task")
        with torch.no_grad():
            want = model(**batch, polyrank_condition=task).logits
            other = model(**batch, polyrank_condition=(task + 1) % 3).logits
        assert_close(found[2 * index : 2 * index + 2], want)
        assert not torch.allclose(want, other)


# torch warns of a reentrant checkpoint without gradients; a teacher's is meant to have none.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_sees_the_condition_of_its_own_forward(tools, reentrant):
    rows, grads = tasked(tools, 4), []
    batch = tools.stack(rows)
    task = batch.pop("task")
    for teacher in (False, True):
        model = tools.adapted("moe-lora", **TASK)
        with torch.no_grad():
            for layer in pr.adapter_of(model).layers:
                layer.B.fill_(0.1)
        tools.checkpointing(model, reentrant)
        model.train()
        loss = model(**batch, polyrank_condition=task).loss
        if teacher:
            with torch.no_grad(), pr.conditioned(model, (task + 1) % 3):
                model(**tools.stack(tools.rows(4)))
        loss.backward()
        grads.append([p.grad for p in pr.adapter_of(model).trained()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_injected_losses_count_alike_in_trainer_and_loop(tools, tmp_path):
    """The balance loss of a micro-batch is no sum over tokens: it is averaged over the update."""
    rows, seen = tools.rows(8), {}
    for aux in (0.0, 0.5):
        one, two = (tools.adapted("moe-lora", aux=aux, **AUX) for _ in range(2))
        tools.loop(one, rows, accumulation=4)
        arguments = tools.arguments(tmp_path, gradient_accumulation_steps=4)
        pr.Trainer(two, arguments, train_dataset=rows).train()
        seen[aux] = tools.trained(two)
        for key, value in tools.trained(one).items():
            assert torch.equal(value, seen[aux][key]), key
    assert any(not torch.equal(value, seen[0.5][key]) for key, value in seen[0.0].items())


def test_injected_losses_need_an_attachment(tools, tmp_path):
    rows = tools.rows(6)
    arguments = tools.arguments(tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(pr.InertError, match="moe-lora"):
        PlainTrainer(
            tools.adapted("moe-lora", aux=0.1, **AUX), arguments, train_dataset=rows
        ).train()
    PlainTrainer(tools.adapted("moe-lora", **AUX), arguments, train_dataset=rows).train()
