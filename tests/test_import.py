"""What importing costs and drags in; every look is taken in a fresh process."""

import subprocess
import sys
from statistics import median

import pytest

TIMED = "from time import perf_counter as now; start = now(); import {}; print(now() - start)"
LOADED = "import sys; import {}; print(*sorted(name for name in sys.modules if '.' not in name))"
RATIO = 1.2


def fresh(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(module):
    return set(fresh(LOADED.format(module)).split())


def test_import_loads_no_heavy_library():
    ours = loaded("polyrank")
    assert "polyrank" in ours
    # What torch itself brings along is not ours to forbid.
    assert not (ours & {"triton", "transformers", "peft", "accelerate"}) - loaded("torch")


def test_import_leaves_cuda_alone():
    code = "import polyrank, torch; print(torch.cuda.is_initialized(), torch.is_grad_enabled())"
    assert fresh(code).split() == ["False", "True"]


def test_import_draws_no_random_number():
    code = "import torch; a = torch.random.get_rng_state(); import polyrank; "
    assert fresh(code + "print(torch.equal(a, torch.random.get_rng_state()))").strip() == "True"


@pytest.mark.parametrize(
    "module", ["polyrank.reports", "polyrank.metrics", "polyrank.io.runs", "polyrank.errors"]
)
def test_reading_results_loads_no_torch(module):
    found = loaded(module)
    assert "polyrank" in found
    assert not found & {"torch", "transformers", "peft", "accelerate", "datasets"}


def ratios(count):
    """Seconds of `import polyrank` over those of `import torch`, in pairs that swap their order."""
    for turn in range(count):
        order = ("torch", "polyrank") if turn % 2 else ("polyrank", "torch")
        seconds = {module: float(fresh(TIMED.format(module))) for module in order}
        yield seconds["polyrank"] / seconds["torch"]


def test_import_takes_at_most_a_fifth_more_than_torch():
    fresh("import polyrank, torch")  # the first reading fills the disk cache
    found = list(ratios(5))
    # On a busy machine five pairs may mislead; six more settle it.
    if median(found) > RATIO:
        found += ratios(6)
    assert median(found) <= RATIO, f"ratios of {len(found)} pairs: {sorted(found)}"
