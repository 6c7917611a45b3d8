"""Put an observer on every tensor that will be quantized, and run calibration data through them.

An observed tensor x is read through `observe(x)`. Where x comes from an integer op, everybody reads it there (the float
value does not exist on the target); where x comes from a float op or is an input, only integer readers do.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from ...errors import DataError, QuantizationError
from ...frontend.batch_dim import batched, count_examples
from ...frontend.operators import declare_operators
from ...frontend.program import Program, layer_name
from ..base import Context
from ..rewrite import call_after, is_op
from .annotate import annotation, upper_bound
from .conditions import rescaling
from .ranges.channels import RangeChoice
from .ranges.observers import Observer, make_observer
from .running import Runner, in_parts
from .shared_calibration import merge_observed, own_batches
from .spec import MOVING, NumberFormat, QuantParams


@dataclass
class Site:
    """One observed tensor: its observer, or where its parameters come from instead.

    `shared` names another site with the same integers (moves), whose scale is multiplied by `factor`, `fixed` gives
    known parameters, `tied` those that it shares with what it is concatenated with, `bound` caps the range from above
    (an absorbed activation's own limit), `form` is its number format where that is not the target's own. `layer` is the
    name of the float node.
    """

    key: int
    layer: str
    observer: Observer | None = None
    shared: int | None = None
    fixed: QuantParams | None = None
    bound: float | None = None
    form: NumberFormat | None = None
    factor: float = 1.0
    tied: QuantParams | None = None


@dataclass
class Sites:
    """All sites of a program, by key; kept in `graph_module.meta["observers"]`."""

    by_key: dict[int, Site] = field(default_factory=dict)
    samples: int = 0

    def root(self, key: int) -> Site:
        """The site that decides the parameters of `key`, following sharing."""
        site = self.by_key[key]
        return self.root(site.shared) if site.shared is not None else site

    def factor(self, key: int) -> float:
        """What the scale of `key`'s root is multiplied by on the way to it."""
        site = self.by_key[key]
        return site.factor * (self.factor(site.shared) if site.shared is not None else 1.0)


def sites_of(program: Program) -> Sites:
    """The observers in a program. Raises QuantizationError when there are none."""
    sites = program.graph_module.meta.get("observers")
    if sites is None:
        raise QuantizationError("the program has no observers", hint="run the pass `observe` before this one")
    return sites


def insert_observers(program: Program, ranges: RangeChoice) -> int:
    """Insert `observe` nodes, with observers made by `ranges`, for all annotations. Returns how many."""
    declare_operators()
    sites = Sites()
    observed: dict[fx.Node, dict[NumberFormat | None, fx.Node]] = {}  # tensor -> its observe nodes, by format
    for node in list(program.graph.nodes):
        note = annotation(node)
        if note is None:
            continue
        for operand in filter(_is_tensor, note.operands):
            _observe_operand(sites, observed.setdefault(operand, {}), node, operand, ranges)
        if note.output is not None and _is_tensor(note.output):
            site = _add_site(sites, note.output, ranges, note.row.activation)
            describe_site(site, node)
            if site.shared is not None:
                site.form = sites.root(site.key).form
            readers = list(note.output.users)
            observed[note.output] = {site.form: _observe_node(note.output, site)}
            for reader in readers:
                reader.replace_input_with(note.output, observed[note.output][site.form])
    _never_clip_outputs(program, sites)
    program.graph_module.meta["observers"] = sites
    return len(sites.by_key)


def _never_clip_outputs(program: Program, sites: Sites) -> None:
    """The largest values of an output are what it is read for (the class with the highest score), so the rules that
    clip them for the sake of the others do not apply: its range is all that was seen."""
    for node in program.output_nodes():
        if node.target is torch.ops.fxpress.observe.default:
            root = sites.root(int(node.args[1]))  # type: ignore[arg-type]
            if root.observer is not None:
                root.observer = make_observer("minmax")


def _observe_operand(
    sites: Sites, observed: dict[NumberFormat | None, fx.Node], node: fx.Node, operand: fx.Node, ranges: RangeChoice
) -> None:
    """Let `node` read `operand` through an observer of the format that it computes on.

    The output of an integer op has been observed already, and everybody reads it there; of other tensors the float
    readers keep the float. A tensor that is there in another format is observed again, behind its observer: it is
    converted.
    """
    note = annotation(node)
    assert note is not None
    form = note.row.activation
    if note.row.kind in MOVING and observed:  # takes what is there
        form = next(iter(observed))
    read = operand if operand in node.all_input_nodes else next(iter(observed.values()))
    if form not in observed:
        observed[form] = _observe_node(read, _add_site(sites, operand, ranges, form))
    node.replace_input_with(read, observed[form])


def _add_site(sites: Sites, tensor: fx.Node, ranges: RangeChoice, form: NumberFormat | None = None) -> Site:
    name = (tensor.meta.get("custom") or {}).get("float_name", tensor.name)
    site = Site(len(sites.by_key), name, ranges.observer(form), form=form)
    sites.by_key[site.key] = site
    return site


def _observe_node(tensor: fx.Node, site: Site) -> fx.Node:
    node = call_after(tensor, torch.ops.fxpress.observe.default, tensor, site.key)
    node.meta["custom"] = {**node.meta.get("custom", {}), "layer": site.layer, "module": layer_name(tensor)}
    return node


def describe_site(site: Site, node: fx.Node) -> None:
    """Say where the parameters of an integer op's output come from, other than from observing it."""
    note = annotation(node)
    assert note is not None
    if note.row.kind in MOVING:
        site.shared, site.observer = _key_before(node), None
        site.factor = rescaling(node) if note.row.kind == "rescale" else 1.0
    elif note.row.fixed is not None:
        site.fixed, site.observer = note.row.fixed, None
    if note.output is not None and note.output is not node:
        site.bound = upper_bound(note.output)


def _is_tensor(node: fx.Node) -> bool:
    """Not the list that split and chunk give; its parts are tensors."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def _key_before(node: fx.Node) -> int:
    """The key of the observe node that a move reads, directly or as part of a split."""
    source = node.all_input_nodes[0]
    while source.target is not torch.ops.fxpress.observe.default:
        source = source.all_input_nodes[0]
    return int(source.args[1])  # type: ignore[arg-type]


def calibrate_program(program: Program, batches: Iterable[tuple[torch.Tensor, ...]], context: Context) -> int:
    """Run all batches and let the observers see them. Memory is that of a small part of a batch. Returns the number of
    samples."""
    sites = sites_of(program)
    if program.training:
        raise QuantizationError("the program is in training mode", hint="call program.eval() first")
    with contextlib.closing(Runner(program)) as runner:
        count = _observe_batches(program, runner, own_batches(batches, context.processes), context)
    if sites.samples and context.processes is not None:
        raise QuantizationError("these observers have seen data before", hint="calibrate again in one process")
    observing = {f"{s.key} {s.layer}": s for s in sites.by_key.values() if s.observer is not None}
    merged, count = merge_observed({name: s.observer for name, s in observing.items()}, count, context.processes)
    for name, observer in merged.items():
        observing[name].observer = observer
    if count == 0:
        raise DataError("the calibration data is empty", hint="give at least one batch, better 100 to 1000 samples")
    sites.samples += count
    return count


def _observe_batches(
    program: Program, runner: Runner, batches: Iterable[tuple[torch.Tensor, ...]], context: Context
) -> int:
    """Show all batches to the observers. Returns the number of samples."""
    sites, count, inner = sites_of(program), 0, _inner_batch(program)
    for batch in batches:
        for part in in_parts(program, batch):
            samples = count_examples(program.inputs, part)
            runner.run_batch(part, functools.partial(_show, sites, samples, inner))
            count += samples
        if context.progress:
            context.progress("calibrate", count, None)
    return count


def _inner_batch(program: Program) -> dict[int, int]:
    """The dims of the batch, by site, where that is not the first: tokens of [tokens, batch, features], say."""
    whose = batched(program.inputs)
    if not any(whose):
        return {}
    batch = program.tensor_placeholders()[whose.index(True)].meta["val"].shape[0]
    found = {}
    for node in program.graph.nodes:
        if is_op(node, torch.ops.fxpress.observe.default):
            sizes = node.args[0].meta["val"].shape
            dims = [i for i, size in enumerate(sizes) if str(size) == str(batch)]
            if len(dims) == 1 and isinstance(sizes[0], int):
                found[node.args[1]] = dims[0]
    return found


def _show(sites: Sites, samples: int, inner: dict[int, int], key: int, value: torch.Tensor) -> torch.Tensor:
    """Let the observer of a site see its value, examples first."""
    site = sites.by_key[key]
    if site.observer is not None:
        seen = value.movedim(inner[key], 0) if key in inner else value
        try:
            site.observer.observe(seen, samples)
        except QuantizationError as error:
            raise QuantizationError(f"{site.layer}: {error.message}", hint=error.hint) from error
    return value
