"""The guards of conftest.py: each must bite."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

INSIDE = "polyrank.ops.sample"
CALLS = [
    "torch.empty(3, 5)",
    "torch.empty((3, 5), dtype=torch.bfloat16)",
    "torch.empty(3, 5, requires_grad=True)",
    "torch.empty_like(torch.ones(3, 5))",
    "torch.empty_strided((3, 5), (5, 1))",
    "torch.empty_permuted((3, 5), (1, 0))",
    "torch.ones(3, 5).new_empty(3, 5)",
    "torch.ones(3, 5).new_empty_strided((3, 5), (5, 1))",
]


def call(source, name):
    """Runs `source` as if it stood in the module `name`."""
    return eval(source, {"__name__": name, "torch": torch})


@pytest.mark.parametrize("source", CALLS)
def test_memory_asked_for_by_polyrank_is_nan(source):
    tensor = call(source, INSIDE)
    assert tensor.shape == (3, 5)
    assert tensor.isnan().all()


def test_integers_are_poisoned_too():
    assert (call("torch.empty(3, dtype=torch.int64)", INSIDE) == torch.iinfo(torch.int64).max).all()
    assert call("torch.empty(3, dtype=torch.bool)", INSIDE).dtype == torch.bool


def test_no_storage_no_poison():
    assert call("torch.empty(3, 5, device='meta')", INSIDE).is_meta


@pytest.mark.parametrize("name", ["torch.nn.modules.linear", "polyrankle", "tests"])
def test_memory_of_others_is_left_alone(name):
    marked = []

    class Memory(torch.Tensor):
        def fill_(self, value):
            marked.append(value)
            return super().fill_(value)

    sample = torch.ones(3).as_subclass(Memory)
    eval("sample.new_empty(3)", {"__name__": name, "sample": sample})
    assert marked == []
    eval("sample.new_empty(3)", {"__name__": INSIDE, "sample": sample})
    assert len(marked) == 1


def test_compiled_graphs_stay_whole():
    space = {"__name__": INSIDE, "torch": torch}
    exec("def double(x):\n    y = torch.empty_like(x)\n    y.copy_(2 * x)\n    return y", space)
    compiled = torch.compile(space["double"], backend="eager", fullgraph=True)
    assert compiled(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("host", ["huggingface.co", "192.0.2.1", b"pypi.org"])
def test_names_and_addresses_outside_are_refused(host):
    with pytest.raises(ConnectionRefusedError, match="expected loopback"):
        socket.getaddrinfo(host, 443)


@pytest.mark.parametrize("connect", ["connect", "connect_ex"])
def test_connections_outside_are_refused(connect):
    with socket.socket() as sock, pytest.raises(ConnectionRefusedError, match="reached for the"):
        getattr(sock, connect)(("192.0.2.1", 443))


def test_loopback_and_unix_sockets_work(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()
        thread.join()
    one, other = socket.socketpair(socket.AF_UNIX)
    one.close()
    other.close()


def test_subprocesses_are_told_to_stay_offline():
    code = "import os; print(os.environ['HF_HUB_OFFLINE'], os.environ['OMP_NUM_THREADS'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def test_one_thread():
    assert torch.get_num_threads() == 1


def test_own_empty_directory(tmp_path):
    assert Path.cwd() == tmp_path
    assert os.listdir() == []


@pytest.mark.parametrize("run", [1, 2])
def test_same_seed_for_every_test(run):
    first = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(3))
