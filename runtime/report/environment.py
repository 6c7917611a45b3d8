"""What a result was measured on. Free of torch, unless it is loaded already."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..._version import __version__

_CPUINFO = Path("/proc/cpuinfo")


def describe_environment(threads: int) -> dict[str, str | int]:
    """Versions, the processor's name and the number of threads."""
    return {
        "fxpress": __version__,
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "onnx", "onnxruntime")},
        "cpu": processor(),
        "threads": threads,
    }


def installed(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
