"""What all readers share: losses, joined batches, looks at a model that leave no trace."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import polyrank as pr
from polyrank.engine.reading import CrossEntropy, ImageReader, Reader, Score, merge_batches
from polyrank.errors import ConfigError
from polyrank.frame import Out, keyed
from polyrank.streams import OnePass, Stream, Task
from polyrank.testing import MODELS, assert_close

LOGITS = frozenset({"logits"})


def ready(count=6, seed=0, shape=(1, 8, 8)):
    """Rows with pixels that are ready, classes 0, 1, 2 in turn."""
    rng = keyed("ready", seed)
    return [
        {"pixel_values": torch.randn(shape, generator=rng).numpy(), "label": i % 3, "task": 0}
        for i in range(count)
    ]


def one_task(rows, **facts):
    """A stream of one task."""
    facts = {"kind": "image-classification", "labels": "abc", "classes": (0, 1, 2), **facts}
    task = Task(index=0, name="first", data={"train": rows, "test": rows}, **facts)
    return Stream(name="toy", scenario="text", tasks=(task,))


def test_classes_count_once_a_row():
    logits = torch.randn(4, 3, generator=keyed("logits"))
    labels = torch.tensor([0, 2, 1, 1])
    found = CrossEntropy()(Out(logits=logits), {"labels": labels})
    assert_close(found, F.cross_entropy(logits, labels) * 4)
    assert CrossEntropy().per == "sample"


def test_tokens_count_where_they_have_labels():
    tiny = MODELS["llama"]
    batch = tiny.inputs()
    model = tiny.build()
    loss = CrossEntropy(per="label")
    out = model(**batch)
    count = (batch["labels"][:, 1:] != -100).sum()
    assert 0 < count < batch["labels"][:, 1:].numel()
    assert_close(loss(Out(logits=out.logits), batch) / count, out.loss)
    silent = {"labels": torch.full_like(batch["labels"], -100)}
    nothing = loss(Out(logits=out.logits), silent)
    nothing.backward()
    assert float(nothing.detach()) == 0.0


def test_joined_batches_are_filled_up_where_they_may():
    a = {"input_ids": torch.ones(2, 3), "labels": torch.zeros(2), "task": torch.tensor([0, 0])}
    b = {"input_ids": torch.ones(1, 5), "labels": torch.ones(1), "task": torch.tensor([4])}
    right = merge_batches(a, b, {"input_ids": 9})
    assert right["input_ids"].tolist() == [[1, 1, 1, 9, 9], [1, 1, 1, 9, 9], [1] * 5]
    left = merge_batches(b, a, {"input_ids": 9}, left=True)
    assert left["input_ids"].tolist() == [[1] * 5, [9, 9, 1, 1, 1], [9, 9, 1, 1, 1]]
    assert right["task"].tolist() == [0, 0, 4]
    with pytest.raises(ConfigError, match=r"'input_ids': got rows of shape \(3,\) beside \(5,\)"):
        merge_batches(a, b)
    with pytest.raises(ConfigError, match="expected equal ones; give rows of both"):
        merge_batches(a, {**b, "role": torch.zeros(1)}, {"input_ids": 9})


def test_a_row_is_the_same_beside_others():
    reader, model = ImageReader(), MODELS["vit"].build()
    a, b = reader.collate(ready(2)), reader.collate(ready(3, seed=1))
    c = reader.collate(ready(1, seed=2))
    joined = reader.join([a, b, c])
    apart = torch.cat([reader.forward(model, part, LOGITS).logits for part in (a, b, c)])
    out = reader.forward(model, joined, LOGITS)
    assert_close(out.logits, apart, tol=1e-6, reason="the same sums, in batches of other sizes")
    single = [reader.loss()(reader.forward(model, part, LOGITS), part) for part in (a, b, c)]
    assert_close(reader.loss()(out, joined), sum(single))


def test_origin_stands_in_whole_numbers():
    rows = [{**row, "row": np.int32(i), "role": 2.0} for i, row in enumerate(ready(2))]
    batch = ImageReader().collate(rows)
    assert {name: batch[name].tolist() for name in ("task", "row", "role")} == {
        "task": [0, 0],
        "row": [0, 1],
        "role": [2, 2],
    }
    assert {batch[name].dtype for name in ("task", "row", "role", "labels")} == {torch.int64}
    assert set(ImageReader().inputs(batch)) == {"pixel_values"}


def test_a_score_tells_own_classes_from_all():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.zero = torch.nn.Parameter(torch.zeros(()))

        def forward(self, pixel_values):
            return Out(logits=pixel_values[:, 0, 0, :4] + self.zero)

    # Logits over classes 0..3; the task has 2 and 3.
    lines = [[9, 0, 2, 1], [0, 0, 2, 1], [0, 0, 1, 2], [0, 5, 2, 1]]
    labels = [2, 2, 3, 3]
    pixels = [np.array([[line]], dtype=np.float32) for line in lines]
    rows = [{"pixel_values": p, "label": y} for p, y in zip(pixels, labels, strict=True)]
    task = Task(index=0, name="t", labels="cd", classes=(2, 3), data={"test": rows})
    for size in (1, 3, 9):
        found = ImageReader().score(Model(), task, rows, size)
        assert found == Score(restricted=0.75, unrestricted=0.5, count=4)


class Drawing(torch.nn.Module):
    """Draws from every global generator and counts its forwards."""

    def __init__(self):
        super().__init__()
        self.inner = MODELS["vit"].build()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, **inputs):
        random.random()
        np.random.rand()
        torch.rand(1)
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.inner(**inputs)


def test_a_try_leaves_generators_and_modes_alone():
    model = Drawing().train()
    model.inner.vit.eval()
    modes = [m.training for m in model.modules()]
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    assert ImageReader().problems(model, one_task(ready())) == []
    assert [m.training for m in model.modules()] == modes
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.is_grad_enabled()


def test_a_try_reads_no_row_of_an_online_stream():
    stream = one_task(ready())
    online = Stream(name="o", scenario="text", tasks=stream.tasks, passes=1)
    assert isinstance(online[0].data["train"], OnePass)
    assert ImageReader().problems(MODELS["vit"].build(), online) == []
    assert len([online[0].data["train"][i] for i in range(6)]) == 6


def test_what_cannot_be_read_is_said():
    small = ready(shape=(1, 4, 4))
    facts = {"labels": "abc", "classes": (0, 1, 2), "kind": "image-classification"}
    parts = {
        "bare": [{"label": 0}, {"label": 1}, {"label": 2}],
        "good": ready(),
        "odd": [{"pixel_values": np.zeros(3), "label": "x"}],
    }
    tasks = [
        Task(index=i, name=name, data={"train": rows, "test": rows}, **facts)
        for i, (name, rows) in enumerate(parts.items())
    ]
    stream = copy.copy(one_task(ready()))
    object.__setattr__(stream, "tasks", tuple(tasks))
    found = ImageReader().problems(MODELS["vit"].build(), stream)
    assert len(found) == 2
    assert found[0].startswith("stream: task 'bare': row: got columns ['label'], expected 'image'")
    assert found[1].startswith("stream: task 'odd': ValueError: invalid literal")
    [found] = ImageReader().problems(MODELS["vit"].build(), one_task(small))
    assert "does not take rows of task 'first', got {'pixel_values': (2, 1, 4, 4)}" in found
    assert found.endswith("pass a model made for image-classification")
    [found] = ImageReader().problems(MODELS["vit"].build(), one_task(ready(), kind="regression"))
    assert "task 'first' is of kind regression, expected image-classification" in found


def test_wishes_that_are_not_served_are_refused():
    tiny = MODELS["vit"]
    reader, batch = ImageReader(), ImageReader().collate(ready(2))
    with pytest.raises(ConfigError, match=r"\['sides'\], but ImageReader offers"):
        reader.forward(tiny.build(), batch, frozenset({"sides"}))
    with pytest.raises(ConfigError, match="no growing head"):
        reader.forward(tiny.build(), batch, frozenset({"embedding"}))
    model = pr.adapt(tiny.build(), "lora", head="classifier").eval()
    pr.adapter_of(model).head.grow(["a", "b"], keyed("head"))
    out = reader.forward(model, batch, frozenset({"logits", "hidden", "embedding"}))
    assert [tuple(h.shape) for h in out.hidden] == [(2, 5, 24)] * 3
    assert_close(out.logits, pr.adapter_of(model).head(out.embedding))
    assert out.mask is None


def test_a_reader_must_say_how():
    with pytest.raises(NotImplementedError, match="must define collate"):
        Reader().collate([])
    with pytest.raises(NotImplementedError, match="must define inputs"):
        Reader().inputs({})
