"""What a result was measured on. Free of torch, unless it is loaded already."""

from __future__ import annotations

import contextlib
import hashlib
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


def processor_kind() -> str:
    """The processor's name and a digest of what it can do: virtual machines give processors of several generations one
    name, and ARM gives none."""
    kinds = ("flags", "Features", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
    lines: list[str] = []
    with contextlib.suppress(OSError):
        first = _CPUINFO.read_text().partition("\n\n")[0]
        lines = [line for line in first.splitlines() if line.partition(":")[0].strip() in kinds]
    return f"{processor()} ({hashlib.sha256(repr(lines).encode()).hexdigest()[:8]})"
