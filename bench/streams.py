"""Every continual-learning entry on one stream, several seeds: runs for `polyrank compare`.

Each entry is a run of its own in OUT/NAME-SEED, trained alike; a run that is there is not repeated,
one that was stopped goes on. The first entry also brings joint training and the frozen probe.

    python bench/streams.py digits --out runs/digits && polyrank compare runs/digits
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import polyrank as pr
from polyrank import engine
from polyrank.frame import get
from polyrank.streams import stream

# About the published sum of thresholds, 0.65, in much shorter tasks: of 105 updates on digits, of
# 15 to 90 on stdlib.
FADING = {
    "digits": {"kappa_max": 0.023, "levels": 25},
    "stdlib": {"kappa_max": 0.05, "levels": 7},
}
# In tasks so short SGD teaches descriptors nothing. On digits nothing grows with a threshold of 2,
# and with 1 all that may.
LOOKING = {
    "digits": {"q": 16, "tau": 1.5, "optimizer": "adamw", "rd_epochs": 30},
    "stdlib": {"q": 32, "tau": 1.0, "optimizer": "adamw", "rd_epochs": 10},
}
# Entry, method, its options, strategies with theirs.
ENTRIES: list[tuple[str, str, dict, list[tuple[str, dict]]]] = [
    ("sequential", "lora", {}, [("sequential", {})]),
    ("sequential-slow", "lora", {}, [("sequential", {})]),
    ("smora", "smora", {"k": 4}, []),
    ("replay", "lora", {}, [("replay", {"capacity": 0.05})]),
    ("der", "lora", {}, [("der", {"capacity": 0.05, "plus": True})]),
    ("agem", "lora", {}, [("agem", {"capacity": 0.05})]),
    ("gem", "lora", {}, [("gem", {"capacity": 0.05})]),
    ("ewc", "lora", {}, [("ewc", {})]),
    ("l2", "lora", {}, [("l2", {})]),
    ("lwf", "lora", {}, [("lwf", {})]),
    ("lwf-mc", "lora", {}, [("lwf", {"form": "bce"})]),
    ("featkd", "lora", {}, [("featkd", {})]),
    ("masked", "lora", {}, [("masked", {})]),
    ("masked-l2-absorb", "lora", {}, [("masked", {}), ("l2", {}), ("absorb", {})]),
    ("ilora", "lora", {}, [("ilora", {"capacity": 0.05})]),
    ("olora", "olora", {}, []),
    ("mora", "mora", {}, []),
    ("mora-masked", "mora", {}, [("masked", {})]),
    ("codyra", "codyra", {}, []),
    ("codyra-masked", "codyra", {}, [("masked", {})]),
    ("mixlora", "mixlora", {"experts": 4, "alpha": 16.0}, []),
    ("mixlora-masked", "mixlora", {"experts": 4, "alpha": 16.0}, [("masked", {})]),
    ("sema", "sema", {}, []),
    ("sora", "sora", {}, []),
    ("dylora", "dylora", {}, []),
    ("full", "full", {}, []),
    ("osf", "osf", {}, []),
    ("osf-progressive", "osf", {"schedule": "progressive"}, []),
    ("osf-core", "osf", {"parametrisation": "core"}, []),
]
# Weights that begin with values of their own move too far at the rate of factors that begin at 0;
# `sequential-slow` is LoRA at their rate.
SLOW = ("sequential-slow", "full", "osf", "osf-core")
RATES = {
    "digits": dict.fromkeys(SLOW, 1e-3),
    "stdlib": dict.fromkeys((*SLOW, "osf-progressive"), 3e-4),
}
# Ranks and training of each stream.
TRAIN = {
    "digits": (8, {"epochs": 15, "lr": 3e-3}),
    "stdlib": (8, {"epochs": 3, "lr": 1e-3}),
    "stdlib-lm": (8, {"epochs": 1, "lr": 1e-3}),
}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stream", choices=TRAIN)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--entries", nargs="*", default=[name for name, *_ in ENTRIES])
    given = parser.parse_args()
    rank, train = TRAIN[given.stream]
    for seed in given.seeds:
        for name, method, options, strategies in ENTRIES:
            if name not in given.entries:
                continue
            started = time.perf_counter()
            if method == "codyra":
                options = FADING.get(given.stream, options)
            if method == "sema":
                options = LOOKING.get(given.stream, options)
            if options.get("schedule") == "progressive":
                options = {**options, "tasks": len(stream(given.stream, seed=seed))}
            # What trains weights themselves knows no ranks.
            sized = {"r": rank} if get(method).sized else {}
            result = engine.run(
                None,
                given.stream,
                pr.method(method, **sized, **options),
                strategies=[pr.method(word, **values) for word, values in strategies],
                references=["joint", "probe"] if name == "sequential" else [],
                train={**train, "lr": RATES.get(given.stream, {}).get(name, train["lr"])},
                seed=seed,
                out=given.out / f"{name}-{seed}",
                progress=False,
                command=["python", *sys.argv],
            )
            score = result.metrics["average_accuracy"]
            took = time.perf_counter() - started
            print(f"{name} seed {seed}: {score:.3f} in {took:.1f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
