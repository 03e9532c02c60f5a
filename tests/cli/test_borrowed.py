"""`--init` and `--optim`: a start and an optimiser from other methods."""

import json
import subprocess
import sys

import pytest

from polyrank.cli import main
from polyrank.cli.choices import borrowed


def test_they_are_options_of_the_method():
    assert borrowed("lora-ga:gamma=64", None) == ["init_by=lora-ga:gamma=64"]
    assert borrowed(None, "altlora") == ["optim_by=altlora"]
    assert borrowed(None, None) == []


def test_faults_of_both_are_told_at_once(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", "--method", "lora", "--init", "lora-xs", "--optim", "altlora:dampin=1"])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "lora-xs has no start that stands alone" in lines[0]
    assert "unknown option 'dampin'" in lines[1]
    assert "did you mean 'damping'" in lines[1]


def test_a_run_takes_both_and_says_so(tmp_path):
    words = "run --method lora --init lora-ga:gamma=64 --optim altlora --set r=2 --references none"
    done = subprocess.run(
        [sys.executable, "-m", "polyrank", *words.split(), "--train", "epochs=1", "--out", "made"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    about = json.loads((tmp_path / "made" / "run.json").read_text())
    options = about["method"]["options"]
    assert (options["init_by"], options["optim_by"]) == ("lora-ga:gamma=64", "altlora")
    events = (tmp_path / "made" / "events.jsonl").read_text().splitlines()
    assert sum('"job": "start"' in line or '"job":"start"' in line for line in events) == 1
    assert "lora r=2 + start lora-ga:gamma=64 + optimiser altlora" in done.stdout
    saved = next((tmp_path / "made" / "adapters").glob("*/adapter_config.json"))
    assert all(site["shadow"] == 2 for site in json.loads(saved.read_text())["sites"].values())
