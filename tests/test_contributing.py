"""The example method of CONTRIBUTING.md is a method: it checks, trains, merges and counts."""

import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"

# A fresh process: the file registers a name that tests over the registry must not see.
CHECK = """
import torch
import polyrank as pr
from polyrank.frame import load_file, names
from polyrank.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

cls = load_file("scaled.py")
assert cls.name == "scaled" and "scaled" in names()
try:
    pr.method("scaled", start=-1.0)
except pr.ConfigError as error:
    assert "use 1.0 to begin as plain LoRA" in str(error), error
else:
    raise AssertionError("a negative start passed")

torch.manual_seed(0)
config = LlamaConfig(vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                     num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=32)
base = LlamaForCausalLM(config).eval()
words = torch.arange(14).reshape(2, 7)
before = base(words).logits
method = pr.method("scaled", r=5, start=0.5)
model = pr.adapt(base, method, target_modules="all-linear").eval()
assert torch.equal(model(words).logits, before)

trained = [p for p in model.parameters() if p.requires_grad]
layers = pr.adapter_of(model).layers
assert sum(p.numel() for p in trained) == sum(method.parameters_per_site(l.site) for l in layers)
gates = [layer.core.weight for layer in layers]
assert all(torch.equal(gate, torch.full((5,), 0.5)) for gate in gates)
for _ in range(2):
    model(words, labels=words).loss.backward()
    with torch.no_grad():
        for p in trained:
            p -= 0.5 * p.grad
            p.grad = None
assert all((gate != 0.5).any() for gate in gates)
after = model(words).logits
assert not torch.equal(after, before)
assert_close(model.merge_and_unload()(words).logits, after)
print("done")
"""


def test_the_example_works():
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    Path("scaled.py").write_text(example, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_the_rule_book_is_short():
    assert len(GUIDE.read_text(encoding="utf-8").splitlines()) <= 150
