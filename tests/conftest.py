"""What holds for every test: no network, one thread, a directory of its own, poisoned memory."""

import os
import random
import socket
import sys
import tempfile

# Before anything imports transformers or datasets, which read these once; subprocesses inherit.
_CACHE = tempfile.TemporaryDirectory(prefix="polyrank-tests-", ignore_cleanup_errors=True)
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=_CACHE.name,
    POLYRANK_CACHE=os.path.join(_CACHE.name, "polyrank"),
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MPLBACKEND="Agg",
)
os.environ.pop("FORCE_COLOR", None)

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--update-api",
        action="store_true",
        help="rewrite tests/public_api.txt from the code instead of comparing with it",
    )
    parser.addoption(
        "--every-case",
        action="store_true",
        help="hold every sample of a method to the contract in every model, not in two",
    )


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


LOCAL = ("localhost", "127.", "::1", "0.0.0.0")


def _refuse(host):
    if not str(host).startswith(LOCAL) and host not in (None, "", socket.gethostname()):
        raise ConnectionRefusedError(
            f"test reached for the network: got host {host!r}, expected loopback or AF_UNIX; "
            "build what it needs on the spot, or put it into the repository"
        )


@pytest.fixture(autouse=True, scope="session")
def offline():
    """Refuses name resolution and connections beyond this machine."""
    connect, connect_ex, resolve = (
        socket.socket.connect,
        socket.socket.connect_ex,
        socket.getaddrinfo,
    )

    def check(method):
        def guarded(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6):
                _refuse(address[0])
            return method(self, address)

        return guarded

    def getaddrinfo(host, *args, **kwargs):
        _refuse(host.decode() if isinstance(host, bytes) else host)
        return resolve(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", check(connect))
        patch.setattr(socket.socket, "connect_ex", check(connect_ex))
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


def _poisoned(allocate):
    """`allocate` whose memory, if polyrank asked for it, holds NaN or the largest integer."""

    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        # Inside torch.compile the stack cannot be read, and the graph shall be the real one.
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller == "polyrank" or caller.startswith("polyrank."):
            with torch.no_grad():
                if tensor.is_floating_point() or tensor.is_complex():
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool:
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return poisoned


@pytest.fixture(autouse=True, scope="session")
def poison():
    """Memory that polyrank allocates without writing it shows up as NaN, not as stale numbers."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
        yield


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """Each test stands in its own empty directory and starts from the same global seeds."""
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
