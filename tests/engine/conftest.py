"""Tiny models, equal batches, loops and toy rules for the tests of the engine."""

from dataclasses import dataclass, field, fields

import pytest
import torch

import polyrank as pr
from polyrank.frame import ORDER, Penalty, Rule, keyed
from polyrank.testing import MODELS

VOCABULARY, SEED = 32, 3
SAMPLING = "train_sampling_strategy"


def in_order(trainer):
    """Teach the option of a later transformers to an earlier one."""
    given = trainer._get_train_sampler
    if getattr(given, "taught", False):
        return

    def sampler(self, dataset=None):
        if getattr(self.args, SAMPLING, "") == "sequential":
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)
        return given(self, dataset)

    sampler.taught = True
    trainer._get_train_sampler = sampler


class Recorder(Rule):
    """Writes down what it is told and what the gradients were."""

    order = ORDER["constrain"]

    def __init__(self, name="recorder"):
        self.calls, self.norms, self.label = [], [], name
        self.drops = False

    @property
    def name(self):
        return self.label

    def bind(self, adapter, optimizer, workshop):
        self.adapter, self.optimizer = adapter, optimizer

    def begin(self, step):
        self.calls.append(("begin", step.index))

    def grads(self, step):
        self.calls.append(("grads", step.index))
        grads = [p.grad for p in self.adapter.trained()]
        self.norms.append(float(torch.nn.utils.get_total_norm(grads)))
        if self.drops:
            for grad in grads:
                grad.zero_()

    def after(self, step):
        self.calls.append(("after", step.index))
        self.last = step

    def state(self):
        return {"calls": len(self.calls), "norms": torch.tensor(self.norms)}

    def restore(self, state):
        self.restored = dict(state)


class SumOfB(Penalty):
    """λ Σ B: its gradient is λ everywhere, so it can be counted."""

    def __init__(self, weight):
        self.weight, self.times = weight, 0

    def __call__(self, adapter, step):
        self.times += 1
        return sum(layer.B.sum() for layer in adapter.layers)


@dataclass(frozen=True, kw_only=True)
class Toy(pr.Strategy):
    """Brings given rules and penalties to any method."""

    held: tuple = ()
    terms: tuple = ()

    def rules(self):
        return list(self.held)

    def penalties(self):
        return list(self.terms)


@dataclass
class Tools:
    """What the tests share, reached through the fixture `tools`."""

    Recorder: type = Recorder
    SumOfB: type = SumOfB
    models: list = field(default_factory=list)

    def toy(self, *rules, penalties=()):
        return Toy(held=rules, terms=tuple(penalties))

    def adapted(
        self,
        name="smora",
        dtype=torch.float32,
        family="llama",
        targets="all-linear",
        **options,
    ):
        options = {"r": 8, "k": 2, **options} if name == "smora" else {"r": 4, **options}
        model = pr.adapt(
            MODELS[family].build(dtype), pr.method(name, **options), targets, seed=SEED
        )
        self.models.append(model)
        return model

    def checkpointing(self, model, reentrant):
        """Recompute every block in backward; transformers renamed the call in 5.2x."""
        model.enable_input_require_grads()
        for name in ("activation", "gradient"):
            if hasattr(model.get_base_model(), f"{name}_checkpointing_enable"):
                enable = getattr(model.get_base_model(), f"{name}_checkpointing_enable")
                enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}})
                return
        raise AssertionError("this model cannot checkpoint")

    def rows(self, count, tokens=9, seed=0):
        """Return right-padded rows of different lengths."""
        rng = keyed("rows", seed)
        found = []
        for _ in range(count):
            ids = torch.randint(3, VOCABULARY, (tokens,), generator=rng)
            length = int(torch.randint(tokens // 2, tokens + 1, (1,), generator=rng))
            mask = (torch.arange(tokens) < length).long()
            labels = ids.masked_fill(mask == 0, -100)
            # Nothing predicts the first token, but some versions of Trainer count its label.
            labels[0] = -100
            found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
        return found

    def stack(self, rows):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def chunks(self, rows, size):
        return [self.stack(rows[i : i + size]) for i in range(0, len(rows), size)]

    def step(self, model, batches):
        """One accumulated forward and backward, the loss summed over tokens of all batches."""
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = torch.zeros(())
        for batch in batches:
            loss = model(**batch, num_items_in_batch=torch.tensor(count)).loss
            loss.backward()
            total += loss.detach()
        return float(total)

    def loop(self, model, rows, *, size=2, accumulation=1, lr=1e-2, decay=0.0, clip=0.0, **options):
        """A plain loop; returns (losses, attachment)."""
        optimizer = torch.optim.AdamW(pr.parameter_groups(model, lr, decay), fused=True)
        attachment = pr.attach(optimizer, model, accumulation=accumulation, **options)
        model.train()
        losses, batches = [], self.chunks(rows, size)
        for i in range(0, len(batches), accumulation):
            losses.append(self.step(model, batches[i : i + accumulation]))
            attachment.before_clip()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        attachment.detach()
        return losses, attachment

    def arguments(self, folder, kind=None, **options):
        from transformers import Trainer, TrainingArguments

        known = {field.name for field in fields(TrainingArguments)}
        options = {
            **{
                "output_dir": str(folder),
                "per_device_train_batch_size": 2,
                "num_train_epochs": 1,
                "learning_rate": 1e-2,
                "lr_scheduler_type": "constant",
                "max_grad_norm": 0.0,
                "logging_steps": 1,
                "train_sampling_strategy": "sequential",
                "use_cpu": True,
                "bf16": False,
                "save_strategy": "no",
                "report_to": [],
                "disable_tqdm": True,
            },
            **options,
        }
        found = (kind or TrainingArguments)(
            **{key: value for key, value in options.items() if key != SAMPLING or key in known}
        )
        if SAMPLING not in known:
            found.train_sampling_strategy = options[SAMPLING]
            in_order(Trainer)
        return found

    def losses(self, trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def trained(self, model):
        """Adapter tensors by name, trained and kept ones alike."""
        return {
            name: value.detach().clone()
            for name, value in model.state_dict().items()
            if "polyrank_" in name
        }

    def biases(self, model):
        return torch.stack(
            [layer.core.balance_bias.detach().clone() for layer in pr.adapter_of(model).layers]
        )


@pytest.fixture
def tools():
    return Tools()
