"""Trains one model by both roads; test_training.py starts it once per rank."""

import json
import os
import sys
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

import polyrank as pr
from polyrank.engine.phase import Training, run_phase
from polyrank.engine.reading import ImageReader
from polyrank.engine.settings import Settings
from polyrank.engine.workshop import TaskWorkshop
from polyrank.frame import Phase
from polyrank.layers import grow_head
from polyrank.testing.streams import few_digits, tiny_vit

ROWS, UPDATES, ACCUMULATION, SIZE = 160, 20, 2, 4


def tools():
    path = Path(__file__).parents[1] / "engine/conftest.py"
    spec = spec_from_file_location("engine_tools", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Tools()


METHODS = {"smora": {"balance": 0.01}, "dylora": {"mode": "frozen"}, "mora": {"k": 3, "tau": 0.3}}


def adapted(helper, name="smora"):
    model = helper.adapted(name, dtype=torch.float64, **METHODS[name]).double()
    recorder = helper.Recorder()
    return model, recorder, helper.toy(recorder, penalties=[helper.SumOfB(0.01)])


def attached(helper, rank, world, name="smora"):
    """A plain loop, wrapped for data parallelism if there are two ranks."""
    model, recorder, strategy = adapted(helper, name)
    core, drawn = pr.adapter_of(model).layers[0].core, []
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = pr.optimizer(wrapped, 1e-2, 0.1)
    attachment = pr.attach(optimizer, wrapped, strategies=[strategy], accumulation=ACCUMULATION)
    wrapped.train()
    losses, batches = [], helper.chunks(helper.rows(ROWS), SIZE)
    part = slice(rank * SIZE // world, (rank + 1) * SIZE // world)
    for update in range(UPDATES):
        micro = batches[update * ACCUMULATION : (update + 1) * ACCUMULATION]
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro)
        total = 0.0
        for index, batch in enumerate(micro):
            own = {key: value[part] for key, value in batch.items()}
            last = index == ACCUMULATION - 1 or world == 1
            with nullcontext() if last else wrapped.no_sync():
                items = torch.tensor(count / world)
                loss = wrapped(**own, num_items_in_batch=items).loss
                loss.backward()
            total += float(loss.detach())
        drawn.append(int(getattr(core, "drawn", 0)))
        losses.append(total)
        attachment.before_clip()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    attachment.detach()
    facts = {"losses": losses, "calls": recorder.calls, "norms": recorder.norms, "drawn": drawn}
    return model, facts


def disagreeing(helper, rank):
    """Give every process a seed of its own; return how that ends."""
    model, _, _ = adapted(helper, "dylora")
    attachment = pr.attach(pr.optimizer(model, 1e-2), model, seed=rank)
    try:
        attachment.begin()
    except pr.PolyrankError as error:
        return str(error)
    finally:
        attachment.detach()
    return ""


def trained(helper, folder, world):
    """`polyrank.Trainer`, which finds out about the other rank by itself."""
    model, recorder, strategy = adapted(helper)
    arguments = helper.arguments(
        folder / "out",
        per_device_train_batch_size=SIZE // world,
        gradient_accumulation_steps=ACCUMULATION,
        weight_decay=0.1,
        max_grad_norm=1.0,
        **({"ddp_backend": "gloo"} if world > 1 else {}),
    )
    trainer = pr.Trainer(model, arguments, train_dataset=helper.rows(ROWS))
    trainer.strategies = (strategy,)
    trainer.train()
    assert trainer.args.world_size == world
    facts = {"losses": helper.losses(trainer), "calls": recorder.calls, "norms": recorder.norms}
    return model, facts


def phased(helper, rank, world):
    """One phase of the engine, whose order and counts span all processes."""
    stream = few_digits(rows=ROWS, tasks=2)
    method = pr.method("smora", r=4, k=2, balance=0.01)
    model = pr.adapt(tiny_vit().double(), method, head="classifier", seed=3).double()
    grow_head(model, stream[0].labels, seed=3)
    model.double()
    parts = [stream[0].data["train"].take(range(ROWS))]
    run_phase(training(model, method, parts, world), Phase(steps=UPDATES))
    return model, {"losses": [], "calls": [], "norms": [0.0]}


def grown(helper, rank, world):
    """Two tasks of blocks that grow: losses beside the model's output, statistics, and looks."""
    stream = few_digits(rows=32, tasks=2)
    options = {"r": 2, "q": 3, "window": 20, "detect_batch": 8, "start": -2, "tau": 0.2}
    method = pr.method("sema", **options)
    model = pr.adapt(tiny_vit().double(), method, head="classifier", seed=3).double()
    found, known = [], 0
    for number, task in enumerate(stream):
        grow_head(model, task.labels, seed=3)
        parts = [task.data["train"]]
        run = training(model.double(), method, parts, world, number, task.classes, known)
        boundary, state, known = method.boundary(), {}, known + len(task.classes)
        boundary.start(task, run.workshop, state)
        while (work := boundary.next(task, run.workshop, state)) is not None:
            if isinstance(work, Phase):
                run_phase(run, work)
                found.append(work.name)
            else:
                while not work.step(run.workshop, state):
                    pass
            # What is new to a block comes in fp32.
            model.double()
        boundary.finish(task, run.workshop, state)
    found += run.workshop.memory("sema")["adapters"]
    return model, {"losses": [], "calls": found, "norms": state["scores"]}


def training(model, method, parts, world, task=0, classes=(), known=0):
    workshop = TaskWorkshop(
        model, _Double(ImageReader()), {"train": parts}, seed=3, task=task, size=SIZE,
        classes=classes, known=known, first=not known,
    )  # fmt: skip
    return Training(
        model=model,
        reader=workshop.reader,
        method=method,
        strategies=(),
        settings=Settings(epochs=1, batch_size=SIZE // world, accumulation=ACCUMULATION, lr=1e-2),
        parts=parts,
        task=task,
        shown=task,
        seed=3,
        workshop=workshop,
        watch=lambda event, fields: None,
        where={"system": method.name, "task": "4-5"},
    )


class _Double(ImageReader):
    """Reads pixels in fp64."""

    def __init__(self, inner):
        super().__init__()

    def inputs(self, batch):
        return {"pixel_values": batch["pixel_values"].double()}


def main(folder, rank, world):
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    helper, facts = tools(), {}
    for road, (model, fact) in {
        "attach": attached(helper, rank, world),
        "nested": attached(helper, rank, world, "dylora"),
        "chosen": attached(helper, rank, world, "mora"),
        "trainer": trained(helper, folder, world),
        "phase": phased(helper, rank, world),
        "grown": grown(helper, rank, world),
    }.items():
        facts[road] = fact
        save_file(helper.trained(model), str(folder / f"{rank}-{road}.safetensors"))
    facts["nested"]["refused"] = disagreeing(helper, rank)
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
