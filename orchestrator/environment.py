"""Where numbers came from: versions, hardware and commit of this process, as plain values."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from orchestrator.redaction import redacted

PACKAGES = ("torch", "torchvision", "torchaudio", "ray", "optuna", "mlflow", "numpy", "matplotlib")
_GIT_SECONDS = 10.0


def environment() -> dict[str, Any]:
    """The command, when it began, versions, processor, memory, GPUs, and the commit of the code.

    "commit" is empty where the code is no git checkout or git is absent; "changed" is whether tracked files differ from it.
    """
    commit = _git("rev-parse", "HEAD")
    return {
        "command": [redacted(each) for each in sys.argv],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "changed": bool(commit) and bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    with suppress(OSError):  # Linux alone has the file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    """What git says of the code's checkout; empty where it cannot say anything."""
    folder = str(Path(__file__).parent)
    try:
        told = subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.strip() if told.returncode == 0 else ""
