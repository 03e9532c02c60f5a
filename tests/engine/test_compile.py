"""torch.compile of an adapted model: the same training, one graph, and no rule forgotten."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import polyrank as pr
from polyrank.frame import keyed
from polyrank.testing import assert_close

# torch's compiler makes an instance of every autograd.Function, against its own warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

METHODS = {"smora": {}, "smora-dropout": {"dropout": 0.3}}


class Net(nn.Module):
    """Two layers over (batch, seq, 6): as much as a compiler needs to see, in little time."""

    def __init__(self, recompute=False):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)
        self.recompute = recompute

    def forward(self, x, attention_mask=None, labels=None):
        h = checkpoint(self.first, x, use_reentrant=False) if self.recompute else self.first(x)
        logits = self.second(h.tanh())
        kept = labels.masked_fill(attention_mask == 0, -100)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), kept.flatten())
        return {"loss": loss, "logits": logits}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def adapted(method, recompute=False):
    torch.manual_seed(0)
    made = pr.method("smora", r=8, k=2, balance=0.01, **METHODS[method])
    return pr.adapt(Net(recompute), made, ["first", "second"], seed=3)


def rows(count):
    rng = keyed("net", count)
    found = []
    for index in range(count):
        mask = (torch.arange(7) < 7 - index % 3).long()
        found.append(
            {
                "x": torch.randn(7, 6, generator=rng),
                "attention_mask": mask,
                "labels": torch.randint(5, (7,), generator=rng),
            }
        )
    return found


def train(model, batches, backend=None, *, accumulation=2, fullgraph=True):
    optimizer = torch.optim.AdamW(pr.parameter_groups(model, 1e-2))
    attachment = pr.attach(optimizer, model, accumulation=accumulation, seed=5)
    model.train()
    call = torch.compile(model, backend=backend, fullgraph=fullgraph) if backend else model
    losses = []
    for index, batch in enumerate(batches):
        attachment.begin()
        loss = call(**batch)["loss"]
        loss.backward()
        losses.append(float(loss.detach()))
        if (index + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    attachment.detach()
    return losses


def compare(tools, models, losses):
    assert_close(losses[1], losses[0], dtype=torch.float32)
    assert len(set(losses[0])) == len(losses[0])
    one, two = (tools.biases(model) for model in models)
    assert torch.equal(one, two)
    assert one.abs().max() > 0


def test_compiled_training_equals_eager_in_one_whole_graph(tools):
    models, batches = [adapted("smora-dropout") for _ in range(2)], tools.chunks(rows(24), 2)
    losses = [train(models[0], batches), train(models[1], batches, "aot_eager")]
    # The first count of an update makes the tensor that the next ones add to: two graphs.
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]
    compare(tools, models, losses)


def test_a_compiled_llama_trains_like_an_eager_one(tools):
    targets = ["q_proj", "down_proj"]
    models = [tools.adapted("smora", targets=targets, balance=0.01) for _ in range(2)]
    batches = [{**batch, "use_cache": False} for batch in tools.chunks(tools.rows(8), 2)]
    losses = [
        train(model, batches, backend, accumulation=1)
        for model, backend in zip(models, (None, "eager"), strict=True)
    ]
    assert counters["stats"]["unique_graphs"] == 1
    compare(tools, models, losses)


def test_rules_that_are_forgotten_are_noticed_in_compiled_code(tools):
    model = adapted("smora").train()
    optimizer = torch.optim.AdamW(pr.parameter_groups(model, 1e-2), fused=True)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch = tools.stack(rows(2))
    for _ in range(2):
        call(**batch)["loss"].backward()
    optimizer.step()
    with pytest.raises(pr.InertError, match=r"polyrank\.attach"):
        call(**batch)


def test_a_rule_that_begins_asks_for_its_call_where_the_forward_is_compiled(tools):
    model = adapted("smora").train()
    optimizer = torch.optim.AdamW(pr.parameter_groups(model, 1e-2))
    rule = tools.Recorder()
    attachment = pr.attach(optimizer, model, strategies=[tools.toy(rule)])
    call = torch.compile(model, backend="eager", fullgraph=True)
    batch = tools.stack(rows(2))
    call(**batch)["loss"].backward()
    with pytest.raises(pr.InertError, match=r"call begin\(\)"):
        optimizer.step()
    attachment.begin()
    call(**batch)["loss"].backward()
    optimizer.step()
    assert rule.calls == [("begin", 0), ("grads", 0), ("after", 0)]


def test_trainer_begins_updates_of_a_compiled_model(tools, tmp_path):
    results = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        rule = tools.Recorder()
        model = adapted("smora-dropout")
        arguments = tools.arguments(tmp_path, gradient_accumulation_steps=2, **options)
        trainer = pr.Trainer(model, arguments, train_dataset=rows(8))
        trainer.strategies = (tools.toy(rule),)
        trainer.train()
        results.append((tools.losses(trainer), rule.calls, tools.biases(model)))
    assert counters["stats"]["unique_graphs"] > 0
    assert_close(results[1][0], results[0][0], dtype=torch.float32)
    assert results[1][1] == results[0][1]
    assert len(results[0][1]) == 6
    assert torch.equal(results[1][2], results[0][2])


# Where a graph breaks, torch's compiler looks at the gradient of every tensor that passes.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_and_recomputed_layers_count_once(tools):
    # Counting is a side effect, which the compiler leaves out of a checkpoint: the graph breaks.
    models = [adapted("smora-dropout", recompute) for recompute in (False, True)]
    batches = tools.chunks(rows(8), 2)
    losses = [
        train(models[0], batches),
        train(models[1], batches, "aot_eager", fullgraph=False),
    ]
    compare(tools, models, losses)
