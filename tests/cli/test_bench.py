"""`polyrank bench` as a user types it."""

import csv
import subprocess
import sys

import pytest

from polyrank.cli import main

SMALL = ["--size", "32", "--tokens", "16", "--r", "4", "--k", "2", "--rounds", "2"]


def bench(*words):
    command = [sys.executable, "-c", "from polyrank.cli import main; main()", "bench", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_layer_is_timed_beside_pefts_lora():
    done = bench(*SMALL, "--device", "cpu", "--out", "layer.csv")
    assert done.returncode == 0, done.stderr
    assert "PEFT's extra" in done.stdout
    with open("layer.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["system"] for row in rows] == ["frozen layer", "PEFT LoRA", "lora", "smora"]
    assert all(float(row["step_us"]) > float(row["forward_us"]) > 0 for row in rows)
    assert {row["torch"] for row in rows} != {""}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--r", "4", "--k", "8"], "k: got 8, expected at most r = 4"),
        (["--rounds", "0", "--size", "-1"], "size: got -1, expected >= 0"),
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--out", "nowhere/x.csv"], "out: got 'nowhere/x.csv', which lies in 'nowhere'"),
        (["--out", "."], "out: got '.', which is a folder"),
    ],
)
def test_what_cannot_be_timed_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
