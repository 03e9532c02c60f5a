"""Times the Python of a mixed batch on a CPU: 64 samples, each with an adapter of its own.

    python bench/lanes_cpu.py [--layers 7] [--rounds 9]

Layers are 64 wide, so that products take next to no time; one thread; the best of rounds.
"""

import argparse
import time

import torch
from torch import nn

import polyrank


def model_of(name, layers, adapters):
    """A chain of layers with many adapters of a method."""
    base = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(layers)))
    method = polyrank.method(name, r=16, **({"k": 8} if name == "smora" else {}))
    targets = [str(i) for i in range(layers)]
    model = polyrank.adapt(base, method, target_modules=targets, adapter_name="lane0")
    for i in range(1, adapters):
        model.add_adapter(f"lane{i}", model.peft_config["lane0"])
    return model.eval()


def main():
    """Print microseconds a layer, by method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in {"layers": 7, "adapters": 64, "rounds": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, names = torch.randn(args.adapters, 1, 64), [f"lane{i}" for i in range(args.adapters)]
    for name in ("lora", "smora"):
        model, took = model_of(name, args.layers, args.adapters), []
        for _ in range(args.rounds):
            start = time.perf_counter()
            with torch.no_grad():
                for _ in range(5):
                    model(x, adapter_names=names)
            took.append((time.perf_counter() - start) / 5)
        print(f"{name}: {min(took) * 1e6 / args.layers:.0f} us a layer")


if __name__ == "__main__":
    main()
