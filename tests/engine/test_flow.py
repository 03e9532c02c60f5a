"""What a forward carries: counts of real tokens, once; other forwards in between; copies."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import polyrank as pr
from polyrank.layers import hook_of
from polyrank.testing import MODELS

K = 2


def flow_of(model):
    return hook_of(model).flow


def counts(model):
    """Tokens counted per layer path: the sum over ranks is k times the tokens."""
    return {
        layer.site.path: 0 if layer.core.counts is None else int(layer.core.counts.sum()) / K
        for layer in pr.adapter_of(model).layers
    }


def clear(model):
    for layer in pr.adapter_of(model).layers:
        layer.core.counts = None


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_padding_is_not_counted(tools, family, side):
    model = tools.adapted("smora", family=family).train()
    batch = MODELS[family].inputs()
    if side == "left":
        batch = {k: v.flip(1) if v.dim() == 2 else v for k, v in batch.items()}
    real = int(batch["attention_mask"].sum())
    assert 0 < real < batch["attention_mask"].numel()
    model(**batch).loss.backward()
    found = counts(model)
    # The pooler and the classifier of BERT see one token of each sentence.
    pooled = {path: n for path, n in found.items() if "pooler" in path or "classifier" in path}
    assert set(pooled.values()) <= {len(batch["input_ids"])}
    assert {n for path, n in found.items() if path not in pooled} == {real}


def test_padding_does_not_change_what_is_counted(tools):
    model = tools.adapted("smora").train()
    rows = tools.rows(3)
    model(**tools.stack(rows)).loss.backward()
    padded = [layer.core.counts.clone() for layer in pr.adapter_of(model).layers]
    clear(model)
    for row in rows:
        length = int(row["attention_mask"].sum())
        model(**{key: value[None, :length] for key, value in row.items()}).loss.backward()
    for layer, want in zip(pr.adapter_of(model).layers, padded, strict=True):
        assert torch.equal(layer.core.counts, want)


def test_without_a_mask_all_tokens_count(tools):
    model = tools.adapted("smora").train()
    ids = torch.randint(3, 32, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    assert set(counts(model).values()) == {10}


@pytest.mark.parametrize("given", ["mask", "labels"])
def test_decoder_and_encoder_have_a_mask_each(tools, given):
    model = tools.adapted("smora", family="t5").train()
    ids = torch.randint(3, 32, (2, 7))
    source = torch.ones_like(ids)
    source[1, 4:] = 0
    labels = torch.randint(3, 32, (2, 5))
    target = torch.ones_like(labels)
    target[0, 3:] = 0
    batch = {"input_ids": ids, "attention_mask": source}
    if given == "mask":
        batch |= {"labels": labels, "decoder_attention_mask": target}
    else:
        # As collators do it: decoder inputs and labels, no decoder mask.
        labels = labels.masked_fill(target == 0, -100)
        batch |= {
            "labels": labels,
            "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels),
        }
    model(**batch).loss.backward()
    found = counts(model)
    cross = {p: n for p, n in found.items() if "EncDecAttention" in p and p[-1] in "kv"}
    decoder = {p: n for p, n in found.items() if p.startswith("decoder") and p not in cross}
    encoder = {p: n for p, n in found.items() if p.startswith("encoder")}
    assert len(cross) == 2
    assert set(cross.values()) == set(encoder.values()) == {int(source.sum())}
    assert {n for p, n in decoder.items()} == {int(target.sum())}


def test_a_mask_follows_tokens_that_a_model_flattens(tools):
    flow = flow_of(tools.adapted("smora"))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    with flow.put(mask=mask):
        assert torch.equal(flow.tokens("mask", torch.Size([2, 3])), mask)
        assert torch.equal(flow.tokens("mask", torch.Size([6])), mask.flatten())
        assert flow.tokens("mask", torch.Size([2])) is None
        assert flow.tokens("mask", torch.Size([3, 2])) is None
        assert flow.tokens("decoder", torch.Size([2, 3])) is None


def test_only_forwards_with_gradients_in_training_are_counted(tools):
    model = tools.adapted("smora")
    batch = tools.stack(tools.rows(2))
    model.eval()
    model(**batch)
    model.train()
    with torch.no_grad():
        model(**batch)
    with torch.inference_mode():
        model(**batch)
    with pr.view(model, "base"):
        model(**batch)
    assert set(counts(model).values()) == {0}
    model(**batch)
    assert set(counts(model).values()) == {int(batch["attention_mask"].sum())}


# torch warns of a reentrant checkpoint without gradients; a teacher's is meant to have none.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_teacher_between_forward_and_backward_disturbs_nothing(tools, reentrant, training):
    """Recomputed segments see mask, condition and dropout of the student's forward."""
    grads = []
    for teacher in (False, True):
        model = tools.adapted("smora", dropout=0.3).train()
        tools.checkpointing(model, reentrant)
        student, other = tools.stack(tools.rows(2)), tools.stack(tools.rows(3, tokens=5, seed=1))
        flow = flow_of(model)
        loss = model(**student).loss
        before = (flow.mask, flow.condition, int(flow.draw), flow.plain)
        if teacher:
            model.train(training)
            with torch.no_grad(), pr.conditioned(model, torch.ones(3, 1)):
                model(**other)
            with torch.no_grad(), pr.view(model, "base"):
                model(**other)
            model.train()
        assert flow.mask is before[0]
        assert (flow.condition, int(flow.draw), flow.plain) == before[1:]
        loss.backward()
        grads.append([p.grad for p in pr.adapter_of(model).trained()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_forward_that_fails_leaves_the_flow_as_it_was(tools):
    model = tools.adapted("smora")
    flow = flow_of(model)
    model(**tools.stack(tools.rows(2)))
    mask = flow.mask
    with torch.no_grad(), pytest.raises(IndexError):
        model(input_ids=torch.full((3, 2), 10**6), attention_mask=torch.ones(3, 2))
    assert flow.mask is mask
    assert flow.learning
    assert hook_of(model).before == []


def test_a_checkpoint_around_the_whole_model_counts_and_begins_once(tools):
    grads, told = [], []
    for around in (False, True):
        rule = tools.Recorder()
        model = tools.adapted("smora", dropout=0.3).train()
        optimizer = torch.optim.AdamW(pr.parameter_groups(model, 1e-2))
        pr.attach(optimizer, model, strategies=[tools.toy(rule)])
        batch = tools.stack(tools.rows(2))

        def run(batch, model=model):
            return model(**batch).loss

        loss = checkpoint(run, batch, use_reentrant=False) if around else run(batch)
        loss.backward()
        assert set(counts(model).values()) == {int(batch["attention_mask"].sum())}
        grads.append([p.grad for p in pr.adapter_of(model).trained()])
        told.append(rule.calls)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert told == [[("begin", 0)], [("begin", 0)]]


def test_dropout_differs_between_forwards_runs_tasks_and_phases(tools):
    batch = tools.stack(tools.rows(4))
    losses = []
    for options in ({}, {}, {"seed": 1}, {"task": 1}, {"phase": "other"}):
        model = tools.adapted("lora", dropout=0.5).train()
        with torch.no_grad():
            for layer in pr.adapter_of(model).layers:
                layer.B.fill_(0.1)
        pr.attach(torch.optim.SGD(pr.parameter_groups(model, 0.0)), model, **options)
        losses.append([float(model(**batch).loss.detach()) for _ in range(2)])
    first, again, *others = losses
    assert first == again
    assert len({loss for pair in [first, *others] for loss in pair}) == 8


def train(tools, model, updates, start=0):
    """Updates of an attached model; returns losses."""
    optimizer = torch.optim.SGD(pr.parameter_groups(model, 0.5))
    attachment = pr.attach(optimizer, model)
    model.train()
    losses = []
    for index in range(start, start + updates):
        losses.append(tools.step(model, [tools.stack(tools.rows(2, seed=index))]))
        optimizer.step()
        optimizer.zero_grad()
    return losses, attachment


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), pickled],
    ids=["deepcopy", "pickle", "torch.save"],
)  # fmt: skip
def test_a_copy_made_in_training_is_free_and_trains_alike(tools, clone):
    model = tools.adapted("smora", dropout=0.2)
    _, attachment = train(tools, model, 2)
    # In the middle of an update, with a graph and counts.
    model(**tools.stack(tools.rows(2))).loss.backward()
    model.zero_grad()
    twin = clone(model)
    assert flow_of(twin) is not flow_of(model)
    assert not flow_of(twin).watchers
    assert not flow_of(twin).attached
    assert {id(m.flow) for m in twin.modules() if hasattr(m, "flow")} == {id(flow_of(twin))}
    draw = int(flow_of(model).draw)
    twin.train()
    tools.step(twin, [tools.stack(tools.rows(2))])
    assert int(flow_of(model).draw) == draw
    assert attachment.index == 2
    attachment.detach()
    clear(model)
    clear(twin)
    twin.zero_grad()
    one, _ = train(tools, model, 2, start=5)
    two, _ = train(tools, twin, 2, start=5)
    assert one == two
    assert torch.equal(tools.biases(model), tools.biases(twin))


def test_a_copy_is_watched_for_rules_of_its_own(tools):
    model = tools.adapted("smora")
    train(tools, model, 1)
    twin = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(pr.parameter_groups(twin, 0.5))
    tools.step(twin, [tools.stack(tools.rows(2))])
    optimizer.step()
    with pytest.raises(pr.InertError):
        tools.step(twin, [tools.stack(tools.rows(2))])
    tools.step(model, [tools.stack(tools.rows(2))])


def test_a_copy_keeps_the_model_it_came_from_collectable(tools):
    model = tools.adapted("smora")
    twin = copy.deepcopy(model)
    alive = weakref.ref(model)
    tools.models.clear()
    del model
    gc.collect()
    assert alive() is None
    twin(**tools.stack(tools.rows(2)))
