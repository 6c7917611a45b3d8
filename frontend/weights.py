"""Weights from a file into a module, strictly: every name and shape must fit, or an error lists what does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import WeightsError, first_line
from .program import Program

# Keys under which training frameworks keep the state dict inside a checkpoint, best first.
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "params",
    "weights",
)
# Prefixes that wrappers such as DataParallel and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 8


def load_weights(module: torch.nn.Module, path: str | Path) -> list[str]:
    """Load a safetensors file or a checkpoint (`weights_only=True`) into `module`, in place.

    Returns notes on how the state dict was found. Raises WeightsError: unreadable, no state dict inside, names or
    shapes that do not fit (all listed), values that are NaN or infinite.
    """
    path = Path(path)
    found, notes = find_state_dict(read_checkpoint(path))
    state, stripped = strip_prefixes(found, set(module.state_dict()))
    notes += stripped
    check_fit(module, state, path)
    check_finite(state, str(path))
    module.load_state_dict(state, strict=False)
    return notes


def read_checkpoint(path: Path) -> Any:
    """The content of a weights file: a mapping, as it was saved. Nothing is unpickled but tensors and plain values."""
    if not path.is_file():
        raise WeightsError(f"no such weights file: {path}", hint="check the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own message advises to unpickle whatever the file holds.
        pickled = "weights_only" in str(error)
        why = "it holds more than tensors and plain values, or is no checkpoint" if pickled else first_line(error)
        raise WeightsError(
            f"cannot read weights from {path}: {why}",
            hint="save them with safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')",
        ) from error


def find_state_dict(content: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The mapping name -> tensor inside a checkpoint, and a note on where it was."""
    trail: list[str] = []
    while isinstance(content, Mapping):
        if content and all(isinstance(v, torch.Tensor) for v in content.values()):
            return dict(content), [f"weights found under {'.'.join(trail)!r}"] if trail else []
        inner = next((k for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        trail.append(inner)
        content = content[inner]
    keys = ", ".join(map(str, list(content)[:_SHOWN])) if isinstance(content, Mapping) else type(content).__name__
    raise WeightsError(
        f"the checkpoint holds no state dict (found: {keys or 'nothing'})",
        hint=f"save model.state_dict(), by itself or under one of: {', '.join(_WRAPPERS)}",
    )


def strip_prefixes(state: dict[str, torch.Tensor], wanted: set[str]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Take off a wrapper's prefix that every name has, as long as the names do not fit as they are."""
    notes: list[str] = []
    while not wanted & set(state):
        prefix = next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None)
        if prefix is None:
            break
        state = {k.removeprefix(prefix): v for k, v in state.items()}
        notes.append(f"prefix {prefix!r} stripped from every weight's name")
    return state, notes


def check_fit(module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Raise WeightsError that lists missing and unexpected names and shapes that differ."""
    own = module.state_dict()
    # Counters of batches seen take no part in inference, and older checkpoints lack them.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k}: file {list(state[k].shape)}, model {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    lines = [_listed("missing", missing), _listed("unexpected", unexpected), _listed("wrong shape", shapes)]
    if any(lines):
        raise WeightsError(
            f"the weights in {path} do not fit {type(module).__name__}:\n" + "\n".join(x for x in lines if x),
            hint="use the weights of this very architecture, with the same number of classes",
        )


def check_finite(state: Mapping[str, torch.Tensor], where: str | None = None) -> None:
    """Raise WeightsError that names the tensors with NaN or infinite values."""
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise WeightsError(
            f"{len(bad)} of {len(state)} weights hold NaN or infinity\n" + _listed("not finite", bad),
            where=where,
            hint="the training diverged or the file is damaged: use an earlier checkpoint",
        )


def check_program_finite(program: Program) -> None:
    """`check_finite` on everything that a program's graph reads. Masks that hold -inf on purpose are no weights."""
    check_finite(dict(program.named_parameters()))


def _listed(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"  {title} ({len(names)}): {', '.join(names[:_SHOWN])}{more}"
