"""Runs PEFT's own tests against polyrank's methods: `make peft-suite`.

The tests come from the source distribution of the installed PEFT, which pip downloads into a
temporary folder; no line of theirs is kept here. Without pip, or without the network, the suite is
skipped and says so.

Usage: python tests/external/run_peft_suite.py [--write] [--keep FOLDER] [PYTEST ARGUMENTS]
    --write        rewrites the table in README.md beside this file
    --keep FOLDER  unpacks there and leaves it, to look into a failure
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
README = HERE / "README.md"
MARKS = ("<!-- results -->", "<!-- end of results -->")
STUB = "class StableDiffusionPipeline: ...\n"
# Failures that are not ours, by a pattern of the test's name: the reason stands in the table.
EXPLAINED: dict[str, str] = {}
# Skips whose own words name a class of ours and no reason.
SKIPS = {
    "test_weighted_combination": "PEFT adds weighted adapters for LoRA and IA3 only",
    "test_disable_adapter_with_bias_warns": "about trained biases, which polyrank refuses",
    "test_active_adapter$": "PEFT allows one active adapter with modules_to_save",
}


def say(text):
    sys.stdout.write(f"{text}\n")


def skip(why):
    say(f"peft-suite skipped: {why}")
    return 0


def fetch(folder):
    """Download and unpack the tests of the installed PEFT; return what prevented it, or None."""
    wanted = version("peft")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", f"peft=={wanted}", "--no-deps"),
            *("--no-binary", "peft", "--no-build-isolation", "-q", "-d", str(folder)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    archives = sorted(folder.glob("peft-*.tar.gz"))
    if not archives:
        return f"pip could not download the source of peft {wanted}: {done.stderr.strip()[-400:]}"
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder / "source", filter="data")
    tests = next((folder / "source").glob("*/tests"), None)
    if tests is None:
        return f"the source of peft {wanted} has no folder tests"
    shutil.copytree(tests, folder / "peft_tests")
    (folder / "peft_tests" / "__init__.py").touch()
    shutil.copy(HERE / "peft_cases.py", folder / "peft_tests" / "test_ours.py")
    if find_spec("diffusers") is None:
        (folder / "diffusers.py").write_text(STUB, encoding="utf-8")
    return None


def run(folder, arguments):
    """Run the suite and return {test: (outcome, words)}."""
    report = folder / "report.xml"
    source = Path(__file__).parents[2] / "src"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(source), *filter(None, sys.path)]),
        "POLYRANK_PEFT_MODELS": str(folder / "models"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        *(sys.executable, "-m", "pytest", "peft_tests/test_ours.py", "-k", "ranked", "-q"),
        *("-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(folder), "--no-header"),
        *("--tb=short", "-W", "ignore", f"--junitxml={report}", *arguments),
    ]
    subprocess.run(command, cwd=folder, env=environment, check=False)
    return outcomes(report)


def outcomes(report):
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        result, words = "passed", ""
        for tag, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            if (child := case.find(tag)) is not None:
                result, words = outcome, first_line(child.get("message") or child.text or "")
        found[name] = (result, words)
    return found


def first_line(text):
    line = text.strip().splitlines()[0] if text.strip() else ""
    # Folders are temporary and differ between runs.
    return re.sub(r"/\S*/", "", line)[:160]


def reason_of(test, reasons):
    return next((why for pattern, why in reasons.items() if re.search(pattern, test)), "")


def grouped(found, outcome):
    """(test without its parameters, words) → how many."""
    counts = Counter(
        (test.split("[")[0], words) for test, (result, words) in found.items() if result == outcome
    )
    return sorted(counts.items())


def table(found):
    totals = Counter(result for result, _ in found.values())
    lines = [
        f"peft {version('peft')}, transformers {version('transformers')}, torch "
        f"{version('torch')}: {totals['passed']} passed, {totals['failed']} failed, "
        f"{totals['skipped']} skipped.",
        "",
    ]
    for outcome, heading, reasons in (
        ("failed", "Failures", EXPLAINED),
        ("skipped", "Skips", SKIPS),
    ):
        rows = grouped(found, outcome)
        if rows:
            lines += [f"| {heading} | how many | why |", "|---|---|---|"]
            lines += [
                f"| `{test}` | {count} | {reason_of(test, reasons) or words} |"
                for (test, words), count in rows
            ]
            lines.append("")
    return "\n".join(lines).strip()


def write(text):
    before, _, rest = README.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    README.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def main(arguments):
    try:
        version("peft")
    except PackageNotFoundError:
        return skip("peft is not installed")
    keep = None
    if "--keep" in arguments:
        place = arguments.index("--keep")
        keep = Path(arguments[place + 1]).resolve()
        del arguments[place : place + 2]
    rewrite = "--write" in arguments
    arguments = [argument for argument in arguments if argument != "--write"]
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as scratch:
        folder = keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "peft_tests").is_dir() and (problem := fetch(folder)):
            return skip(problem)
        shutil.copy(HERE / "peft_cases.py", folder / "peft_tests" / "test_ours.py")
        found = run(folder, arguments)
    if not found:
        say("peft-suite: no test was collected")
        return 1
    text = table(found)
    say(text)
    if rewrite:
        write(text)
    failed = [test for test, (result, _) in found.items() if result == "failed"]
    return 1 if any(not reason_of(test, EXPLAINED) for test in failed) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
