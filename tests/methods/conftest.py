"""A tiny classifier with a growing head, and the engine's services on it, for continual methods."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import polyrank as pr
from polyrank.frame import ROLES, Out, Step, get, keyed
from polyrank.layers import absorb, append, extend, grow_head, redraw, replica, saved_of, view

D_IN, WIDTH, PER_TASK = 6, 10, 2


class Net(nn.Module):
    """Two adapted layers behind non-linearities, and a classifier."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(D_IN, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.classifier = nn.Linear(WIDTH, 3)

    def features(self, x):
        return self.second(self.first(x).tanh()).tanh()

    def forward(self, x):
        return self.classifier(self.features(x))


class Store:
    """Rows by task, drawn by key; the whole of them is kept."""

    def __init__(self):
        self.rows, self.keys = {}, []

    def __len__(self):
        return sum(len(batch["labels"]) for batch in self.rows.values())

    def tasks(self):
        return sorted(self.rows)

    def draw(self, count, *key, task=None):
        self.keys.append((*key, task))
        wanted = self.tasks() if task is None else [task]
        parts = [self.rows[k] for k in wanted]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        order = torch.randperm(len(whole["labels"]), generator=keyed("store", *key))[:count]
        return {name: value[order] for name, value in whole.items()}


class Bench:
    """One run in small: a model, tasks of two classes each, and the services of an engine."""

    def __init__(self, method="lora", dtype=torch.float64, heads=True, net=Net, **options):
        torch.manual_seed(5)
        # What trains weights themselves knows no ranks.
        sized = {"r": 3} if get(method).sized else {}
        made = pr.method(method, **{**sized, **options})
        place = {"head": "classifier"} if heads else {}
        self.model = pr.adapt(net(), made, ["first", "second"], seed=1, **place).to(dtype)
        self.dtype, self.method = dtype, made
        self.task, self.first, self.known, self.classes = -1, True, 0, ()
        self.memories, self.replay, self.asked = {}, Store(), []
        self.batches, self.size = None, 5

    @property
    def adapter(self):
        return pr.adapter_of(self.model)

    def begin(self, task, *boundaries, classes=PER_TASK):
        """Grow the head and start strategies, then the method, as the engine does."""
        self.task, self.first = task, task == 0
        self.known = task * classes
        self.classes = tuple(range(self.known, self.known + classes))
        grow_head(self.model, [f"class {c}" for c in self.classes], seed=2)
        self.model.to(self.dtype)
        self.states = [{} for _ in (*boundaries, None)]
        self.boundaries = [*boundaries, self.method.boundary()]
        for boundary, state in zip(self.boundaries, self.states, strict=True):
            boundary.start(None, self, state)

    def end(self):
        """Run the strategies' jobs, then finish all."""
        for boundary, state in list(zip(self.boundaries, self.states, strict=True))[:-1]:
            while (job := boundary.next(None, self, state)) is not None:
                while not job.step(self, state):
                    pass
        for boundary, state in zip(self.boundaries, self.states, strict=True):
            boundary.finish(None, self, state)

    def rows(self, count=8, seed=0, task=None, classes=None):
        """Return labelled rows of a task; what is asked for by number is always the same."""
        rng = keyed("rows", self.task if task is None else task, seed)
        classes = torch.tensor(classes or self.classes)
        labels = classes[torch.randint(len(classes), (count,), generator=rng)]
        x = torch.randn(count, D_IN, generator=rng, dtype=self.dtype)
        role = torch.full((count,), ROLES["train"])
        return {"x": x, "labels": labels, "row": torch.arange(count) + 100 * seed, "role": role}

    def nudge(self, scale=0.3, seed=0):
        """Move everything that trains away from its start."""
        rng = keyed("nudge", seed)
        with torch.no_grad():
            for p in self.adapter.named().values():
                p.add_(scale * torch.randn(p.shape, generator=rng, dtype=p.dtype))

    def out(self, batch, teacher=None):
        """Return what a forward leaves, with a teacher's part if one is named."""
        net = self.model.get_base_model()
        hidden = net.features(batch["x"])
        found = Out(
            logits=net.classifier(hidden), embedding=hidden, hidden=[batch["x"], hidden[:, None]]
        )
        if teacher is not None:
            with torch.no_grad(), view(self.model, teacher):
                found.teacher = self.out(batch)
        return found

    def steps(self, strategies=(), count=4, lr=0.05, rows=8, losses=(), accumulation=1):
        """Train for some updates on the task's rows; returns the losses."""
        optimizer = torch.optim.AdamW(pr.parameter_groups(self.model, lr=lr, weight_decay=0.01))
        attached = pr.attach(
            optimizer, self.model, strategies=strategies, total=count, accumulation=accumulation,
            task=self.task, workshop=self, evaluated=True,
        )  # fmt: skip
        self.model.train()
        found = []
        for index in range(count):
            # `out` passes by the model's root, whose forward would begin the update.
            attached.begin()
            whole = self.rows(rows, seed=index)
            for part in torch.arange(rows).chunk(accumulation):
                batch = {name: value[part] for name, value in whole.items()}
                out = self.out(batch)
                loss = F.cross_entropy(out.logits, batch["labels"], reduction="sum") / rows
                loss.backward()
            found.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
        attached.detach()
        self.model.eval()
        return found

    def weights(self):
        return {name: p.detach().clone() for name, p in self.adapter.named().items()}

    # What follows are the services of the engine.

    def memory(self, name):
        return self.memories.setdefault(name, {})

    def data(self, role, split="train", *, seed=None):
        if self.batches is not None:
            return iter(self.batches)
        whole = self.rows(12)
        order = torch.arange(12) if seed is None else torch.randperm(12, generator=keyed(seed))
        return iter([{k: v[i] for k, v in whole.items()} for i in order.split(self.size)])

    def grads(self, batch, params):
        self.asked.append(len(batch["labels"]))
        loss = F.cross_entropy(self.model(batch["x"]), batch["labels"])
        found = torch.autograd.grad(loss, list(params), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]

    @torch.no_grad()
    def logits(self, batch):
        return self.model(batch["x"])

    def absorb(self, *, lossy=False, archive=False, ranks=None):
        absorb(self.model, lossy=lossy, archive=archive, ranks=ranks, seed=self.task)
        self.model.to(self.dtype)

    @torch.no_grad()
    def observe(self, batches, at, wants, fn):
        assert at == "linear"
        handles = [
            layer.module.base_layer.register_forward_hook(
                lambda _, args, out, path=layer.site.path: fn(
                    path, {"input": args[0], "output": out}
                )
            )
            for layer in self.adapter.layers
        ]
        for batch in batches:
            self.model(batch["x"])
        for handle in handles:
            handle.remove()
        return {}

    def append(self, name, r=None):
        append(self.model, r, seed=1)
        self.model.to(self.dtype)

    def redraw(self):
        redraw(self.model, seed=1)

    def saved(self):
        return saved_of(self.model)

    def replica(self, name):
        replica(self.model, name)

    def extend(self, name):
        extend(self.model, name)

    def view(self, name):
        return view(self.model, name)

    def rng(self, name):
        return keyed("bench", self.task, name)


@pytest.fixture
def bench():
    """Makes a bench."""
    return Bench


@pytest.fixture
def step():
    return Step(index=0, total=4, lr=0.1, peak=0.1, task=1)
