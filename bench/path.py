"""The path between I-LoRA's fast and slow learner after the digits stream, as a picture.

python bench/path.py --out docs/images/path-digits.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import polyrank as pr
from polyrank import engine
from polyrank.engine.reading import ImageReader
from polyrank.reports import path_picture
from polyrank.streams import digits

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        result = engine.run(
            None,
            "digits",
            pr.method("lora", r=8),
            strategies=[pr.method("ilora", capacity=0.05)],
            references=[],
            out=Path(scratch) / "run",
        )
    model = result.model
    found = engine.connectivity(
        model,
        engine.adapter_state(model),
        engine.adapter_state(model, "slow"),
        digits(),
        ImageReader(),
    )
    print(found["barrier"], found["distance"])
    print(path_picture(found, given.out, ("fast", "slow")))
