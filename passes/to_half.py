"""float16: weights and activations at half the size, with what overflows or loses kept in float32.

float16 has 11 significant bits and ends at 65504; below 6.1e-5 it loses bits. What sums or exponentiates many values
(softmax, normalizations, reductions) is kept in float32 by a table, and so is what a run on data shows to come too near
to the end of the range (Micikevicius et al. 2018, "Mixed Precision Training", keep the same ops in float32).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import FxpressError
from ..frontend.program import Program, layer_name
from .base import INTERFACE, Change, Context, Pass, register_pass
from .rewrite import aten, call_before, constant, fake_like, is_op, refuse_quantized, set_attribute

HALF = torch.float16
LARGEST = 65504.0
HEADROOM = 4.0  # values unseen may be this much larger than those seen
SMALLEST = 2.0**-14  # below this float16 has fewer bits
FAINT = 2.0**-10  # where nothing is larger than this, most values are below SMALLEST

# Sums of many values, powers and exponentials. Names without overload.
FLOAT_OPS = frozenset(
    f"aten.{name}"
    for name in (
        "softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp", "layer_norm", "group_norm", "instance_norm",
        "batch_norm", "rms_norm", "scaled_dot_product_attention", "mean", "sum", "var", "var_mean", "std", "norm",
        "linalg_vector_norm", "prod", "cumsum", "cumprod", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p",
        "pow", "square", "rsqrt", "reciprocal", "softplus", "erfinv", "cosine_similarity", "cdist", "lstm", "gru",
        "rnn_tanh", "rnn_relu", "arange", "grid_sampler", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
        "adaptive_avg_pool3d", "upsample_bilinear2d", "upsample_bicubic2d",
    )
)  # fmt: skip


@register_pass
@dataclass(frozen=True)
class ToHalf(Pass):
    """Compute in float16 where that is safe; inputs and outputs stay float32.

    1. Ops of a table (softmax, normalizations, reductions, exponentials, recurrent layers) stay in float32.
    2. So does what holds numbers that float16 cannot: weights beyond 65504, values within a factor of 4 of it on the
       data (calibration data where given, else the example inputs), literals beyond its range, and tensors of which
       nothing is larger than 2^-10, since float16 loses bits below 2^-14.
    3. So does what PyTorch has no float16 kernel for on this processor, and what names its dtype itself.
    4. So do transposes of what is float32: the conversion comes behind them. (ONNX Runtime 1.31 crashes on a file in
       which a product reads a transposed conversion of an input.)
    """

    name = "to-half"
    preserves = frozenset({INTERFACE})

    def run(self, program: Program, context: Context) -> Change:
        refuse_quantized(program, "float16 is for what is computed in float: put to-half in the place of quantize")
        reasons = _unsafe_by_value(program, _batches(program, context))
        reasons |= dict(_unsafe_by_form(program))
        reasons |= _without_kernel(program, set(reasons))
        reasons |= dict.fromkeys(_transposes(program, set(reasons)), _BESIDE)
        count = halve(program, set(reasons))
        if count == 0:
            raise FxpressError("nothing of this program can be computed in float16", hint="use the recipe `float`")
        return Change(count, _notes(program, reasons, context))


def _notes(program: Program, reasons: dict[str, str], context: Context) -> list[str]:
    notes = ["ONNX Runtime computes most float16 ops on x86 by way of float32: half the size, but no faster"]
    if context.calibration is None:
        notes.append("overflow was looked for on the example inputs alone: calibration data would show more of it")
    named = {n.name: n for n in program.graph.nodes}
    notes += [f"{layer_name(named[n])} stays in float32: {why}" for n, why in reasons.items() if why not in _QUIET]
    return notes


# -- what stays in float32 -----------------------------------------------------------------------------------------

_TABLE = "it sums or exponentiates"
_EXPLICIT = "it names its dtype"
_BESIDE = "it transposes what is in float32"
_QUIET = (_TABLE, _EXPLICIT, _BESIDE)
_TRANSPOSES = (aten.transpose.int, aten.permute.default, aten.t.default)


def _unsafe_by_form(program: Program) -> Iterator[tuple[str, str]]:
    """What the table, the literals and the weights say, without running anything. (node name, reason)."""
    for node in program.graph.nodes:
        if node.op != "call_function" or not _computes_float(node):
            continue
        if str(node.target).rpartition(".")[0] in FLOAT_OPS:
            yield node.name, _TABLE
        elif _names_dtype(node):
            yield node.name, _EXPLICIT
        elif (literal := _odd_literal(node)) is not None:
            yield node.name, f"float16 cannot hold its number {literal:g}"
        elif (fault := _odd_weight(program, node)) is not None:
            yield node.name, fault


def _transposes(program: Program, kept: set[str]) -> list[str]:
    """Transposes whose operand is an input, or given by what stays in float32."""
    found: list[str] = []
    for node in program.graph.nodes:
        source = node.args[0] if is_op(node, *_TRANSPOSES) else None
        if isinstance(source, fx.Node) and (source.op == "placeholder" or source.name in kept or source.name in found):
            found.append(node.name)
    return [name for name in found if name not in kept]


def _computes_float(node: fx.Node) -> bool:
    """Does a float32 tensor go in or come out?"""
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    return any(_is_single(v) for value in values for v in pytree.tree_leaves(value))


def _is_single(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32


def _names_dtype(node: fx.Node) -> bool:
    return any(isinstance(a, torch.dtype) for a in pytree.tree_leaves((node.args, dict(node.kwargs))))


def _odd_literal(node: fx.Node) -> float | None:
    """A number among the arguments that is finite and, as float16, infinite, zero or of few bits."""
    numbers = [a for a in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(a, float)]
    odd = (a for a in numbers if math.isfinite(a) and a != 0 and not SMALLEST <= abs(a) <= LARGEST)
    return next(odd, None)


def _odd_weight(program: Program, node: fx.Node) -> str | None:
    """What float16 cannot hold of the parameters that a node reads. Of vectors (biases) faint ones do no harm."""
    held = [constant(program, n) for n in node.all_input_nodes if n.op == "get_attr"]
    singles = [t for t in held if isinstance(t, torch.Tensor) and t.dtype is torch.float32]
    faults = (_fault(_peak(t), LARGEST, FAINT if t.ndim > 1 else 0.0, "weight") for t in singles)
    return next((f for f in faults if f is not None), None)


def _fault(peak: float, largest: float, faint: float, what: str) -> str | None:
    """Why numbers with this largest magnitude do not fit."""
    if peak > largest:
        return f"its largest {what} is {peak:g}; float16 ends at {LARGEST:g}"
    return f"its largest {what} is {peak:g}; float16 loses bits below {SMALLEST:g}" if 0 < peak < faint else None


def _peak(tensor: torch.Tensor) -> float:
    if not tensor.numel():
        return 0.0
    magnitude = tensor.detach().abs()
    return float(torch.where(torch.isfinite(magnitude), magnitude, 0.0).max())


# -- by running ----------------------------------------------------------------------------------------------------


def _batches(program: Program, context: Context) -> Iterable[tuple[Any, ...]]:
    """Flat inputs to look at: of the calibration data, and the example inputs."""
    yield program.example_inputs
    for batch in context.calibration or ():
        given = iter(batch)
        yield tuple(next(given) if isinstance(e, torch.Tensor) else e for e in program.example_inputs)


def _unsafe_by_value(program: Program, batches: Iterable[tuple[Any, ...]]) -> dict[str, str]:
    """Nodes that give or read float32 values near either end of float16's range."""
    watch = _Peaks(program.graph_module)
    with torch.no_grad():
        for leaves in batches:
            watch.run(*leaves, enable_io_processing=False)
    faults = {name: _fault(peak, LARGEST / HEADROOM, FAINT, "value") for name, peak in watch.peaks.items()}
    reasons = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and _computes_float(node):
            met = [faults.get(n.name) for n in (node, *node.all_input_nodes) if n.op != "get_attr"]
            if (fault := next((f for f in met if f is not None), None)) is not None:
                reasons[node.name] = fault
    return reasons


class _Peaks(fx.Interpreter):
    """The largest finite magnitude of every float32 tensor that a run meets; a finite maximum, since -inf is a mask."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.peaks: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for tensor in pytree.tree_leaves(value):
            if _is_single(tensor):
                self.peaks[n.name] = max(self.peaks.get(n.name, 0.0), _peak(tensor))
        return value


def _without_kernel(program: Program, kept: set[str]) -> dict[str, str]:
    """Nodes that fail in float16 here, found by running a converted copy on the example inputs until none fails."""
    missing: dict[str, str] = {}
    while True:
        trial = program.copy()
        halve(trial, kept | set(missing))
        failed = _first_failure(trial)
        if failed is None:
            return missing
        name, message = failed
        if name in kept or name in missing:
            raise FxpressError(f"{name} cannot run beside float16: {message}", hint="report it with the model")
        missing[name] = f"PyTorch has no float16 kernel for it here ({message})"


class _Failing(fx.Interpreter):
    """Remembers which node raised."""

    at = ""

    def run_node(self, n: fx.Node) -> Any:
        self.at = n.name
        return super().run_node(n)


def _first_failure(program: Program) -> tuple[str, str] | None:
    runner = _Failing(program.graph_module, garbage_collect_values=True)
    try:
        with torch.no_grad():
            runner.run(*program.example_inputs, enable_io_processing=False)
    except (RuntimeError, TypeError) as error:  # what torch raises for a dtype without a kernel
        return runner.at, str(error).splitlines()[0]
    return None


# -- the rewriting -------------------------------------------------------------------------------------------------


def halve(program: Program, kept: set[str]) -> int:
    """Convert in place all float32 computation but that of the nodes named in `kept`. Returns how many are float16."""
    return _Halving(program, kept).run()


@dataclass
class _Halving:
    program: Program
    kept: set[str]
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = field(default_factory=dict)

    def run(self) -> int:
        count = 0
        for node in list(self.program.graph.nodes):
            if node.op == "output":
                self._restore(node)
            elif node.op == "call_function" and (_computes_float(node) or _reads_half(node)):
                count += self._convert(node)
        self._store_weights()
        self.program.graph_module.recompile()
        return count

    def _convert(self, node: fx.Node) -> bool:
        """Give a node inputs of one width; says whether it computes in float16."""
        half = node.name not in self.kept and any(map(_is_wide_or_half, _inputs(node)))
        if "getitem" in str(node.target):
            node.meta["val"] = node.args[0].meta["val"][node.args[1]]  # type: ignore[union-attr, index]
            return False
        dtype = HALF if half else torch.float32
        for source in _inputs(node):
            if _is_wide_or_half(source) and source.meta["val"].dtype is not dtype:
                node.replace_input_with(source, self._cast(node, source, dtype))
        if half:
            node.meta["val"] = pytree.tree_map(lambda v: v.to(HALF) if _is_single(v) else v, node.meta["val"])
        return half

    def _cast(self, node: fx.Node, source: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`source` in another width, shared by all that read it so."""
        if (source, dtype) not in self.casts:
            value = source.meta["val"].to(dtype)
            after = node if source.op in ("placeholder", "get_attr") else source.next
            self.casts[source, dtype] = call_before(after, aten.to.dtype, source, dtype, value=value)
        return self.casts[source, dtype]

    def _restore(self, output: fx.Node) -> None:
        for source in output.all_input_nodes:
            if isinstance(source.meta.get("val"), torch.Tensor) and source.meta["val"].dtype is HALF:
                output.replace_input_with(source, self._cast(output, source, torch.float32))

    def _store_weights(self) -> None:
        """A parameter that is only read as float16 is stored so."""
        by_path: dict[str, list[fx.Node]] = {}
        stored = self.program.state_dict()  # not the constants that capture lifted out of the code
        for node in self.program.graph.nodes:
            if node.op == "get_attr" and str(node.target) in stored:
                by_path.setdefault(str(node.target), []).append(node)
        for path, nodes in by_path.items():
            casts = [self.casts.get((n, HALF)) for n in nodes]
            if all(c is not None and list(n.users) == [c] for n, c in zip(nodes, casts)):
                self._store(path, nodes, [c for c in casts if c is not None])

    def _store(self, path: str, nodes: list[fx.Node], casts: list[fx.Node]) -> None:
        held = constant(self.program, nodes[0])
        assert held is not None
        value = held.detach().to(HALF)
        stored = torch.nn.Parameter(value, held.requires_grad) if isinstance(held, torch.nn.Parameter) else value
        set_attribute(self.program.graph_module, path, stored)
        for node, cast in zip(nodes, casts):
            cast.replace_all_uses_with(node)
            self.program.graph.erase_node(cast)
            node.meta["val"] = fake_like(node, value)


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def _is_wide_or_half(node: fx.Node) -> bool:
    return node.meta["val"].dtype in (torch.float32, HALF)


def _reads_half(node: fx.Node) -> bool:
    return any(n.meta["val"].dtype is HALF for n in _inputs(node))
