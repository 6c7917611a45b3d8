"""Which parameters are trained, and which of them decay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from ..errors import OptionError, TrainingError
from ..frontend.cost import op_name
from ..frontend.program import Program
from .options import Group

_ARITHMETIC = ("aten.mul", "aten.add", "aten.sub", "aten.div")
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


@contextmanager
def given_back(objective: Any) -> Iterator[None]:
    """Leave an objective's own weights (adapters) on the CPU after the block: trained, or as they were where it was
    left by an error, so that the same call can go on from its checkpoint."""
    if not isinstance(objective, nn.Module):
        yield
        return
    before = {n: t.detach().clone() for n, t in objective.state_dict().items()}
    try:
        yield
    except BaseException:
        objective.to("cpu").load_state_dict(before)
        raise
    finally:
        objective.to("cpu").zero_grad()


def decay_groups(chosen: Named, norms: set[str], tables: set[str], weight_decay: float) -> list[Group]:
    """Parameters of two dimensions or more decay; `norms`, biases of any shape and scales do not (Goyal et al. 2017).

    Lookup `tables` decay too, in a group of their own: an optimizer for matrices has no use for them.
    """
    plain = {n: p for n, p in chosen.items() if p.ndim < 2 or n in norms or n.endswith("bias")}
    looked_up = {n: p for n, p in chosen.items() if n in tables and n not in plain}
    decaying = {n: p for n, p in chosen.items() if n not in plain and n not in looked_up}
    groups = [
        Group(params=list(decaying.values()), weight_decay=weight_decay),
        Group(params=list(plain.values()), weight_decay=0.0, matrices=False),
        Group(params=list(looked_up.values()), weight_decay=weight_decay, matrices=False),
    ]
    return [g for g in groups if g["params"]]


def norm_parameters(program: Program) -> set[str]:
    """Names of the parameters that only normalizations read, or, with one size above 1, only elementwise arithmetic:
    the scale and shift of a norm or of a residual branch that is written by hand ([C, 1, 1])."""
    readers: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.users:
            readers.setdefault(str(node.target), []).extend(node.users)
    one_size = {n for n, p in program.named_parameters() if sum(size > 1 for size in p.shape) <= 1}
    norms = {n for n, users in readers.items() if all(map(_is_norm, users))}
    return norms | {n for n in one_size & readers.keys() if all(op_name(u) in _ARITHMETIC for u in readers[n])}


def _is_norm(node: fx.Node) -> bool:
    return any(norm in str(node.target) for norm in _NORMS)
