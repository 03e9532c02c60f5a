"""What a fresh process rebuilds from the config, and the state machine of a task."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file

import polyrank as pr
from polyrank.errors import CheckpointError
from polyrank.frame import (
    Boundary,
    Flow,
    Job,
    Phase,
    Workshop,
    keyed,
)
from polyrank.layers import (
    adapter_of,
    append,
    compact,
    grow_head,
    initialise,
    keep,
    replica,
    reshaped,
)
from polyrank.testing import MODELS, Case, assert_close

pytestmark = pytest.mark.usefixtures("toys")
TOYS = Path(__file__).parent / "toys"


def case(name, model="llama", **options):
    return Case(pr.method(name, **options), 0, MODELS[model])


def trained(case, steps=2, **config):
    model = case.build(**config)
    case.train(model, steps=steps)
    return model


def layers_of(model):
    return adapter_of(model).layers


# --- phases and jobs ------------------------------------------------------------------------------


class Detect(Boundary):
    """Looks at batches until it saw three, trains the side, then all, then looks at what it did."""

    persistent = False

    def start(self, task, workshop, state):
        state.update(seen=0, done=[], total=0.0)

    def next(self, task, workshop, state):
        if state["seen"] < 3:
            return Job(name="detect", step=self.look)
        for phase in (Phase(name="side", train=frozenset({"side"})), Phase(name="all")):
            if phase.name not in state["done"]:
                state["done"].append(phase.name)
                return phase
        return None

    def look(self, workshop, state):
        state["total"] += float(next(iter(workshop.data("train", seed=state["seen"])))["x"])
        state["seen"] += 1
        return state["seen"] == 3

    def check(self, metrics, state):
        return "stop" if metrics["loss"] < 0.1 else "go"

    def finish(self, task, workshop, state):
        state["finished"] = True


class Bench(Workshop):
    """As much of a workshop as the toy needs."""

    def data(self, role, split="train", *, seed=None):
        yield {"x": torch.rand((), generator=keyed(role, split, seed or 0))}


def drive(boundary, workshop, state, log, *, killed_after=math.inf):
    """What an engine does; `killed_after` calls it dies, with the state as saved last."""
    calls = 0
    if "seen" not in state:
        boundary.start(None, workshop, state)
    while (work := boundary.next(None, workshop, state)) is not None:
        if isinstance(work, Phase):
            log.append(work.name)
            continue
        done = False
        while not done:
            done = work.step(workshop, state)
            state = json.loads(json.dumps(state))
            calls += 1
            if calls == killed_after:
                return state
        log.append(work.name)
    boundary.finish(None, workshop, state)
    return state


def test_a_killed_task_finds_its_way_back_from_its_state_alone():
    whole_log, broken_log = [], []
    whole = drive(Detect(), Bench(), {}, whole_log)
    assert whole_log == ["detect", "side", "all"]
    broken = drive(Detect(), Bench(), {}, broken_log, killed_after=2)
    assert broken["seen"] == 2
    resumed = drive(Detect(), Bench(), json.loads(json.dumps(broken)), broken_log)
    assert broken_log == whole_log
    assert resumed == whole
    assert whole["finished"]


def test_a_boundary_says_when_a_phase_is_good_enough_and_what_is_evaluated():
    boundary = Detect()
    assert boundary.check({"loss": 0.05}, {}) == "stop"
    assert boundary.check({"loss": 0.5}, {}) == "go"
    assert list(boundary.deploys(Bench())) == [""]
    assert not boundary.persistent
    assert Boundary.persistent


def test_the_plain_boundary_is_one_phase():
    boundary, state = Boundary(), {}
    boundary.start(None, Bench(), state)
    first = boundary.next(None, Bench(), state)
    assert (first.name, first.train, first.keep) == ("train", None, "last")
    assert boundary.next(None, Bench(), json.loads(json.dumps(state))) is None


def test_a_phase_trains_its_roles_only():
    toy = case("sided")
    model = toy.build()
    adapter_of(model).train_only(frozenset({"side"}))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all("polyrank_side" in n and "probe" not in n for n in names)
    adapter_of(model).train_only(None)
    assert any("polyrank_A" in n for n, p in model.named_parameters() if p.requires_grad)


# --- what a fresh process rebuilds ----------------------------------------------------------------

READER = """
import json, sys, warnings
from pathlib import Path
import torch
from safetensors.torch import load_file
import polyrank
from peft import PeftModel
from polyrank.testing import MODELS, Case, assert_close

torch.set_num_threads(1)
root, toys = Path(sys.argv[1]), Path(sys.argv[2])
for file in sorted(toys.glob("*.py")):
    polyrank.load_method_file(file)
for folder in sorted(root.iterdir()):
    name, model = folder.name.split("-")
    tiny = MODELS[model]
    case = Case(polyrank.method("lora"), 0, tiny)
    loaded = PeftModel.from_pretrained(tiny.build(), str(folder)).eval()
    wanted = load_file(folder / "answers")
    found = {"": case.answer(loaded)}
    if "slow" in wanted:
        with polyrank.view(loaded, "slow"):
            found["slow"] = case.answer(loaded)
    same = all(torch.equal(found[key.removeprefix("live")], wanted[key]) for key in wanted)
    print(folder.name, same)
"""


def bank():
    lora = case("lora", r=3)
    model = trained(lora)
    replica(model, "slow")
    append(model, 2)
    lora.train(model)
    append(model, 1)
    lora.train(model)
    return lora, model


def compacted():
    mora = case("mora", r=3, tau=0.2)
    model = trained(mora)
    append(model, 2)
    mora.train(model)
    append(model, 3)
    mora.train(model)
    with torch.no_grad():
        layers_of(model)[0].bank[1][:, 1] = 0
    assert compact(model)[0].silent == 1
    return mora, model


def pruned():
    toy = case("scaled", r=4)
    model = trained(toy)
    for index, layer in enumerate(layers_of(model)):
        keep(model, layer, torch.arange(1 + index % 3))
    toy.train(model)
    return toy, model


def shadow():
    toy = case("shadowed", delta="matrix")
    return toy, trained(toy)


HEAD = {"module": "classifier", "names": ["a", "b"]}


def head():
    smora = case("smora", "vit", r=4, k=2)
    model = trained(smora, head=dict(HEAD))
    grow_head(model, ["c"])
    smora.train(model)
    return smora, model


def grown():
    """A start from data, in a bank, and another one behind it."""
    toy = case("olora", r=1, init_by="lora-ga")
    model = trained(toy)
    append(model)
    initialise(model, [toy.tiny.inputs(5)], key="next")
    toy.train(model)
    return toy, model


def squared():
    """Square cores, one of them of fewer ranks."""
    toy = case("lora-sb", r=3, rows=4)
    model = trained(toy)
    keep(model, layers_of(model)[0], torch.tensor([2, 0]))
    toy.train(model)
    return toy, model


def block():
    toy = case("sided", first=1)
    return toy, trained(toy)


def regrown():
    """Blocks that gained parts, each as many as it says."""
    toy = case("growing", pair=True)
    model = trained(toy)
    for index, width in ((1, 4), (0, 2), (1, 1)):
        with reshaped(model) as blocks:
            [block for block in blocks if hasattr(block, "widths")][index].grow(width)
        toy.train(model, steps=1)
    return toy, model


def test_a_fresh_process_rebuilds_every_shape_from_the_config(tmp_path, toys):
    wanted = []
    for make in (bank, compacted, pruned, shadow, grown, squared, head, block, regrown):
        toy, model = make()
        folder = tmp_path / "saved" / f"{make.__name__}-{toy.tiny.name}"
        model.save_pretrained(folder)
        answers = {"live": toy.answer(model)}
        if any("polyrank_replica" in n for n, _ in model.named_parameters()):
            with pr.view(model, "slow"):
                answers["slow"] = toy.answer(model)
        save_file({k: v.contiguous() for k, v in answers.items()}, folder / "answers")
        wanted.append(f"{folder.name} True")
    done = subprocess.run(
        [sys.executable, "-c", READER, tmp_path / "saved", TOYS],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == sorted(wanted)


@pytest.mark.parametrize("low", [False, True], ids=["filled", "meta"])
def test_structure_loads_from_the_config_here_too(low, tmp_path):
    for make in (bank, pruned, shadow, grown, squared):
        toy, model = make()
        folder = tmp_path / make.__name__
        model.save_pretrained(folder)
        answer = toy.answer(model)
        again = PeftModel.from_pretrained(toy.tiny.build(), str(folder), low_cpu_mem_usage=low)
        assert not any(p.is_meta for p in again.parameters())
        held = dict(again.named_parameters())
        for key, value in model.named_parameters():
            assert torch.equal(held[key], value), key
        # A file's tensors need not be aligned, and products then round in another order.
        assert_close(toy.answer(again.eval()), answer)
        notes = json.loads((folder / "adapter_config.json").read_text())["sites"]
        assert len(notes) == len(layers_of(model))


def test_a_config_that_forgets_the_bank_is_refused_before_anything_is_copied(tmp_path):
    _, model = bank()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    about = json.loads(file.read_text())
    about["sites"] = {}
    file.write_text(json.dumps(about))
    assert any(
        "polyrank_bank" in key for key in read_tensors(tmp_path / "adapter_model.safetensors")
    )
    with pytest.raises(CheckpointError, match=r"polyrank_bank\S+ is not in the config"):
        PeftModel.from_pretrained(MODELS["llama"].build(), str(tmp_path))


def test_a_flow_knows_that_it_is_plain():
    flow = Flow()
    with flow.put(view="slow"):
        assert not flow.plain
    assert flow.plain
