"""Inputs of the rank gate, every epilogue with a readable name, and a way to run both paths."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from polyrank.ops.rank_gate import Epilogue

# Each divides r = 12 where it has to.
EPILOGUES = {
    "none": {},
    "static": {"kind": "static"},
    "sigmoid": {"kind": "linear", "k": 4},
    "sigmoid-b": {"kind": "linear", "k": 4, "bias": True},
    "sigmoid-bw": {"kind": "linear", "k": 4, "bias": True, "bias_in_weight": True},
    "sigmoid-m3": {"kind": "linear", "k": 6, "block": 3, "bias": True, "total": 3.0},
    "sigmoid-m3-bw": {"kind": "linear", "k": 6, "block": 3, "bias": True, "bias_in_weight": True},
    "sigmoid-all": {"kind": "linear", "k": 12, "total": 1.0},
    "softmax": {"kind": "linear", "k": 4, "score": "softmax"},
    "softmax-b": {"kind": "linear", "k": 4, "score": "softmax", "bias": True, "total": 1.0},
    "softmax-bw": {
        "kind": "linear",
        "k": 4,
        "score": "softmax",
        "bias": True,
        "bias_in_weight": True,
    },
    "softmax-m2": {"kind": "linear", "k": 4, "block": 2, "score": "softmax", "total": 2.0},
    "softmax-soft": {"kind": "linear", "k": 12, "block": 4, "score": "softmax", "total": 4.0},
    "self": {"kind": "self", "k": 5, "tau": 0.3},
    "self-cut": {"kind": "self", "k": 5, "tau": 0.3, "delta": 0.2},
    "self-all": {"kind": "self", "k": 99, "tau": 0.3},
}


@dataclass
class Case:
    """The tensors of one call; `grads` names those that a run differentiates by."""

    y: torch.Tensor
    x: torch.Tensor
    A: torch.Tensor
    rows: torch.Tensor | None
    B: torch.Tensor
    epilogue: Epilogue
    scale: float = 1.7
    options: dict = field(default_factory=dict)

    def with_(self, **changes):
        return replace(self, **changes)

    def tensors(self):
        named = {n: getattr(self, n) for n in ("y", "x", "A", "rows", "B")}
        named["gate"] = self.epilogue.gate
        return {name: t for name, t in named.items() if t is not None and t.requires_grad}

    def call(self, function, **options):
        merged = {**self.options, **options}
        return function(
            self.y, self.x, self.A, self.rows, self.B, self.epilogue, self.scale, **merged
        )

    def run(self, function, **options):
        """(output, counts, gradients by name) for a fixed cotangent that weighs all outputs."""
        out, counts = self.call(function, **options)
        leaves = self.tensors()
        cotangent = torch.linspace(-1, 1.5, out.numel(), dtype=torch.float64).view(out.shape)
        grads = torch.autograd.grad(out, list(leaves.values()), cotangent.to(out))
        return out, counts, dict(zip(leaves, grads, strict=True))


@pytest.fixture
def make():
    """A factory of cases: the name of an epilogue, then sizes, dtype and fields to change."""

    def factory(
        name="sigmoid",
        *,
        lead=(9,),
        d_in=13,
        d_out=11,
        r=12,
        dtype=torch.float64,
        device="cpu",
        seed=0,
        **changes,
    ):
        rng = torch.Generator().manual_seed(seed)
        fields = {**EPILOGUES[name], **changes}
        # Parameters are masters in fp32; the values are bf16 so that a cast of them loses nothing.
        master = torch.float64 if dtype == torch.float64 else torch.float32

        def draw(*shape, dtype=master, std=1.0):
            values = torch.randn(*shape, generator=rng, dtype=torch.float64) * std
            values = values if dtype == torch.float64 else values.bfloat16()
            return values.to(device, dtype).requires_grad_()

        block = fields.get("block", 1)
        if fields.get("bias") is True:
            per_block = torch.randn(r // block, generator=rng) * 0.2
            fields["bias"] = per_block.repeat_interleave(block).to(device)
        if fields.get("kind") == "static":
            fields.setdefault("gate", draw(r))
        # Drawn whatever the kind, so that two kinds share A and B.
        rows = draw(r // block, d_in, std=d_in**-0.5)
        case = Case(
            y=draw(*lead, d_out, dtype=dtype),
            x=draw(*lead, d_in, dtype=dtype),
            A=draw(r, d_in, std=d_in**-0.5),
            rows=rows if fields.get("kind") == "linear" else None,
            B=draw(d_out, r),
            epilogue=Epilogue(**fields),
        )
        return case

    return factory


def pytest_generate_tests(metafunc):
    """Any test with an argument `name` runs for every epilogue, with `router` for linear ones."""
    for argument, names in {
        "name": list(EPILOGUES),
        "router": [n for n, f in EPILOGUES.items() if f.get("kind") == "linear"],
    }.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names)
