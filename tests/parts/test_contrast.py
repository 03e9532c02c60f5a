"""Texts that look for their images: the loss by hand, and what old classes have to do with it."""

from types import SimpleNamespace

import pytest
import torch

import polyrank as pr
from polyrank.engine import objective as module
from polyrank.engine.objective import Objective
from polyrank.engine.reading import ImageReader, ImageTextReader, SequenceReader
from polyrank.engine.reading.images import pixels_for
from polyrank.errors import ConfigError
from polyrank.frame import Loss, Out, keyed
from polyrank.parts.contrast import TextLoss, texts_to_images
from polyrank.parts.masked import MaskedCrossEntropy
from polyrank.streams import Task
from polyrank.testing import MODELS, assert_close

N, C, OLD, D = 7, 6, 3, 5


BOTH = SimpleNamespace(layers=[SimpleNamespace(site=SimpleNamespace(path="visual_projection"))])


class Shop:
    classes = tuple(range(OLD, C))


def features():
    rng = keyed("contrast")
    images = torch.randn(N, D, generator=rng, dtype=torch.float64)
    texts = torch.randn(C, D, generator=rng, dtype=torch.float64)
    # Class 4 has no image here.
    labels = torch.tensor([3, 5, 5, 3, 3, 5, 3])
    unit = [f / f.norm(dim=1, keepdim=True) for f in (images, texts)]
    return *unit, labels


def by_hand(images, texts, labels, sigma=10.0):
    rows = []
    for c in range(len(texts)):
        scores = sigma * (images @ texts[c])
        log = scores - scores.logsumexp(0)
        rows.append(-sum((log[n] for n in range(len(labels)) if labels[n] == c), torch.zeros(())))
    return sum(rows) / len(rows)


def test_codyra_10_each_text_looks_for_its_images():
    images, texts, labels = features()
    found = texts_to_images(10.0 * images @ texts.T, labels)
    assert_close(found, by_hand(images, texts, labels))
    assert found > 0


def test_codyra_10_a_class_without_images_counts_and_says_nothing():
    images, texts, labels = features()
    before = texts_to_images(10.0 * images @ texts.T, labels)
    for row in (0, 4):
        other = texts.clone()
        other[row] = -texts[1]
        assert torch.equal(texts_to_images(10.0 * images @ other.T, labels), before)
    fewer = texts_to_images(10.0 * images @ texts[1:].T, labels - 1)
    assert_close(fewer, before * C / (C - 1))


def test_codyra_10_old_classes_never_enter_the_other_half():
    images, texts, labels = features()
    texts.requires_grad_()
    loss = MaskedCrossEntropy()
    loss.bind(None, Shop())
    logits = 10.0 * images @ texts.T
    found = loss(Out(logits=logits), {"labels": labels})
    (grad,) = torch.autograd.grad(found, texts, retain_graph=True)
    assert not grad[:OLD].any()
    assert grad[OLD:].abs().min() > 0
    hidden = torch.cat([torch.full((N, OLD), -torch.inf), logits[:, OLD:].detach()], 1)
    expected = torch.nn.functional.cross_entropy(hidden, labels, reduction="sum")
    assert_close(found, expected)


def tower(*paths):
    """An adapter of these layers."""
    sites = [SimpleNamespace(site=SimpleNamespace(path=path)) for path in paths]
    return SimpleNamespace(layers=sites)


def test_a_label_of_another_task_is_refused():
    images, texts, labels = features()
    loss = TextLoss()
    loss.bind(BOTH, Shop())
    out = Out(logits=10.0 * images @ texts.T)
    assert torch.equal(loss(out, {"labels": labels}), texts_to_images(out.logits, labels))
    with pytest.raises(ConfigError, match="symmetric: 1 of 7 rows have labels outside"):
        loss(out, {"labels": torch.cat([labels[1:], torch.tensor([0])])})
    with pytest.raises(ConfigError, match=r"polyrank\.run"):
        loss.bind(BOTH, None)


def test_an_adapter_of_the_text_tower_alone_has_no_such_half():
    own = ("text_model.encoder.layers.0.mlp.fc1", "text_projection")
    with pytest.raises(ConfigError, match=r"text tower alone \(text_model.*2 layers.*leave symm"):
        TextLoss().bind(tower(*own), Shop())
    for paths in ((*own, "visual_projection"), ("vision_model.encoder.layers.0.mlp.fc1",)):
        TextLoss().bind(tower(*paths), Shop())


def clip():
    """A tiny adapted CLIP, its reader after two tasks, and a batch of the second one."""
    tiny, rng = MODELS["clip"], keyed("pixels")
    read = ImageTextReader(tiny.tokenizer(), pixels_for(tiny.build()), 16)
    for index, labels in enumerate((("cat", "dog"), ("fox", "owl"))):
        facts = {"labels": labels, "classes": (2 * index, 2 * index + 1), "prompt": "a {label}."}
        data = {"train": [], "test": []}
        read.see(Task(index=index, name=f"t{index}", kind="image-text", data=data, **facts))
    rows = [
        {"pixel_values": torch.randn(1, 8, 8, generator=rng), "label": 2 + i % 2} for i in range(5)
    ]
    method = pr.method("codyra", r=2, symmetric=True)
    model = pr.adapt(tiny.build(), method, ".*(q_proj|v_proj)").train()
    return model, read, read.collate(rows)


def test_codyra_10_the_engine_trains_both_halves_of_the_loss_of_clip():
    model, read, batch = clip()
    shop = type("Shop", (), {"classes": (2, 3)})
    objective = Objective(read, pr.adapter_of(model).method, [pr.method("masked")])
    assert not objective.problems()
    objective.bind(pr.adapter_of(model), shop)
    batch["role"] = torch.zeros(5, dtype=torch.int64)
    flow = pr.adapter_of(model).layers[0].module.flow
    found, _ = objective(model, model, flow, batch, objective.counts([batch]), 1)
    base = model.get_base_model()
    parts = base(**read.inputs(batch))
    images, texts, scale = parts.image_embeds, parts.text_embeds, base.logit_scale.exp()
    labels = batch["labels"]
    half = torch.nn.functional.cross_entropy(scale * images @ texts[2:].T, labels - 2)
    assert_close(found, half + by_hand(images, texts, labels, scale))
    found.backward()
    moved = {v.site.path: bool(v.B.grad.any()) for v in pr.adapter_of(model).layers}
    assert len(moved) == 4
    assert all(moved.values())


def parts_of(objective, model, batch, pieces):
    """Return the loss of one update in micro-batches, as one process sees it."""
    flow = pr.adapter_of(model).layers[0].module.flow
    split = [{k: v[i] for k, v in batch.items()} for i in torch.arange(4).chunk(pieces)]
    counts = objective.counts(split)
    with torch.no_grad():
        return sum(objective(model, model, flow, b, counts, pieces)[0] for b in split)


def bound(read, method, *strategies, classes=(2, 3)):
    objective = Objective(read, method, strategies)
    objective.bind(BOTH, type("Shop", (), {"classes": classes}))
    return objective


def test_accumulated_halves_keep_their_weights():
    model, read, batch = clip()
    batch = {k: v[:4] for k, v in batch.items()} | {"role": torch.zeros(4, dtype=torch.int64)}
    with torch.no_grad():
        logits = model(**read.inputs(batch)).logits_per_image
    labels, plain = batch["labels"], pr.method("codyra", r=2)
    for pieces in (1, 2, 4):
        both = parts_of(bound(read, pr.adapter_of(model).method), model, batch, pieces)
        image = parts_of(bound(read, plain), model, batch, pieces)
        assert_close(image, torch.nn.functional.cross_entropy(logits, labels))
        seen = zip(logits.chunk(pieces), labels.chunk(pieces), strict=True)
        assert_close(both - image, sum(texts_to_images(z, y) for z, y in seen))


class Mean(Loss):
    """A term that is no sum over rows."""

    batchwise = True

    def bind(self, adapter, workshop):
        pass

    def __call__(self, out, batch):
        return out.logits.std()


class Spread(pr.Strategy):
    def losses(self):
        return [Mean()]


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_not_linear_in_the_batch_is_not_multiplied_by_processes(count, monkeypatch):
    """Processes average their gradients, and PhaseTrainer multiplies the loss by their number."""
    model, read, batch = clip()
    batch = {k: v[:4] for k, v in batch.items()} | {"role": torch.zeros(4, dtype=torch.int64)}
    monkeypatch.setattr(module, "_processes", lambda: count)
    # Each process has these rows, so that counts double.
    monkeypatch.setattr(module.dist, "all_reduce", lambda tensor: tensor.mul_(count))
    plain = pr.method("codyra", r=2)
    with torch.no_grad():
        logits = model(**read.inputs(batch)).logits_per_image
    image = parts_of(bound(read, plain), model, batch, 2)
    spread = parts_of(bound(read, plain, Spread()), model, batch, 2)
    texts = parts_of(bound(read, pr.adapter_of(model).method), model, batch, 2)
    assert_close(count * image, torch.nn.functional.cross_entropy(logits, batch["labels"]))
    halves = logits.chunk(2)
    assert_close(count * (spread - image), sum(z.std() for z in halves) / 2)
    # Each process adds what its own images say: as many images, as large a term.
    seen = zip(halves, batch["labels"].chunk(2), strict=True)
    assert_close(texts - image, sum(texts_to_images(z, y) for z, y in seen))


@pytest.mark.parametrize("reader", [ImageReader, SequenceReader])
def test_rows_without_texts_are_refused_before_training(reader):
    read = object.__new__(reader)
    found = Objective(read, pr.method("codyra", symmetric=True), []).problems()
    assert len(found) == 1
    assert "loss 'textloss': needs texts, which models for" in found[0]
    assert "leave the strategy or the option out" in found[0]
    assert not Objective(read, pr.method("codyra"), []).problems()


def test_the_loss_is_refused_where_nobody_evaluates_it():
    model, _, _ = clip()
    with pytest.raises(ConfigError, match="losses of codyra"):
        pr.attach(pr.optimizer(model, lr=0.1), model, total=9)
