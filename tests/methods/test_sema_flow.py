"""sema: what a task asks for and in which order, what is refused, and what it leaves."""

import math
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from transformers import T5ForSequenceClassification, TrainingArguments

import polyrank as pr
from polyrank.errors import CheckpointError, ConfigError, InertError, MergeError
from polyrank.frame import Flow, Site, keyed
from polyrank.frame.combine import combination_problems
from polyrank.io.adapters import write_saved
from polyrank.layers import LinearHead, adapter_of, reshaped
from polyrank.parts.branches import PLACES, Expandable
from polyrank.parts.expand import Detect, Expand
from polyrank.testing import MODELS

D = 6
SITE = Site(path="layers.1", d_in=D, d_out=D, r=2, depth=1, depths=2, modules=("norm2", "mlp"))


def branch(adapters=1, live=True, growing=True):
    """Return a block with so many adapters."""
    block = Expandable(SITE, r=2, q=3, window=8, scale=1.0, growing=growing)
    for number in range(1, adapters):
        block.freeze()
        block.expand(keyed("expand", number))
    if not live:
        block.freeze()
    return block


class Floor:
    """The engine's services to a look: a few branches, batches by number, scores from a table."""

    def __init__(self, count, batches, table):
        self.blocks = [branch(2, live=False) for _ in range(count)]
        for number, block in enumerate(self.blocks):
            block.path = str(number)
        self.batches, self.table, self.first = batches, table, False
        self.adapter, self.seen = self, []
        self.head, self.memories, self.known = LinearHead(D), {}, 2

    def roles(self):
        roles = {"head": list(self.head.parameters())}
        for block in (b for b in self.blocks if b.live):
            roles["side"] = [*block.adapter.parameters()]
            roles["router"] = [*block.router.parameters()]
            roles["descriptor"] = [*block.descriptor.parameters()]
        return roles

    def reshaped(self):
        return nullcontext(self.blocks)

    def memory(self, name):
        return self.memories.setdefault(name, {})

    def rng(self, name):
        return keyed("floor", name)

    def data(self, role, split="train", *, seed=None, size=None):
        return iter([{"labels": torch.zeros(size), "number": n} for n in range(self.batches)])


def looks(floor, order, tau=1.0):
    """Go through a task; return what happened as ("look" pass batch | "grow" block | phase)."""
    detect = Detect(tau, 4, 0, signed=False, ordered=order == "ordered")

    def score(workshop, batch, block):
        return floor.table[state["pass"]][batch["number"]][int(block.path)]

    detect._score = score
    boundary = Expand("sema", detect, pr.method("sema")._groups, 0)
    state, found = {}, []
    boundary.start(None, floor, state)
    while (work := boundary.next(None, floor, state)) is not None:
        if hasattr(work, "step"):
            counts = [b.count for b in floor.blocks]
            while not work.step(floor, state):
                pass
            found += [n for n, b in enumerate(floor.blocks) if b.count > counts[n]]
        else:
            found.append(work.name.split("-")[0])
            trains = {role for role, params in floor.roles().items() if role in work.train}
            assert trains == work.train
    boundary.finish(None, floor, state)
    return found, state


def events(count, batches, table, order, tau=1.0):
    """The same by plain loops, as the program is read."""
    found, grown, number = [], set(), 0
    if order == "ordered":
        for block in range(count):
            if any(table[block][batch][block] > tau for batch in range(batches)):
                found += [block, "func", "rd"]
        return (found or ["head"]), min(count, len(table))
    while True:
        added = False
        for batch in range(batches):
            for block in range(count):
                if block not in grown and table[number][batch][block] > tau:
                    grown.add(block)
                    found += [block, "func", "rd"]
                    added = True
                    break
        number += 1
        if not added:
            return (found or ["head"]), number


@pytest.mark.parametrize("order", ["batch", "ordered"])
@pytest.mark.parametrize("level", [0.2, 0.8, 1.02, 2.0])
def test_a_task_asks_grows_and_trains_as_the_loops_say(order, level):
    count, batches = 3, 4
    for seed in range(4):
        rng = keyed("table", seed, round(100 * level))
        table = (torch.rand(count + 2, batches, count, generator=rng) * level).tolist()
        floor = Floor(count, batches, table)
        found, state = looks(floor, order)
        expected, passes = events(count, batches, table, order)
        assert found == expected
        assert state["pass"] < count + 1
        if len(state["expanded"]) < count:
            assert state["pass"] + 1 == passes
        assert sorted(set(state["expanded"])) == sorted(state["expanded"])
        assert all(block.count in (2, 3) and not block.live for block in floor.blocks)


def test_the_threshold_itself_adds_nothing():
    exactly = [[[1.0]] * 3] * 3
    assert looks(Floor(1, 3, exactly), "batch")[0] == ["head"]
    above = [[[math.nextafter(1.0, 2)]] * 3] * 3
    assert looks(Floor(1, 3, above), "batch")[0] == [0, "func", "rd"]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": -1, "end": -2}, "start: got -1, expected at most end, -2"),
        ({"q": 0}, "q: got 0, expected >= 1"),
        ({"r": 0}, "r: got 0, expected at least 1 rank"),
        ({"window": 2}, "window: got 2, expected >= 3"),
        ({"tau": 0.0}, "tau: got 0.0, expected > 0"),
        ({"start": -2, "end": 1}, "start: got -2, from the end, with end = 1 from 0"),
        ({"rd_rate": 0.0}, "rd_rate: got 0.0, expected > 0"),
        ({"momentum": 1.0}, "momentum: got 1.0, expected below 1"),
        ({"decay": -1.0}, "decay: got -1.0, expected >= 0"),
        ({"dropout": 0.1}, "dropout: got 0.1, but these adapters drop nothing"),
        ({"optim_by": "altlora"}, "altlora cannot lend its optimiser to sema"),
        ({"init_by": "lora-ga"}, "lora-ga cannot lend its start to sema"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_without_sense_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        pr.method("sema", **options)


def test_a_range_outside_of_the_model_and_targets_are_refused():
    with pytest.raises(ConfigError, match=r"got -3 and -1, expected a range of the 2 blocks"):
        pr.adapt(MODELS["vit"].build(), pr.method("sema"))
    with pytest.raises(ConfigError, match="adapts no linear layers; leave it out"):
        pr.adapt(MODELS["vit"].build(), pr.method("sema", start=-1), ["dense"])


def test_a_block_of_another_shape_is_refused():
    site = Site(path="layers.0", d_in=4, d_out=4, r=2, modules=("attention", "mixer"))
    with pytest.raises(ConfigError, match="has no norm before feed-forward layers that is known"):
        Expandable(site, r=2, q=2, window=3, scale=1.0, growing=True)
    assert len(set(PLACES)) == len(PLACES)


def test_t5_blocks_are_numbered_as_a_whole():
    method = pr.method("sema", r=2, q=3, window=4, start=0, end=0)
    config = MODELS["t5"].build().config
    model = pr.adapt(T5ForSequenceClassification(config), method)
    paths = [b.path.removeprefix("transformer.") for b in adapter_of(model).blocks]
    assert paths == ["encoder.block.0", "decoder.block.0"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_models_that_answer_word_by_word_are_refused(name):
    with pytest.raises(ConfigError, match=r"early words would be told of those to come; use a cl"):
        pr.adapt(MODELS[name].build(), pr.method("sema", r=2, q=3, window=4, start=-1))


def test_a_loop_without_tasks_is_refused(tmp_path):
    model = pr.adapt(MODELS["bert"].build(), pr.method("sema", r=2, q=3, window=4, start=-1))
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=1)
    trainer = pr.Trainer(model, arguments, train_dataset=[{"labels": 0}])
    words = "losses of sema: got a loop without tasks.*; use polyrank.run"
    with pytest.raises(ConfigError, match=words):
        trainer.train()
    with pytest.raises(ConfigError, match=words):
        pr.attach(pr.optimizer(model, 0.1), model)
    model.train()
    optimizer = pr.optimizer(model, 0.1)
    batch = MODELS["bert"].inputs()
    model(**batch).logits.square().sum().backward()
    optimizer.step()
    with pytest.raises(InertError, match="what 'sema' does at every update did not run"):
        model(**batch)


def test_hidden_states_without_samples_are_refused():
    flat = torch.zeros(20, D)
    with pytest.raises(ConfigError, match=r"shape \(20, 6\), expected \(batch, tokens, d\)"):
        branch()(lambda x: x, flat, flat, Flow())


def test_a_block_grows_once_a_task_and_within_its_range():
    with pytest.raises(ConfigError, match="got an adapter that trains"):
        branch().expand(keyed("again"))
    outside = branch(live=False, growing=False)
    assert outside.held_router is None
    assert outside.held_descriptor is None
    with pytest.raises(ConfigError, match="got no range"):
        outside.expand(keyed("again"))


def test_a_look_before_the_first_task_is_finished_or_without_rows_is_refused():
    floor = Floor(1, 3, [[[0.0]] * 3])
    floor.blocks = [branch()]
    with pytest.raises(ConfigError, match="follows one that was not finished"):
        looks(floor, "batch")
    few = Floor(1, 0, [[]])
    with pytest.raises(ConfigError, match=r"got 0 rows, expected at least one batch of 4"):
        looks(few, "batch")
    words = Floor(1, 3, [[[0.0]] * 3])
    words.head = None
    with pytest.raises(ConfigError, match="whose answers are words"):
        looks(words, "batch")


def test_the_last_batch_counts_if_it_is_whole_or_large_enough():
    def rows(least, count=6):
        detect = Detect(1.0, 4, least, signed=False, ordered=False)
        floor = Floor(1, 0, [])
        floor.data = lambda role, seed, size: iter(torch.zeros(count).split(size))
        batches = iter([{"labels": part} for part in floor.data("train", 0, 4)])
        floor.data = lambda role, seed, size: batches
        state, seen = {"pass": 0, "batch": 0}, 0
        while detect._batch(floor, state) is not None:
            state["batch"] += 1
            seen += 1
        return seen

    assert [rows(0), rows(3), rows(2)] == [1, 1, 2]


def test_merging_and_strategies_that_mix_tasks_are_refused():
    model = pr.adapt(MODELS["vit"].build(), pr.method("sema", r=2, q=3, window=4, start=-1))
    with pytest.raises(MergeError, match="keep the adapter unmerged"):
        model.merge_and_unload()
    sema = pr.method("sema")
    assert combination_problems(sema, [pr.method("sequential")]) == []
    for name, words in (
        ("replay", "mixes rows of earlier tasks among them"),
        ("masked", "sema, masked all decide the task loss"),
        ("ewc", "needs factors that keep their meaning"),
        ("lwf", "keeps a replica of the model, and the blocks of sema cannot be kept twice"),
        ("featkd", "use a strategy without a teacher or an average"),
    ):
        assert any(words in p for p in combination_problems(sema, [pr.method(name)])), name


def test_without_statistics_it_answers_and_does_not_go_on(tmp_path):
    tiny = MODELS["vit"]
    model = pr.adapt(
        tiny.build(), pr.method("sema", r=2, q=3, window=4, start=-1),
        head={"module": "classifier", "names": ["a", "b"]},
    ).eval()  # fmt: skip
    with reshaped(model) as blocks:
        for block in blocks:
            block.freeze()
    with reshaped(model) as blocks:
        blocks[1].expand(keyed("new"))
        blocks[1].adapter.up.data.fill_(0.3)
    with reshaped(model) as blocks:
        blocks[1].freeze()
    floor = Floor(1, 3, [])
    floor.saved = lambda: pr.layers.saved_of(model)
    (kept,) = Expand("sema", None, None, 0).exports(floor).values()
    write_saved(kept, tmp_path / "answers")
    again = pr.load(tiny.build(), tmp_path / "answers").eval()
    x = tiny.inputs(0)["pixel_values"]
    assert torch.equal(again(pixel_values=x).logits, model(pixel_values=x).logits)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (again, model)]
    windows = 2 * (4 + 1)
    assert sizes[1] - sizes[0] == 2 * (2 * 24 * 3 + 3 + 24) + windows
    floor.blocks = [b for b in adapter_of(again).blocks if b.growing]
    with pytest.raises(CheckpointError, match="load the whole adapter to go on"):
        looks(floor, "batch")


def test_figures_tell_adapters_and_scores_by_block_and_task():
    floor = Floor(2, 3, [[[0.0, 1.5]] * 3] * 3)
    floor.first = True
    found, _ = looks(floor, "batch")
    assert found == ["func", "rd"]
    floor.first = False
    assert looks(floor, "batch")[0] == [1, "func", "rd"]
    adapters, scores = Expand("sema", Detect(1.0, 4, 0, signed=False, ordered=False), None, 0
                              ).figures(floor, None)  # fmt: skip
    assert adapters.values == ((2.0, 2.0), (2.0, 3.0))
    assert "5 in the end" in adapters.note
    assert scores.values[1][1] == 1.5
    assert math.isnan(scores.values[0][0])
    growth = [sum(column) for column in zip(*adapters.values, strict=True)]
    assert all(a <= b for a, b in pairwise(growth))
