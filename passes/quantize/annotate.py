"""Decide, by the target's table alone, what is computed on integers and which tensors are quantized for it.

The result is an `Annotation` on each node (`node.meta["quantize"]`). The rules:
1. A layer (weights), and a product of activations, is computed on integers wherever its row applies. What they read
   is quantized for them, before the moves (reshape, permute) between: 8 bits are cheaper to move than 32.
2. Other ops follow their operands: each must come from integers, or be quantized anyway because a layer reads it.
   (Quantizing a float tensor only to add it costs more than the addition saves.)
3. What no integer op reads in the end is not quantized for its own sake: integer arithmetic without integer readers
   goes back to float. Layers stay; a layer whose row has a float-output kernel gives float to float readers.
4. An activation that directly follows an integer op, as its only reader, is absorbed: the range of the quantization
   does its work, because its smallest stored number is 0 (and its largest at most the activation's own bound).
"""

from __future__ import annotations

import fnmatch
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ...errors import OptionError, did_you_mean
from ...frontend.program import Program, layer_name
from ..rewrite import argument, argument_names, aten, is_constant
from .expand import expand_program, may_turn_on
from .masks import shield_masks
from .reasons import state_reasons, stated_reasons
from .spec import KEPT_FLOAT, LEADING, MOVING, USE_INT16, USE_INTEGER, Row, Target

KEY = "quantize"
ABSORBED = "quantize_absorbed"  # on an activation whose work the quantization after it does


@dataclass
class Annotation:
    """How one node is computed on integers: its row, its activation operands, and the node that bears its output.

    `output` is the node itself or the activation that is absorbed into it; None when the output stays float.
    """

    row: Row
    operands: tuple[fx.Node, ...]
    output: fx.Node | None = None


def annotation(node: fx.Node) -> Annotation | None:
    """What `annotate` decided for a node, or None for float."""
    return node.meta.get(KEY)


def annotate_program(
    program: Program,
    target: Target,
    keep_float: Sequence[str] = (),
    use_integer: Sequence[str] = (),
    use_int16: Sequence[str] = (),
) -> tuple[int, list[str]]:
    """Annotate all nodes; those that a glob of `keep_float` names stay in float (see `named_nodes`), those that one of
    `use_integer` names may use the target's optional rows, those that one of `use_int16` names read and give 16 bits.

    Returns (number of integer nodes, reasons why layers stay in float).
    Raises OptionError for a glob that names nothing, or that has no effect.
    """
    for node in named_nodes(program, keep_float, "keep_float"):
        node.meta[KEPT_FLOAT] = True
    _use_optional_rows(program, target, use_integer)
    _use_int16(program, target, use_int16)
    expand_program(program, target)
    if target.shields_masks:
        shield_masks(program)
    rows = _choose_rows(program, target)
    _demote_unread(program, target, rows)
    if use_int16 and not any(target.widens(n, row) for n in rows for row in target.rows_about(n)):
        raise OptionError(
            f"use_int16: nothing of what {', '.join(use_int16)} names is computed on integers of 8 bits otherwise",
            hint="name layers, products or sums",
        )
    for node, row in rows.items():
        node.meta[KEY] = _annotation(node, row, rows, target)
    state_reasons(program, target, rows)
    return len(rows), _float_layers(program, rows)


def clear_annotations(program: Program) -> None:
    """Forget what was decided."""
    for node in program.graph.nodes:
        for key in (KEY, ABSORBED, KEPT_FLOAT, USE_INTEGER, USE_INT16):
            node.meta.pop(key, None)


def named_nodes(program: Program, globs: Sequence[str], option: str) -> set[fx.Node]:
    """The nodes that `globs` mean: of a node (`conv2d_3`), of a layer or a module with all that is in it
    (`layer4.0.conv1`, `layer4`, `blocks.*.attn`).

    Raises OptionError, which names the `option`, for a glob that names nothing.
    """
    kept: set[fx.Node] = set()
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    for glob in globs:
        named = {n for n in calls if any(fnmatch.fnmatchcase(name, glob) for name in _names(n))}
        if not named:
            known = sorted({layer_name(n) for n in calls})
            raise OptionError(
                f"{option}: {glob!r} names no node and no module of the program",
                hint=did_you_mean(glob, known, "layers") if len(known) < 40 else "see `fxpress inspect` for the names",
            )
        kept |= named
    return kept


def _use_optional_rows(program: Program, target: Target, globs: Sequence[str]) -> None:
    for glob in globs:
        nodes = named_nodes(program, [glob], "use_integer")
        for node in nodes:
            node.meta[USE_INTEGER] = True
        if not any(may_turn_on(n, target) for n in nodes):
            raise OptionError(
                f"use_integer: target {target.name} has no optional row for what {glob!r} names",
                hint=f"its optional forms: {', '.join(n for n, on in target.forms.items() if not on) or 'none'}",
            )


def _use_int16(program: Program, target: Target, globs: Sequence[str]) -> None:
    if globs and target.activation16 is None:
        raise OptionError(f"use_int16: target {target.name} has no activations of 16 bits", hint="use keep_float here")
    for glob in globs:
        for node in named_nodes(program, [glob], "use_int16"):
            node.meta[USE_INT16] = True


def _names(node: fx.Node) -> Iterator[str]:
    """All names a node answers to: its own, its layer's, and those of the modules around it."""
    yield node.name
    path = layer_name(node)
    while path:
        yield path
        path = path.rpartition(".")[0]


# -- rules 1 to 3 --------------------------------------------------------------------------------------------------


def _choose_rows(program: Program, target: Target) -> dict[fx.Node, Row]:
    """Rules 1 and 2, in graph order."""
    rows: dict[fx.Node, Row] = {}
    integer = _read_by_layers(program, target)  # nodes whose value is there as integers
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        row = None if node.meta.get(KEPT_FLOAT) else target.row_for(node)
        if row is not None and row.kind != "float" and _applies(node, row, integer):
            rows[node] = row
            if not row.float_output or row.offers:
                integer.add(node)
        elif target.absorbing(str(node.target)) and node.args[0] in integer:
            integer.add(node)
    return rows


def _read_by_layers(program: Program, target: Target) -> set[fx.Node]:
    """Rule 1: what layers and products read, through moves."""
    calls = [n for n in program.graph.nodes if n.op == "call_function" and not n.meta.get(KEPT_FLOAT)]
    rows = [(n, target.row_for(n)) for n in calls]
    read = {o for n, row in rows if row is not None and row.kind in LEADING for o in operands_of(n, row)}
    moves = {n: row for n, row in rows if row is not None and row.kind in MOVING}
    for node, row in reversed(moves.items()):
        if _all_read(node, read):
            read.add(node)
            sources = [o for o in operands_of(node, row) if _is_one_tensor(o) or o in moves]
            read.update(o for o in sources if _size_read(o, read) >= _size(o))
    return read


def _all_read(node: fx.Node, read: set[fx.Node]) -> bool:
    """Is the value, or are all parts of a split, wanted on integers?"""
    return node in read or (not _is_one_tensor(node) and bool(node.users) and all(u in read for u in node.users))


def _size_read(value: fx.Node, read: set[fx.Node]) -> int:
    """How many numbers the moves of `value` that are wanted on integers hold."""
    return sum(_size(u) for u in value.users if u in read)


def _is_one_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _size(node: fx.Node) -> int:
    """Numbers in the node's value, at the batch of the example; 0 where a size depends on data."""
    forms = [node.meta["val"]] if _is_one_tensor(node) else node.meta.get("val") or ()
    sizes = [[s if isinstance(s, int) else s.node.hint for s in form.shape] for form in forms]
    return 0 if any(s is None for shape in sizes for s in shape) else sum(map(math.prod, sizes))


def _applies(node: fx.Node, row: Row, integer: set[fx.Node]) -> bool:
    if row.kind in LEADING:
        return True
    operands = operands_of(node, row)
    return bool(operands) and all(o in integer for o in operands)


def operands_of(node: fx.Node, row: Row) -> tuple[fx.Node, ...]:
    """The activations that a node reads, in order; lists (as of cat) are flattened, parameters left out."""
    values: list[fx.Node] = []
    known = () if node.target is operator.getitem else argument_names(node)
    named = [argument(node, n) for n in row.operands if n in known] if known else [node.args[0]]
    for value in named:
        candidates: Iterable[object] = value if isinstance(value, (list, tuple)) else (value,)
        values += [v for v in candidates if isinstance(v, fx.Node) and not is_constant(v)]
    return tuple(values)


def _demote_unread(program: Program, target: Target, rows: dict[fx.Node, Row]) -> None:
    """Rule 3, from the outputs backwards."""
    needed: set[fx.Node] = set()  # nodes whose value some integer op reads
    for node in reversed(list(program.graph.nodes)):
        row = rows.get(node)
        if row is None:
            if node in needed and target.absorbing(str(node.target)):
                # It hands the need on to the op that may absorb it.
                needed.add(node.args[0])  # type: ignore[arg-type]
            continue
        if row.kind not in LEADING and node not in needed:
            del rows[node]
            continue
        needed.update(operands_of(node, row))
    _keep_parts(target, rows)


def _keep_parts(target: Target, rows: dict[fx.Node, Row]) -> None:
    """A split on integers gives integers in all its parts: those that only float ops read are dequantized too."""
    for node in [n for n in rows if not _is_one_tensor(n)]:
        for part in node.users:
            row = target.row_for(part)
            if part not in rows and row is not None:
                rows[part] = row


# -- rule 4 --------------------------------------------------------------------------------------------------------


def _annotation(node: fx.Node, row: Row, rows: dict[fx.Node, Row], target: Target) -> Annotation:
    bearer = node
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    operands = tuple(o for o in operands_of(node, row) if o is not joined_addend(node, rows))
    if reader is not None and joined_addend(reader, rows) is node:
        return Annotation(row, operands)
    if reader is not None and row.kind not in MOVING and _vanishes(reader, target):
        bearer = reader
    wanted = any(u in rows and bearer in operands_of(u, rows[u]) for u in bearer.users)
    keep_float = row.float_output and not wanted
    if keep_float:
        return Annotation(row, operands)
    if bearer is not node and str(bearer.target) in target.absorbs:
        bearer.meta[ABSORBED] = True
    return Annotation(row, operands, bearer)


def _vanishes(activation: fx.Node, target: Target) -> bool:
    name = str(activation.target)
    return target.absorbing(name) and (name in target.fuses or can_absorb(activation))


def joined_addend(add: fx.Node, rows: dict[fx.Node, Row]) -> fx.Node | None:
    """The operand of an addition that comes straight from a layer, whose kernel does the addition (`Row.joins`)."""
    row = rows.get(add)
    if row is None or not row.joins:
        return None
    operands = operands_of(add, row)
    layers = [o for o in operands if o in rows and rows[o].kind == "layer" and len(o.users) == 1]
    return layers[0] if layers and len(set(operands)) == 2 else None


def can_absorb(activation: fx.Node) -> bool:
    """Is the activation a clamp that starts at 0, so that an unsigned range can express it?"""
    if activation.target in (aten.relu.default, aten.relu6.default):
        return True
    if activation.target is aten.hardtanh.default:
        return argument(activation, "min_val") == 0
    if activation.target is aten.clamp.default:
        return argument(activation, "min") == 0
    return activation.target is aten.clamp_min.default and activation.args[1] == 0


def upper_bound(activation: fx.Node) -> float | None:
    """The largest value that an absorbed activation lets through, None for no bound."""
    if activation.target is aten.relu6.default:
        return 6.0
    name = {aten.hardtanh.default: "max_val", aten.clamp.default: "max"}.get(activation.target)  # type: ignore[arg-type]
    bound = argument(activation, name) if name else None
    return None if bound is None else float(bound)


def _float_layers(program: Program, rows: dict[fx.Node, Row]) -> list[str]:
    """Reasons for the nodes with weights that are not computed on integers."""
    stated = stated_reasons(program)
    layers = [n for n in program.graph.nodes if n.op == "call_function" and n not in rows and _has_weights(n)]
    return [f"{layer_name(n)} stays in float: {stated[n.name][0]}" for n in layers]


def _has_weights(node: fx.Node) -> bool:
    """A parameter of at least two dims is read directly (conv, linear, matmul with a parameter)."""
    values = [n.meta.get("val") for n in node.all_input_nodes if n.op == "get_attr"]
    return any(isinstance(v, torch.Tensor) and v.ndim >= 2 for v in values)
