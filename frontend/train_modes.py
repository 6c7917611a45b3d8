"""What of a module's behaviour in training a program cannot have, since it is captured in evaluation mode.

Modes that operators take as an argument (BatchNorm, dropout, recurrent layers) are switched by `Program.train`. What a
module decides in Python while it is traced (random depth, dropout inside attention) leaves no trace of the other
branch; `training_notes` says so.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Hashable, Iterator
from typing import cast

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm

from .program import Program

UNTRAINED = "fxpress_untrained"  # in a program's meta: the notes
_MOMENTUM = 0.1  # torch's own default
# Their operators have the mode as an argument.
_SWITCHED = (nn.modules.dropout._DropoutNd, nn.RNNBase, _NormBase)


def differences_in_training(module: nn.Module) -> list[str]:
    """Where a program of `module` will train otherwise than it, as notes. Norms without momentum, which average over
    all batches, get one, in place: a graph cannot count."""
    averaging = []
    for name, part in module.named_modules():
        if isinstance(part, _NormBase) and part.track_running_stats and part.momentum is None:
            part.momentum = _MOMENTUM
            averaging.append(name)
    random = [name or type(part).__name__ for name, part in module.named_modules() if _is_random(part)]
    spectral = [_owner(name) or type(module).__name__ for name, part in module.named_modules() if _is_spectral(part)]
    own = [name or type(part).__name__ for name, part in module.named_modules() if _has_own_train(part)]
    notes = []
    if averaging:
        notes.append(f"{_listed(averaging)}: average over all batches (momentum=None), here with momentum {_MOMENTUM}")
    if random:
        notes.append(f"{_listed(random)}: what is dropped at random in training is not dropped here")
    if spectral:
        notes.append(f"{_listed(spectral)}: the norm that spectral_norm divides by stays that of capture")
    if own:
        notes.append(f"{_listed(own)}: what the module's own train() does is not followed")
    return notes


def training_notes(program: Program) -> list[str]:
    """What people should know before they train a captured program."""
    return list(program.graph_module.meta.get(UNTRAINED, ()))


def _is_spectral(part: nn.Module) -> bool:
    """Does it track the largest singular value of a weight? In evaluation the vectors that find it stand still."""
    hooks = part._forward_pre_hooks.values()
    return isinstance(part, parametrizations._SpectralNorm) or any(isinstance(h, SpectralNorm) for h in hooks)


def _owner(name: str) -> str:
    """The layer that a parametrization belongs to."""
    return name.partition("parametrizations")[0].rstrip(".")


def _has_own_train(part: nn.Module) -> bool:
    """Does a class outside torch decide itself what training means (as by keeping its norms in evaluation)?"""
    owner = next((c for c in type(part).__mro__ if "train" in vars(c)), nn.Module)
    return not owner.__module__.startswith("torch.")


def _is_random(part: nn.Module) -> bool:
    """Does a module's own code look at the mode, and may that drop something? (Chances of zero drop nothing.)"""
    if isinstance(part, nn.MultiheadAttention):
        return part.dropout > 0
    if isinstance(part, nn.RReLU):  # in evaluation a leaky ReLU
        return True
    own = not isinstance(part, _SWITCHED) and not type(part).__module__.startswith("torch.")
    if not own or not _reads_mode(cast(Hashable, type(part))):
        return False
    chances = list(_chances(part))
    return any(chances) or not chances


def _chances(part: nn.Module) -> Iterator[bool]:
    """Whether each number of a module that looks like a probability of dropping is positive."""
    for name, value in vars(part).items():
        if (name == "p" or "drop" in name) and isinstance(value, (int, float)):
            yield value > 0
    for child in part.children():
        if isinstance(child, nn.modules.dropout._DropoutNd):
            yield child.p > 0


@functools.cache
def _reads_mode(kind: Hashable) -> bool:
    try:
        return ".training" in inspect.getsource(kind.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):  # made in an interactive session
        return False


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
