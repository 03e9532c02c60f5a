"""The same result by another road: micro-batches, recomputation, processes."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import polyrank as pr
from polyrank.testing import assert_close

METHODS = {
    "smora": ("smora", {"balance": 0.01}),
    "smora-blocks": ("smora", {"k": 4, "block": 2, "gate": "softmax_topk", "balance": 0.01}),
    "lora+": ("lora", {"lr_ratio": 16.0}),
}
SCRIPT = Path(__file__).with_name("ranks.py")


def adapted(tools, method):
    name, options = METHODS[method]
    # In double precision the order of a sum cannot turn a choice of ranks.
    return tools.adapted(name, dtype=torch.float64, **options).double()


def compare(found, expected, dtype=torch.float64):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        if "balance_bias" in key:
            assert torch.equal(value, expected[key]), key
        else:
            assert_close(value, expected[key], dtype=dtype)


@pytest.mark.parametrize("method", METHODS)
def test_eight_micro_batches_of_one_row_equal_one_batch_of_eight(tools, method):
    rows = tools.rows(24)
    results = []
    for size, accumulation in ((8, 1), (1, 8), (2, 4)):
        model = adapted(tools, method)
        losses, _ = tools.loop(
            model,
            rows,
            size=size,
            accumulation=accumulation,
            decay=0.1,
            clip=1.0,
            strategies=[tools.toy(penalties=[tools.SumOfB(0.01)])],
        )
        results.append((losses, tools.trained(model)))
        assert len(losses) == 3
    want, weights = results[0]
    for losses, found in results[1:]:
        assert_close(losses, want, dtype=torch.float32)
        compare(found, weights)
    if "smora" in method:
        bias = tools.biases(model)
        assert ((bias / 0.01).round().abs() <= 3).all()
        assert bias.abs().max() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("method", METHODS)
def test_recomputation_changes_nothing(tools, method, reentrant, dropout):
    name, options = METHODS[method]
    results = []
    for recompute in (False, True):
        model = tools.adapted(name, dropout=dropout, **options)
        with torch.no_grad():
            for layer in pr.adapter_of(model).layers:
                # Beyond the start, where gradients of A and the router vanish.
                layer.B.copy_(torch.linspace(-1, 1, layer.B.numel()).view(layer.B.shape))
        if recompute:
            tools.checkpointing(model, reentrant)
        optimizer = torch.optim.SGD(pr.parameter_groups(model, 0.01))
        attachment = pr.attach(optimizer, model, accumulation=2)
        model.train()
        logits, counts = [], []
        for batch in tools.chunks(tools.rows(4), 2):
            out = model(**batch, use_cache=False)
            out.loss.backward()
            logits.append(out.logits.detach())
            found = [getattr(layer.core, "counts", None) for layer in pr.adapter_of(model).layers]
            counts.append([None if c is None else c.clone() for c in found])
        grads = [p.grad.clone() for p in pr.adapter_of(model).trained()]
        optimizer.step()
        attachment.detach()
        results.append((logits, grads, counts, tools.trained(model)))
    for one, two in zip(results[0][0] + results[0][1], results[1][0] + results[1][1], strict=True):
        assert torch.equal(one, two)
        assert one.abs().sum() > 0
    for one, two in zip(results[0][3].values(), results[1][3].values(), strict=True):
        assert torch.equal(one, two)
    for once, again in zip(results[0][2], results[1][2], strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(once, again, strict=True))
    if "smora" in method:
        tokens = [int(b["attention_mask"].sum()) for b in tools.chunks(tools.rows(4), 2)]
        k = pr.adapter_of(model).method.k
        assert all(int(c.sum()) == k * tokens[0] for c in results[1][2][0])
        assert all(int(c.sum()) == k * sum(tokens) for c in results[1][2][1])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(folder, world):
    """Run the script in `world` processes over gloo."""
    port, started = free_port(), []
    for rank in range(world):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, str(SCRIPT), str(folder)]
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    for process in started:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out.decode()[-4000:]


def written(folder, rank):
    facts = json.loads((folder / f"{rank}.json").read_text())
    return facts, {road: load_file(folder / f"{rank}-{road}.safetensors") for road in facts}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(facts, tensors by road) of each rank: of one process, this one, and of two."""
    spec = spec_from_file_location("ranks", SCRIPT)
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    alone, both = (tmp_path_factory.mktemp(name) for name in ("alone", "both"))
    script.main(alone, 0, 1)
    launch(both, 2)
    return {1: [written(alone, 0)], 2: [written(both, rank) for rank in range(2)]}


@pytest.mark.slow
@pytest.mark.parametrize("road", ["attach", "trainer", "phase", "nested", "chosen", "grown"])
def test_two_processes_equal_one_on_the_joined_batch(ranks, road):
    ((alone, weights),) = ranks[1]
    first, second = ranks[2]
    for facts, found in (first, second):
        compare(found[road], weights[road])
        assert_close(facts[road]["norms"], alone[road]["norms"])
        assert facts[road]["calls"] == alone[road]["calls"]
    for key, value in first[1][road].items():
        assert torch.equal(value, second[1][road][key]), key
    if road not in ("nested", "chosen", "grown"):
        bias = torch.stack([v for k, v in weights[road].items() if "balance_bias" in k])
        assert bias.abs().max() > 0


@pytest.mark.slow
def test_two_processes_grow_the_same_blocks(ranks):
    for facts, _ in (*ranks[1], *ranks[2]):
        names = ["func-1", "rd-1", "func-1", "rd-1", "func-2", "rd-2"]
        assert facts["grown"]["calls"] == [*names, [2, 2]]


@pytest.mark.slow
def test_two_processes_draw_the_same_ranks_or_stop(ranks):
    ((alone, _),) = ranks[1]
    drawn = alone["nested"]["drawn"]
    assert set(drawn) == {1, 2, 3, 4}
    assert alone["nested"]["refused"] == ""
    for facts, _ in ranks[2]:
        assert facts["nested"]["drawn"] == drawn
        assert "expected one for all" in facts["nested"]["refused"]


@pytest.mark.slow
def test_two_processes_report_the_loss_of_the_joined_batch(ranks):
    ((alone, _),) = ranks[1]
    for facts, _ in ranks[2]:
        # Logged in fp32.
        assert_close(facts["trainer"]["losses"], alone["trainer"]["losses"], dtype=torch.float32)
    halves = torch.tensor([facts["attach"]["losses"] for facts, _ in ranks[2]])
    assert_close(halves.mean(0), alone["attach"]["losses"], dtype=torch.float32)
