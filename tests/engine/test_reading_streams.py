"""From a stream's YAML over JSON lines to rows, batches, a forward, gradients and a score."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import polyrank as pr
from polyrank.engine.data import TaskRows
from polyrank.engine.reading import reader_for
from polyrank.frame import keyed
from polyrank.streams import stream
from polyrank.testing import MODELS, assert_close

LOGITS = frozenset({"logits"})
# The kind, the model, what the file says of its columns, and the path of the model's classifier.
KINDS = {
    "sequence-classification": ("bert", {"columns": {"text_pair": "second"}}, "classifier"),
    "regression": ("bert", {"columns": {"target": "score"}}, "classifier"),
    "text-to-label": ("t5", {"prompt": "{text} {options}:"}, None),
    "generation": ("llama", {"prompt": "{text}:", "columns": {"answer": "second"}}, None),
    "language-modelling": ("gpt2", {"columns": {"text": "{text} {second}"}}, None),
    "image-classification": ("vit", {"columns": {"image": "photo"}}, "classifier"),
    "image-text": (
        "clip", {"columns": {"image": "photo"}, "prompt": "this is a {label}"}, None
    ),
}  # fmt: skip


def files(names):
    """Write rows of every kind and their images; labels of the second task are others."""
    for number, name in enumerate(names):
        rows = []
        for i in range(8):
            photo = f"{name}{i}.png"
            pixels = np.random.RandomState(10 * number + i).randint(0, 256, (5 + i, 12 - i, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(photo)
            row = {"text": "ab" * (i + 1), "second": "cd"[: 1 + i % 2], "photo": photo}
            label = ("cat", "dog", "owl", "bee")[2 * number + i % 2]
            rows.append({**row, "score": i - 3.5, "label": label})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Path(f"{name}.jsonl").write_text(lines, encoding="utf-8")


def made(kind, facts):
    files(("one", "two"))
    tasks = [{"name": n, "path": f"{n}.jsonl", "train": 0.5, "test": 0.5} for n in ("one", "two")]
    spec = {"kind": kind, "scenario": "text", **facts, "tasks": tasks}
    Path("tasks.yaml").write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return stream("tasks.yaml")


def adapted(tiny, read, head, tasks):
    """The model with every factor at work, and the head that the reader asks for."""
    head = head if read.growing or read.outputs else None
    model = pr.adapt(tiny.build(), "lora", "all-linear", head=head).train()
    with torch.no_grad():
        for layer in pr.adapter_of(model).layers:
            layer.B.normal_(std=0.1, generator=keyed("b", layer.site.path))
    if head is not None:
        names = dict.fromkeys(label for task in tasks for label in task.labels)
        pr.adapter_of(model).head.grow(list(read.outputs or names), keyed("head"))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_trained_on_and_scored(kind):
    family, facts, head = KINDS[kind]
    tiny, tasks = MODELS[family], made(kind, facts)
    processor = None if tiny.kind == "images" else tiny.tokenizer()
    read = reader_for(tasks, tiny.build(), processor)
    assert read.problems(tiny.build(), tasks) == []
    model = adapted(tiny, read, head, tasks)
    for task in tasks:
        read.see(task)
    rows = TaskRows([task.data["train"] for task in tasks])
    batch = read.collate([rows[i] for i in range(len(rows))])
    assert batch["task"].tolist() == [0] * 4 + [1] * 4
    assert batch["row"].tolist() == [*range(4)] * 2

    out, loss = read.forward(model, batch, LOGITS), read.loss()
    total = loss(out, batch)
    halves = [{k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4)]
    parts = sum(loss(read.forward(model, half, LOGITS), half) for half in halves)
    assert_close(total, parts)
    total.backward()
    grads = {layer.site.path: layer.B.grad for layer in pr.adapter_of(model).layers}
    assert all(float(grad.abs().sum()) > 0 for grad in grads.values())

    model.eval()
    for task in tasks:
        found = read.score(model, task, task.data["test"], 3)
        assert found.count == 4
        assert math.isfinite(found.unrestricted)
        assert math.isnan(found.restricted) == (not task.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_batches_changes_no_score(kind):
    family, facts, head = KINDS[kind]
    tiny, tasks = MODELS[family], made(kind, facts)
    processor = None if tiny.kind == "images" else tiny.tokenizer()
    read = reader_for(tasks, tiny.build(), processor)
    model = adapted(tiny, read, head, tasks).eval()
    for task in tasks:
        read.see(task)
    for task in tasks:
        pairs = [read.score(model, task, task.data["test"], size) for size in (1, 3, 4)]
        for found in pairs[1:]:
            assert found.count == pairs[0].count
            assert_close(found.unrestricted, pairs[0].unrestricted, dtype=torch.float32)
            if task.labels:
                assert found.restricted == pairs[0].restricted
