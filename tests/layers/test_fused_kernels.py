"""A model trains on kernels as it does without them: on a GPU, or in Triton's interpreter."""

import os

import pytest
import torch

import polyrank as pr
from polyrank.layers.linear import AdaptedLinear
from polyrank.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    # Triton reads it when it is imported, which other packages do.
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
METHODS = {
    "lora": pr.method("lora", r=4),
    "lora-dropout": pr.method("lora", r=4, dropout=0.3),
    "smora": pr.method("smora", r=8, k=2),
    "mora": pr.method("mora", r=4),
}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).to(DEVICE)


def losses(model, checkpointed=False):
    if checkpointed:
        model.enable_input_require_grads()
        # transformers is about to rename it.
        old = "gradient_checkpointing_enable"
        name = "activation_checkpointing_enable"
        getattr(model, name if hasattr(model, name) else old)({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(pr.parameter_groups(model, lr=1e-2))
    attached = pr.attach(optimizer, model)
    ids = torch.arange(18, device=DEVICE).view(2, 9)
    found = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    attached.detach()
    return torch.tensor(found)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", list(METHODS))
def test_training_equals_the_path_without_kernels(name, checkpointed, monkeypatch):
    found = {}
    for path in ("eager", "triton"):
        monkeypatch.setenv("POLYRANK_OPS", path)
        model = pr.adapt(llama(), METHODS[name], seed=0)
        found[path] = losses(model, checkpointed)
    why = "three AdamW steps at a rate of 1e-2 amplify the order of sums"
    assert_close(found["triton"], found["eager"], tol=1e-4, reason=why)
    followers = sum(len(m.sharing.followers) for m in model.modules() if type(m) is AdaptedLinear)
    assert followers == (0 if checkpointed or name == "lora-dropout" else 3)
