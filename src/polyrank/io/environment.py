"""What a result depends on besides its configuration: package versions, commit, hardware."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# What decides numbers or formats; whatever is not installed is left out.
PACKAGES = (
    "polyrank",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
    "scikit-learn",
    "trl",
    "bitsandbytes",
    "torchao",
    "triton",
)


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed version of Python and of each package, without importing any of them."""
    found = {"python": platform.python_version()}
    installed = ((name, _version(name)) for name in packages)
    return found | {name: version for name, version in installed if version is not None}


def commit(file: str | os.PathLike[str] = __file__) -> str | None:
    """Git commit of the tree that tracks `file`, with "+changes" if the tree differs from it.

    Returns:
        None without git, or if the file is not tracked: an installed package inside somebody's
        project must not report that project's commit.
    """
    path = Path(file).resolve()
    if _git(path.parent, "ls-files", "--error-unmatch", path.name) is None:
        return None
    head = _git(path.parent, "rev-parse", "HEAD")
    if head is None:
        return None
    changed = _git(path.parent, "status", "--porcelain", "--untracked-files=no")
    return head + ("+changes" if changed else "")


def hardware() -> dict[str, Any]:
    """Machine, processor, usable cores, threads, memory in GiB, and GPUs in use.

    torch is never imported and no device is initialised here: GPUs appear once torch runs on one.
    """
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": _cores(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_gib": _memory(),
        "gpus": _gpus(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    # Inside a git hook GIT_DIR points at another repository.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            env=clean,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> float | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return round(size / 2**30, 1)


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
