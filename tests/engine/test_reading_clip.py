"""Images and the texts of all classes: what is compared, and where gradients go."""

import copy

import numpy as np
import pytest
import torch

import polyrank as pr
from polyrank.engine.reading import ImageTextReader
from polyrank.engine.reading.images import pixels_for
from polyrank.errors import ConfigError
from polyrank.frame import keyed
from polyrank.streams import Stream, Task
from polyrank.testing import MODELS, assert_close

LOGITS = frozenset({"logits"})
CLIP = MODELS["clip"]


def rows(classes, count=7, seed=0):
    """Rows with images of different sizes, classes in turn."""
    rng = np.random.RandomState(seed)
    return [
        {
            "image": rng.randint(0, 256, (5 + i, 9 - i, 3)).astype(np.uint8),
            "label": classes[i % len(classes)],
            "task": seed,
            "row": i,
        }
        for i in range(count)
    ]


def stream():
    """Two tasks of two classes, one of them in both, with different prompts."""
    tasks = []
    for i, (labels, classes, prompt) in enumerate(
        [(("cat", "dog"), (0, 1), "a {label}."), (("dog", "fox"), (1, 2), "pet: {label}")]
    ):
        data = {"train": rows(classes, seed=i), "test": rows(classes, seed=i + 5)}
        facts = {"labels": labels, "classes": classes, "prompt": prompt, "data": data}
        tasks.append(Task(index=i, name=f"t{i}", kind="image-text", **facts))
    return Stream(name="toy", scenario="cross-domain", tasks=tuple(tasks))


def reader(*tasks):
    read = ImageTextReader(CLIP.tokenizer(), pixels_for(CLIP.build()), 16)
    for task in tasks:
        read.see(task)
    return read


def direct(model, read, batch, texts):
    """Logits by towers, one text and one image at a time."""
    ends = []
    for text in texts:
        ids = torch.tensor([read.tokenizer(text)["input_ids"]])
        ends.append(model.get_text_features(input_ids=ids).pooler_output[0])
    images = [
        model.get_image_features(pixel_values=one[None]).pooler_output[0]
        for one in batch["pixel_values"]
    ]
    cosine = torch.nn.functional.cosine_similarity
    scale = model.logit_scale.exp()
    return torch.stack([torch.stack([scale * cosine(i, t, 0) for t in ends]) for i in images])


def test_logits_are_scaled_cosines_with_every_class_seen():
    first, second = stream()
    read, model = reader(first), CLIP.build()
    batch = read.collate(second.data["train"])
    assert batch["pixel_values"].shape == (7, 1, 8, 8)
    assert batch["labels"].tolist() == [1, 2, 1, 2, 1, 2, 1]
    assert set(batch) == {"pixel_values", "labels", "task", "row"}
    one = read.forward(model, batch, LOGITS).logits
    assert_close(one, direct(model, read, batch, ["a cat.", "a dog."]))
    read.see(second)
    two = read.forward(model, batch, LOGITS).logits
    # A class that is shown again keeps its text.
    assert_close(two, direct(model, read, batch, ["a cat.", "a dog.", "pet: fox"]))
    assert_close(two[:, :2], one)
    read.see(first)
    assert torch.equal(read.forward(model, batch, LOGITS).logits, two)


def test_what_was_seen_follows_from_the_tasks_and_is_not_shared():
    first, second = stream()
    fresh = reader()
    used = copy.copy(fresh)
    used.see(first)
    with pytest.raises(ConfigError, match="none has been seen yet; call see"):
        fresh.inputs(fresh.collate(first.data["train"]))
    later = copy.copy(used)
    later.see(second)
    assert (len(used.seen), len(later.seen)) == (2, 3)
    again = reader(first, second)
    assert again.seen == later.seen
    assert all(torch.equal(again.tokens[name], later.tokens[name]) for name in again.tokens)
    with pytest.raises(ConfigError, match=r"got \[1, 2\] with task 't1', expected 0..1"):
        fresh.see(second)


@pytest.mark.parametrize("towers", ["text_model", "vision_model", "text_model|vision_model"])
def test_gradients_reach_the_towers_that_are_adapted(towers):
    model = pr.adapt(CLIP.build(), "lora", rf".*({towers}).*(q_proj|v_proj)").train()
    with torch.no_grad():
        for layer in pr.adapter_of(model).layers:
            layer.B.normal_(generator=keyed("b", layer.site.path))
    read = reader(*stream())
    batch = read.collate(stream()[1].data["train"])
    read.loss()(read.forward(model, batch, LOGITS), batch).backward()
    found = {layer.site.path: float(layer.B.grad.abs().sum()) for layer in
             pr.adapter_of(model).layers}  # fmt: skip
    assert len(found) == 2 * len(towers.split("|"))
    assert min(found.values()) > 0


def test_a_score_encodes_texts_once_and_agrees_with_forwards():
    first, second = stream()
    read, model = reader(first, second), CLIP.build()
    data = second.data["test"]
    logits = read.forward(model, read.collate(data), LOGITS).logits
    labels = torch.tensor([row["label"] for row in data])
    own = torch.tensor([1, 2])
    restricted = (own[logits[:, own].argmax(1)] == labels).double().mean()
    unrestricted = (logits.argmax(1) == labels).double().mean()
    calls = []
    model.text_model.register_forward_hook(lambda m, args, out: calls.append(len(out[0])))
    for size in (2, 7):
        calls.clear()
        found = read.score(model, second, data, size)
        assert (found.restricted, found.unrestricted, found.count) == (restricted, unrestricted, 7)
        # Once in parts of `size`, then one text beside each batch of images.
        assert sum(calls) == 3 + -(-7 // size)


def test_a_task_that_was_not_seen_is_scored_among_its_own_classes():
    first, _ = stream()
    read, model = reader(first), CLIP.build()
    data = rows((0, 1, 2), seed=9)
    labels = torch.tensor([row["label"] for row in data])
    facts = {"labels": ("owl", "bee", "yak"), "classes": (0, 1, 2), "prompt": "a {label}"}
    other = Task(index=0, name="general", kind="image-text", data={"test": data}, **facts)
    found = read.score(model, other, data, 3)
    logits = direct(model, read, read.collate(data), ["a owl", "a bee", "a yak"])
    assert found.unrestricted == (logits.argmax(1) == labels).double().mean()
    assert found.restricted == found.unrestricted
    assert [label for label, _ in read.seen.values()] == ["cat", "dog"]


def test_joining_changes_no_row():
    first, second = stream()
    read, model = reader(first, second), CLIP.build()
    parts = [read.collate(first.data["train"]), read.collate(second.data["train"][:3])]
    joined = read.join(parts)
    out = read.forward(model, joined, LOGITS)
    single = [read.forward(model, part, LOGITS) for part in parts]
    reason = "the same sums, in batches of other sizes"
    assert_close(out.logits, torch.cat([o.logits for o in single]), tol=1e-6, reason=reason)
    losses = [read.loss()(o, part) for o, part in zip(single, parts, strict=True)]
    assert_close(read.loss()(out, joined), sum(losses), tol=1e-6, reason=reason)
    assert joined["task"].tolist() == [0] * 7 + [1] * 3


def test_states_are_those_of_the_image_tower():
    read, model = reader(*stream()), CLIP.build()
    batch = read.collate(stream()[0].data["train"])
    out = read.forward(model, batch, frozenset({"logits", "hidden", "embedding"}))
    assert [tuple(h.shape) for h in out.hidden] == [(7, 5, 24)] * 2
    assert_close(out.embedding.norm(dim=1), torch.ones(7))
    assert out.mask is None
    assert (read.growing, read.outputs) == (False, ())


def test_what_cannot_be_compared_is_said():
    read = reader()
    assert read.problems(CLIP.build(), stream()) == []
    assert read.seen == {}
    [found] = read.problems(MODELS["vit"].build(), stream())
    assert found.startswith("model: ViTForImageClassification does not take rows of task 't0'")
    # Too long for the model.
    long = ImageTextReader(CLIP.tokenizer(), pixels_for(CLIP.build()), 17)
    [found] = long.problems(CLIP.build(), stream())
    assert found.startswith("max_length: got 17, but the model has 16 positions")
    model = CLIP.build()
    model.config.model_type = "siglip"
    [found] = read.problems(model, stream())
    assert "reads a text at its last position" in found
    task = Task(index=0, name="t", kind="image-text", labels="ab", classes=(0, 1),
                data={"train": rows((0, 1)), "test": rows((0, 1))})  # fmt: skip
    bare = Stream(name="toy", scenario="cross-domain", tasks=(task,))
    [found] = read.problems(CLIP.build(), bare)
    assert "task 't': got prompt None, expected {label} in it and no other" in found
    with pytest.raises(ConfigError, match="max_length: got 1, expected an integer >= 3"):
        ImageTextReader(CLIP.tokenizer(), None, 1)
