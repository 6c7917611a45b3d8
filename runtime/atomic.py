"""Folders that appear whole or not at all.

The new folder is written beside its destination under a temporary name, then takes the destination's name in one step
of the file system. A process that is killed at any point leaves the old folder or the new one; a leftover temporary
folder is removed by the next writer.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from ..errors import OutputError

_MARK = ".fxpress-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


Names = Callable[[Path], Collection[str]]


def replace_folder(
    target: Path, write: Callable[[Path], None], owned: Callable[[Path], bool], names: Names | None = None
) -> None:
    """Let `write` fill a new folder and put it in the place of `target`.

    An existing `target` is replaced only when it is empty or `owned` says that it is ours, and holds nothing but what
    `names` says is ours in it. Raises OutputError.
    """
    check_writable(target, owned, names)
    _sweep(target)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}{_MARK}{os.getpid()}-", dir=target.parent))
    try:
        write(temporary)
        temporary.chmod(0o755)
        _swap(temporary, target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}", hint=_HINT) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_HINT = "choose a folder that you may write to, on a disk with room"


def check_writable(target: Path, owned: Callable[[Path], bool], names: Names | None = None) -> None:
    """Raise OutputError now, rather than after long work, if `target` cannot be written later."""
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file", hint="choose the name of a folder")
    if target.is_dir() and any(target.iterdir()) and not owned(target):
        raise OutputError(
            f"{target} exists and is no fxpress artifact, so it is left alone",
            hint="choose another folder, or empty it",
        )
    known = names(target) if names is not None and target.is_dir() else None
    others = [] if known is None else sorted(p.name for p in target.iterdir() if p.name not in known)
    if others:
        raise OutputError(
            f"{target} also holds what fxpress did not write ({', '.join(others[:3])}), so it is left alone",
            hint="move that elsewhere, or choose another folder",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}{_MARK}{os.getpid()}-", dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}", hint=_HINT) from error


def _swap(temporary: Path, target: Path) -> None:
    """Give `temporary` the name `target`; afterwards `temporary` holds what was there before, or is gone."""
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        # Without an atomic exchange the old folder is away for the moment between two renames, but never lost.
        old = temporary.with_name(temporary.name + "-old")
        os.rename(target, old)
        os.rename(temporary, target)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux renameat2). False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _sweep(target: Path) -> None:
    """Remove temporary folders whose writers are no longer alive."""
    for left in target.parent.glob(f".{target.name}{_MARK}*"):
        pid = left.name.split(_MARK)[-1].split("-")[0]
        if pid.isdecimal() and not left.name.endswith("-old") and not alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def alive(pid: int) -> bool:
    """Is there a process of that number?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
