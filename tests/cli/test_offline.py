"""Without any network: run, resume, compare and report, and what signals leave behind."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

BLOCKED = """
import socket
def blocked(*words, **options):
    raise OSError("the network is blocked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = blocked
from polyrank.cli import main
for words in (
    "run --method lora --set r=2 --references none --train epochs=1 --out runs/a",
    "run --method lora --set r=2 --with replay --references none --train epochs=1 --out runs/b",
    "resume runs/b",
    "report runs/a",
    "compare runs/a runs/b --out both",
):
    try:
        main(words.split())
    except SystemExit as end:
        assert not end.code, (words, end.code)
"""


@pytest.mark.slow
def test_nothing_asks_for_the_network(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "both" / "compare.md").is_file()
    assert (tmp_path / "runs" / "a" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows neither signal")
def test_sigterm_leaves_a_checkpoint_and_the_same_command_goes_on(tmp_path):
    words = ["--method", "lora", "--set", "r=2", "--references", "none", "--train", "epochs=40"]
    command = [sys.executable, "-m", "polyrank", "run", *words, "--out", "run"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "run" / "events.jsonl"
    deadline = time.monotonic() + 200
    while '"train"' not in (log.read_text() if log.exists() else ""):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    last = process.communicate()[1].splitlines()[-1]
    assert last.startswith("stopped: run is kept; `polyrank resume run`, or the same command again")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    (kept,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert kept.name == "00000001"
    changed = [word.replace("epochs=40", "epochs=1") for word in command]
    refused = subprocess.run(
        changed, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200
    )
    assert refused.returncode == 2
    assert "train.epochs: 40 here, 1 asked for" in refused.stderr
