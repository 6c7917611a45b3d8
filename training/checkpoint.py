"""Checkpoints of a training: one folder with the tensors (safetensors) and the position (JSON), never a pickle.

The folder is replaced whole: a run that is killed at any moment leaves the checkpoint before or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import TrainingError, first_line
from ..runtime.atomic import check_writable, replace_folder

_FORMAT = 2
_STATE, _TENSORS = "training.json", "tensors.safetensors"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch came to: mean training loss, metric (None without one), the learning rate at its end."""

    epoch: int
    loss: float
    metric: float | None
    learning_rate: float


@dataclass
class Position:
    """Where a training stands. `epoch` and `batch`: what comes next; `step`: number of steps done.

    `loss`: sum over the batches of this epoch; `factor`: what a plateau has left of the learning rate; `stale`: epochs
    in a row without a better metric; `best`: the best metric (the least loss, negated, without one).
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss: float = 0.0
    factor: float = 1.0
    stale: int = 0
    best: float | None = None
    finished: bool = False
    history: list[EpochRecord] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A training as it was after some step: its position, all tensors by kind and name, and other JSON values."""

    position: Position
    tensors: dict[str, Tensors]
    extra: dict[str, Any] = field(default_factory=dict)


class CheckpointFolder:
    """The folder of one run. `run` describes the run in JSON values: a checkpoint of another run is refused."""

    def __init__(self, path: str | Path, run: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.run = json.loads(json.dumps(run, default=lambda value: value.item()))  # numpy's numbers

    def check(self) -> None:
        """Raise OutputError now if the folder cannot be written later."""
        check_writable(self.path, is_checkpoint, _files)

    def write(self, checkpoint: Checkpoint) -> None:
        """Replace what is there. Raises OutputError, and leaves it alone, where writing fails (a full disk)."""
        named = {f"{kind}/{n}": t for kind, tensors in checkpoint.tensors.items() for n, t in tensors.items()}
        state = {
            "format": _FORMAT, "run": self.run, "position": asdict(checkpoint.position), "extra": checkpoint.extra,
            "checksum": digest(named),
        }  # fmt: skip

        def fill(folder: Path) -> None:
            try:
                save_file({n: t.detach().cpu().contiguous().clone() for n, t in named.items()}, folder / _TENSORS)
            except SafetensorError as error:
                raise OSError(first_line(error)) from error
            (folder / _STATE).write_text(json.dumps(state), encoding="utf-8")
            for name in (_TENSORS, _STATE):
                _flush(folder / name)

        replace_folder(self.path, fill, is_checkpoint, _files)

    def read(self) -> Checkpoint | None:
        """What is there, or None in an empty or absent folder. Raises TrainingError for another run's, or damage."""
        if not is_checkpoint(self.path):
            return None
        try:
            state = json.loads((self.path / _STATE).read_text(encoding="utf-8"))
            flat = load_file(self.path / _TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise TrainingError(
                f"the checkpoint {self.path} cannot be read: {first_line(error)}", hint="remove it, and start again"
            ) from error
        try:
            self._require_same(state)
            position = Position(**state["position"])
            position.history = [EpochRecord(**r) for r in state["position"]["history"]]
            extra, checksum = state["extra"], state["checksum"]
        except (AttributeError, KeyError, TypeError) as error:
            raise self._damaged(f"{_STATE} lacks what it needs ({type(error).__name__}: {error})") from error
        if checksum != digest(flat):
            raise self._damaged("its tensors are not those that were written")
        tensors: dict[str, Tensors] = {}
        for name, tensor in flat.items():
            kind, _, rest = name.partition("/")
            tensors.setdefault(kind, {})[rest] = tensor
        return Checkpoint(position, tensors, extra)

    def _damaged(self, what: str) -> TrainingError:
        return TrainingError(f"the checkpoint {self.path} is damaged: {what}", hint="remove it, and start again")

    def _require_same(self, state: dict[str, Any]) -> None:
        hint = "give the options and the program of that run, or another checkpoint folder"
        if state.get("format") != _FORMAT:
            raise TrainingError(f"the checkpoint {self.path} has the format {state.get('format')}", hint=hint)
        if changed := first_difference(state["run"], self.run):
            name, before, now = changed
            what = f"{name} was {_short(before)}, is {_short(now)}"
            raise TrainingError(f"the checkpoint {self.path} is of another run: {what}", hint=hint)


def _files(path: Path) -> tuple[str, ...]:
    """What a training writes into its folder."""
    return _STATE, _TENSORS


def is_checkpoint(path: Path) -> bool:
    """Did a training write this folder?"""
    return (path / _STATE).is_file()


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A checksum of names, shapes and values."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """(where, old, new) of the first difference between two descriptions; None where they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{path}.{k}" if path else k, old.get(k), new.get(k)) for k in sorted({*old, *new})]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{path}.{i}", a, b) for i, (a, b) in enumerate(zip(old, new))]
    else:
        return None if old == new else (path, old, new)
    return next((found for p, a, b in pairs if (found := first_difference(a, b, p))), None)


def _flush(path: Path) -> None:
    """Have the disk hold the file before its folder gets its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
