"""The same adapters on a CUDA device: dtypes, counts, compiled graphs, a whole run."""

import copy

import pytest
import torch

import polyrank as pr
from polyrank import engine
from polyrank.engine import base as bases
from polyrank.engine.settings import Settings
from polyrank.layers import adapter_of
from polyrank.ops.rank_gate import Epilogue, naive, rank_gate
from polyrank.testing.tolerance import assert_close

pytestmark = pytest.mark.gpu
METHODS = [pr.method("lora", r=4), pr.method("smora", r=8, k=2), pr.method("moe-lora", r=8)]


def llama(dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config).to(dtype)


def losses(model, steps=5, **forward):
    model.train()
    optimizer = torch.optim.AdamW(pr.parameter_groups(model, lr=1e-2))
    attached = pr.attach(optimizer, model)
    device = next(model.parameters()).device
    ids = torch.randint(0, 96, (4, 33), generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, **forward).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    attached.detach()
    return found


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_training_equals_the_cpu(method):
    cpu = pr.adapt(llama(), method, seed=0)
    gpu = pr.adapt(llama().cuda(), method, seed=0)
    assert all(p.is_cuda for p in gpu.parameters())
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        expected, found = losses(cpu), losses(gpu)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    why = "five AdamW steps at a rate of 1e-2 amplify the order of sums"
    assert_close(torch.tensor(found), torch.tensor(expected), tol=1e-3, reason=why)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_bf16_base_keeps_fp32_factors_and_trains(method):
    model = pr.adapt(llama(torch.bfloat16).cuda(), method, seed=0)
    layer = adapter_of(model).layers[0]
    assert layer.A.dtype == layer.B.dtype == torch.float32
    found = losses(model)
    assert found[-1] < found[0]


def test_counts_and_bias_live_on_the_device():
    model = pr.adapt(llama().cuda(), pr.method("smora", r=8, k=2), seed=0)
    losses(model, steps=2)
    core = adapter_of(model).layers[0].core
    assert core.balance_bias.is_cuda
    assert bool(core.balance_bias.abs().sum() > 0)


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda m: m.name)
def test_compiled_training_gives_the_same_losses(method):
    expected = losses(pr.adapt(llama().cuda(), method, seed=0))
    model = pr.adapt(llama().cuda(), method, seed=0)
    model.compile(backend="aot_eager", fullgraph=True)
    why = "a compiled graph may add in another order"
    assert_close(torch.tensor(losses(model)), torch.tensor(expected), tol=1e-4, reason=why)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_operator_equals_its_reference(dtype, score):
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=rng)

    x, y = draw(2, 63, 40).to(dtype), draw(2, 63, 24).to(dtype)
    A, rows, B = draw(10, 40) / 6, draw(10, 40) / 6, draw(24, 10) / 3
    epilogue = Epilogue(kind="linear", k=3, score=score)
    given = [t.cuda().requires_grad_() for t in (y, x, A, rows, B)]
    wide = [t.detach().double().requires_grad_() for t in given]
    # The same rounding of the weights, so that both choose the same ranks.
    for index in (2, 3, 4):
        wide[index] = given[index].detach().to(dtype).double().requires_grad_()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        out, _ = rank_gate(*given, epilogue, 2.0)
        expected, _ = naive.rank_gate(*wide, epilogue, 2.0)
        out.double().square().sum().backward()
        expected.square().sum().backward()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    tol = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    why = "gradients pass through values rounded to the compute dtype three times"
    assert_close(out.double(), expected, tol=tol, reason=why)
    for one, other in zip(given, wide, strict=True):
        assert_close(one.grad.double(), other.grad, tol=tol, reason=why)


def test_a_run_uses_the_device(tmp_path):
    torch.manual_seed(0)
    base = bases.small_vit(4)
    found = engine.run(
        copy.deepcopy(base),
        method=pr.method("smora", r=8, k=2),
        train=Settings(epochs=1),
        references=("probe",),
        out=tmp_path / "run",
        progress=False,
    )
    assert next(found.model.parameters()).is_cuda
    assert found.metrics["average_accuracy"] > 0
