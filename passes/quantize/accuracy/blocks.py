"""Cut a quantized program into blocks that are reconstructed one after the other.

A block ends where a single tensor is all that the rest of the program needs of what came before: behind a residual sum,
between two layers of a chain. Its float twin's value is what the block should give (BRECQ, Li et al. 2021, arXiv
2102.05426, takes residual blocks; here the graph says where they end). Where no such place comes for many layers (dense
connections, several outputs), each layer is reconstructed on its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...fuse_batchnorm import LAYERS
from ...rewrite import is_op
from .float_twin import IntegerLayer, Twins

_MOST_LAYERS = 8  # in a block; more are taken layer by layer


@dataclass(frozen=True)
class Block:
    """The layers between two cuts: `start` is the tensor that it reads (None: the program's inputs).

    `ends` are what it gives. Both come as pairs: the node of the quantized program, and its twin.
    """

    start: tuple[fx.Node, fx.Node] | None
    ends: tuple[tuple[fx.Node, fx.Node], ...]
    layers: tuple[IntegerLayer, ...]

    @property
    def whole(self) -> bool:
        """Is it small enough to be reconstructed as one?"""
        return len(self.layers) <= _MOST_LAYERS


def find_blocks(twins: Twins) -> list[Block]:
    """All blocks in graph order; together they hold every integer layer once."""
    layers = {layer.node: layer for layer in twins.layers()}
    cuts = single_tensors(twins)
    blocks: list[Block] = []
    start: tuple[fx.Node, fx.Node] | None = None
    held: list[IntegerLayer] = []
    for node in twins.program.graph.nodes:
        if node in layers:
            held.append(layers[node])
        if node in cuts and held:
            end = cuts[node]
            blocks.append(Block(start, (end,), tuple(held)))
            start, held = end, []
    if held:
        outputs = tuple(zip(twins.program.output_nodes(), twins.floating.output_nodes()))
        blocks.append(Block(start, outputs, tuple(held)))
    return blocks


def single_tensors(twins: Twins) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
    """The nodes behind which one tensor is all that is still needed, with that tensor and its twin."""
    nodes = list(twins.program.graph.nodes)
    last = _last_readers(nodes)
    found: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    live: set[fx.Node] = set()
    depending: set[fx.Node] = set()
    for position, node in enumerate(nodes):
        if node.op == "placeholder" or not depending.isdisjoint(node.all_input_nodes):
            depending.add(node)
            if _holds_tensors(node) and last.get(node, -1) > position:
                live.add(node)
        live = {n for n in live if last[n] > position}
        if len(live) == 1 and (pair := _pair(twins, next(iter(live)))) is not None:
            found[node] = pair
    return found


def _holds_tensors(node: fx.Node) -> bool:
    """A tensor, or the list that a split gives; not a size."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (isinstance(value, (list, tuple)) and len(value) > 0)


def _last_readers(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    last: dict[fx.Node, int] = {}
    for position, node in enumerate(nodes):
        for used in node.all_input_nodes:
            last[used] = position
    return last


def _pair(twins: Twins, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """A real-valued tensor and its twin, which may have it in another shape; not what is about to be quantized, since
    the quantization may do an activation's work, nor a layer's output, which an activation may follow."""
    quantize = torch.ops.fxpress.quantize.default
    value = node.meta["val"]
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or is_op(node, quantize, *LAYERS):
        return None
    if not value.is_floating_point():
        return None
    if any(is_op(user, quantize) for user in node.users):
        return None
    twin = twins.of(node)
    return (node, twin) if twin is not None and isinstance(twin.meta.get("val"), torch.Tensor) else None
