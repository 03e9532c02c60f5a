"""A start from data is the same on every process, and that of all rows together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polyrank.testing import assert_close

SCRIPT = Path(__file__).with_name("starts.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process and two of them wrote."""
    found = tmp_path_factory.mktemp("starts")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        place = {"RANK": str(rank), "WORLD_SIZE": str(world)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        running.append(
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(found)],
                env={**os.environ, **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    for process in running:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out.decode()[-4000:]
    return found


@pytest.mark.parametrize("name", ["ga", "sb", "few"])
def test_two_processes_start_as_one_does_on_all_rows(folder, name):
    alone, first, second = (
        load_file(folder / f"{rank}-{name}.safetensors") for rank in ("1-0", "2-0", "2-1")
    )
    assert len(first) > 20
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    paths = {key.removesuffix(".A") for key in alone if key.endswith(".A")}
    for path in paths:
        A, B = alone[f"{path}.A"], alone[f"{path}.B"]
        # Sums in another order may turn singular vectors round, and not what they span.
        reason = "the model's own loss is in fp32"
        assert_close(first[f"{path}.A"].T @ first[f"{path}.A"], A.T @ A, tol=1e-4, reason=reason)
        assert_close(first[f"{path}.B"] @ first[f"{path}.B"].T, B @ B.T, tol=1e-4, reason=reason)


def test_where_one_process_sees_nothing_all_of_them_stop(folder):
    said = [json.loads((folder / f"{rank}.json").read_text())[0] for rank in range(2)]
    assert said[0] == said[1]
    assert "got no batch, expected at least one on every process" in said[0]


def test_where_one_process_fails_no_other_one_waits(folder):
    said = [json.loads((folder / f"{rank}.json").read_text())[1] for rank in range(2)]
    assert said[1] == "ValueError: no loss today"
    assert said[0].startswith("RunError: initialise: another process stopped")
