"""Times every kind of gate on a GPU by kernels and by the eager path, for the dispatcher's table.

    python bench/gates.py --out bench/results/gates.csv

One adapted layer as called from Python: forward without gradients, and forward + backward; sizes
from a few tokens up. A round runs both paths in a new order; medians of rounds.
"""

import argparse

import torch
from common import Path_, adapted, rounds_us, save
from torch import nn

import polyrank

# tokens, d_in, d_out
SIZES = [(1, 2048, 2048), (16, 2048, 2048), (256, 1024, 1024), (2048, 2048, 2048),
         (8192, 4096, 4096)]  # fmt: skip
KINDS = {
    "none": ("lora", {}),
    "static": ("codyra", {}),
    "sigmoid": ("smora", {"k": 8}),
    "softmax": ("smora", {"k": 8, "gate": "softmax_topk"}),
    "blocks": ("smora", {"k": 8, "block": 4}),
    "self": ("mora", {}),
}
PATHS = ("eager", "triton")


def layer(kind, d, n, dtype):
    """A frozen layer under the method that has this gate."""
    name, options = KINDS[kind]
    rng = torch.Generator("cuda").manual_seed(1)
    base = nn.Linear(d, n, bias=False, device="cuda", dtype=dtype)
    with torch.no_grad():
        base.weight.normal_(0, d**-0.5, generator=rng)
    return adapted(nn.Sequential(base), polyrank.method(name, r=64, **options), ["0"])


def case(kind, size, dtype, args):
    """A row of one kind, size and dtype."""
    T, d, n = size
    model = layer(kind, d, n, dtype)
    # Without an optimiser at hand a training forward waits for the device.
    polyrank.attach(polyrank.optimizer(model, lr=0.0), model, total=1000)
    leaves = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(T, d, device="cuda").to(dtype).requires_grad_()
    dy = torch.randn(T, n, device="cuda").to(dtype)

    def forward():
        with torch.no_grad():
            model(x)

    def step():
        model(x).backward(dy)
        x.grad = None
        for p in leaves:
            p.grad = None

    took = {}
    for name, work in (("forward", forward), ("step", step)):
        model.train(name == "step")
        found = rounds_us({p: Path_(p, work) for p in PATHS}, args.rounds, args.inner)
        took |= {f"{name}_{path}_us": round(us, 1) for path, us in found.items()}
    gain = min(took[f"{w}_eager_us"] / took[f"{w}_triton_us"] for w in ("forward", "step"))
    return {
        "kind": kind, "dtype": str(dtype)[6:], "tokens": T, "d_in": d, "d_out": n, "r": 64,
        **took, "least_gain": round(gain, 3),
    }  # fmt: skip


def main():
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--dtypes", default="bfloat16,float16")
    for name, default in {"rounds": 6, "inner": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = []
    for dtype in args.dtypes.split(","):
        for kind in args.kinds.split(","):
            # Widths and heights again in fp16 would say the same.
            for size in SIZES if dtype == "bfloat16" else SIZES[1::3]:
                rows.append(case(kind, size, getattr(torch, dtype), args))
                print(*rows[-1].values(), flush=True)
                if args.out:
                    save(args.out, rows)


if __name__ == "__main__":
    main()
