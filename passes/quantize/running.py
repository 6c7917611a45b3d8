"""How calibration runs an observed program often: in small parts, its convolutions prepared once.

PyTorch's convolution brings its weights into the layout of its kernels at every call, and computes 1x1 convolutions on
one thread by a slower route; a network's own activations are read and written once more. For a hundred runs it pays to
do what a compiler of graphs would: weights are packed once, a ReLU behind a convolution is computed with it, and sums
are made in place where nobody else reads the operand. The numbers are the program's own up to the rounding of float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from ...frontend.batch_dim import batch_name, count_examples, some_examples
from ...frontend.program import Program
from ..memory import return_memory
from ..rewrite import argument, aten, constant, is_constant, is_op

# (key of an observe node, value) -> the value that the program goes on with, and may write into
Handle = Callable[[int, torch.Tensor], torch.Tensor]
# (layer, its weights) -> the weights to compute with
Weights = Callable[[fx.Node, torch.Tensor], torch.Tensor]
_VALUES = 1 << 22  # the largest activation of a part: more gains little time and costs memory


class Runner(fx.Interpreter):
    """Runs an observed program; what `observe` nodes read goes through `handle`. Values are freed after their last use.

    `weights` may replace the weights of layers, by node (a trial of quantized weights).
    """

    def __init__(self, program: Program, weights: Weights | None = None) -> None:
        graph = _prepared(program, weights)
        super().__init__(program.graph_module, garbage_collect_values=True, graph=graph)
        self.example = program.example_inputs
        self.handle: Handle = lambda key, value: value

    def run_batch(self, batch: tuple[torch.Tensor, ...], handle: Handle) -> Any:
        """The program's result on flat input tensors."""
        self.handle = handle
        given = iter(batch)
        leaves = [next(given) if isinstance(e, torch.Tensor) else e for e in self.example]
        with torch.no_grad():
            return self.run(*leaves, enable_io_processing=False)

    def close(self) -> None:
        """Forget the prepared weights, as large as the program's own."""
        for node in self.graph.nodes:
            if isinstance(node.target, (PreparedConvolution, Held)):
                node.target.forget()
        return_memory()

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not torch.ops.fxpress.observe.default:
            return super().call_function(target, args, kwargs)
        value, key = args
        return self.handle(key, value)


def in_parts(program: Program, batch: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """A batch in parts whose largest activation is about 2^22 values, so that memory does not depend on how the data
    were batched. A program with a fixed batch gets what it was given."""
    if batch_name(program.inputs) is None:
        yield batch
        return
    size = max(1, _VALUES // max(_largest_per_sample(program), 1))
    for start in range(0, count_examples(program.inputs, batch), size):
        yield some_examples(program.inputs, batch, slice(start, start + size))


def _largest_per_sample(program: Program) -> int:
    """Values of the largest float activation for one sample, by shapes whose first dim is the batch."""
    largest = 0
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim and not is_constant(node):
            sizes = [s for s in value.shape[1:] if isinstance(s, int)]
            largest = max(largest, math.prod(sizes))
    return largest


# -- the prepared graph --------------------------------------------------------------------------------------------


def _prepared(program: Program, weights: Weights | None) -> fx.Graph:
    """The program's graph with prepared convolutions; only an interpreter can run it."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        source = node.args[0] if is_op(node, aten.relu.default) else None
        if source is not None and _is_prepared(new[source]) and len(source.users) == 1:
            new[node] = new[source]
            new[node].target.activation = "relu"
        elif (layer := _prepare(program, node, weights)) is not None:
            new[node] = graph.call_function(layer, (new[node.args[0]],))
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
            new[node].target = _in_place(node, new)
            _replace_weight(program, node, new[node], weights)
    return _without_dead(graph)


def _replace_weight(program: Program, node: fx.Node, copied: fx.Node, weights: Weights | None) -> None:
    """Let a layer that is not prepared read the weights to compute with."""
    if weights is None or node.op != "call_function" or len(node.args) < 2 or not is_constant(node.args[1]):
        return
    given = constant(program, node.args[1])
    if not isinstance(given, torch.Tensor):  # the branches of a torch.cond are constants too
        return
    given = given.detach()
    used = weights(node, given)
    if used is not given:
        with copied.graph.inserting_before(copied):
            held = copied.graph.call_function(Held(used))
        copied.update_arg(1, held)


def _without_dead(graph: fx.Graph) -> fx.Graph:
    """Drop weights that nothing reads any more."""
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph


def _is_prepared(node: fx.Node) -> bool:
    return isinstance(node.target, PreparedConvolution)


def _in_place(node: fx.Node, new: dict[fx.Node, fx.Node]) -> Any:
    """The op to run for `node`: in place where its first operand is a fresh tensor that nobody else reads."""
    if node.op != "call_function" or node.target not in (aten.relu.default, aten.add.Tensor):
        return node.target
    source, value = node.args[0], node.meta.get("val")
    fresh = _fresh(source, new)
    if fresh is None or not isinstance(value, torch.Tensor) or fresh.meta.get("val") is None:
        return node.target
    form = fresh.meta["val"]
    if form.dtype is not value.dtype or str(form.shape) != str(value.shape):
        return node.target
    return aten.relu_.default if node.target is aten.relu.default else aten.add_.Tensor


def _fresh(node: Any, new: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The op that made the tensor that `node` stands for, if it made it anew and only this chain reads it."""
    while is_op(node, torch.ops.fxpress.observe.default) and len(node.users) == 1:
        node = node.args[0]
    if not isinstance(node, fx.Node) or len(node.users) != 1 or node.op != "call_function":
        return None
    return node if _is_prepared(new[node]) or node.target is aten.add.Tensor else None


class Held:
    """A tensor that a graph reads without storing it in its module."""

    __name__ = "held"  # fx names nodes after their targets

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def __call__(self) -> torch.Tensor:
        return self.value

    def forget(self) -> None:
        """Let the tensor go."""
        del self.value


class PreparedConvolution:
    """A 2-D convolution with packed weights: x [N, C, H, W] -> [N, O, H', W'], with its activation function.

    `options` are padding, stride, dilation and groups; `form` is the shape of x, as far as it is known.
    """

    __name__ = "prepared_convolution"  # fx names nodes after their targets

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, options: tuple[Any, ...], form: list[int] | None
    ) -> None:
        self.bias, self.options, self.activation = bias, options, "none"
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *options, form)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.options, self.activation, [], ""
        )

    def forget(self) -> None:
        """Let the weights go."""
        del self.weight


def _prepare(program: Program, node: fx.Node, weights: Weights | None) -> PreparedConvolution | None:
    """A prepared layer for a node that can have one, else None."""
    if not is_op(node, aten.conv2d.default) or not is_constant(node.args[1]) or not can_prepare():
        return None
    weight, bias = constant(program, node.args[1]), constant(program, argument(node, "bias"))
    bias_is_constant = argument(node, "bias") is None or is_constant(argument(node, "bias"))
    form = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    if not bias_is_constant or weight is None or weight.dtype is not torch.float32 or len(form) != 4:
        return None
    weight = weight.detach() if weights is None else weights(node, weight.detach())
    sizes = [s if isinstance(s, int) else 1 for s in form]
    options = tuple([int(p[0]), int(p[-1])] for p in (argument(node, n) for n in ("padding", "stride", "dilation")))
    known = sizes if all(isinstance(s, int) for s in form[1:]) else None
    bias = None if bias is None else bias.detach()
    with torch.no_grad():
        return PreparedConvolution(weight, bias, (*options, argument(node, "groups")), known)


def can_prepare() -> bool:
    """Does this build of PyTorch have the prepared convolutions (oneDNN)? Without them the plain ones run."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
