"""Which parameters are trained, and which of them decay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import fx, nn

from ..errors import OptionError, TrainingError
from ..frontend.program import Program
from .options import Group

_NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
Named = dict[str, nn.Parameter]


def trainable(program: Program, freeze: tuple[str, ...]) -> Named:
    """The floating parameters that ask for gradients, without those that `freeze` names.

    Raises OptionError for a glob that matches nothing, TrainingError where nothing is left.
    """
    named = {n: p for n, p in program.named_parameters() if p.is_floating_point()}
    for glob in freeze:
        if not any(fnmatchcase(n, glob) for n in named):
            hint = f"names look like {', '.join(list(named)[:3])}"
            raise OptionError(f"freeze={glob!r} matches no parameter", hint=hint)
    left = {n: p for n, p in named.items() if p.requires_grad and not any(fnmatchcase(n, g) for g in freeze)}
    if not left:
        why = "all parameters are frozen" if named else "this program has no floating parameters"
        raise TrainingError(why, hint="train before folding quantization; requires_grad_(True) thaws a parameter")
    return left


@contextmanager
def only(program: Program, chosen: Named) -> Iterator[None]:
    """Let nothing but `chosen` have gradients within the block."""
    before = {n: p.requires_grad for n, p in program.named_parameters()}
    try:
        for name, parameter in program.named_parameters():
            parameter.requires_grad_(name in chosen)
        yield
    finally:
        for name, parameter in program.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(before[name])


def decay_groups(chosen: Named, norms: set[str], tables: set[str], weight_decay: float) -> list[Group]:
    """Parameters of two dimensions or more decay; `norms`, biases and scales do not (Goyal et al. 2017).

    Lookup `tables` decay too, in a group of their own: an optimizer for matrices has no use for them.
    """
    plain = [p for n, p in chosen.items() if p.ndim < 2 or n in norms]
    decaying = [p for n, p in chosen.items() if not (p.ndim < 2 or n in norms or n in tables)]
    looked_up = [p for n, p in chosen.items() if p.ndim >= 2 and n in tables]
    groups = [
        Group(params=decaying, weight_decay=weight_decay),
        Group(params=plain, weight_decay=0.0, matrices=False),
        Group(params=looked_up, weight_decay=weight_decay, matrices=False),
    ]
    return [g for g in groups if g["params"]]


def norm_parameters(program: Program) -> set[str]:
    """Names of the parameters that only normalizations read."""
    reads = [n for n in program.graph.nodes if n.op == "get_attr" and n.users]
    return {str(n.target) for n in reads if all(_is_norm(user) for user in n.users)}


def _is_norm(node: fx.Node) -> bool:
    return any(norm in str(node.target) for norm in _NORMS)
