"""How much each residual block matters: a number for each, the larger the more.

    similarity   1 - cos(x, x + f(x)), what the block turns (ShortGPT, Men et al. 2024)
    change       |f(x)| / |x|, what the block adds
    output       |y without the block - y|**2 / |y|**2 at the outputs of the model, one run for each block
    l1, l2       mean or root-mean-square size of the last weights of the branch: what it would add to white noise

The first three read data and are means over examples, each taken over all values of one example, so that no layout of
the dimensions has to be guessed; they do not depend on how the data are batched. The last two are weak: they do not
know how large x is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ....errors import DataError, OptionError, PruningError
from ....frontend.batch_dim import count_examples
from ....frontend.cost import op_name
from ....frontend.program import Program, get_attribute
from ...rewrite import argument
from .blocks import Block
from .weight_uses import WeightUse, weight_uses

Batch = tuple[torch.Tensor, ...]

DATA_IMPORTANCES = ("similarity", "change", "output")
WEIGHT_IMPORTANCES = ("l1", "l2")


def block_importances(
    program: Program, blocks: Sequence[Block], importance: str, data: Iterable[Batch] | None
) -> list[float]:
    """One number for each block. `data` yields flat batches for `program`.

    Raises OptionError for an unknown importance and for data that it does not read, DataError where it needs data.
    """
    if importance in WEIGHT_IMPORTANCES:
        if data is not None:
            raise OptionError(
                f"importance {importance!r} reads only weights: data has no effect",
                hint=f"for blocks choose importance={'|'.join(DATA_IMPORTANCES)}, or leave data out",
            )
        return [_branch_size(program, block, importance) for block in blocks]
    if importance not in DATA_IMPORTANCES:
        known = ", ".join((*DATA_IMPORTANCES, *WEIGHT_IMPORTANCES))
        raise OptionError(f"importance {importance!r} does not score blocks", hint=f"choose one of {known}")
    if data is None:
        hint = "give data=batches, labels are not needed (in a pipeline: the calibration data)"
        raise DataError(f"importance {importance!r} needs data", hint=hint)
    return _mean_over_examples(program, blocks, importance, data)


# -- by data ------------------------------------------------------------------------------------------------------


def _mean_over_examples(
    program: Program, blocks: Sequence[Block], importance: str, data: Iterable[Batch]
) -> list[float]:
    model, measure = _evaluating(program), _at_outputs if importance == "output" else _at_sums
    totals, count = torch.zeros(len(blocks), dtype=torch.float64), 0
    for batch in data:
        examples = count_examples(program.inputs, batch)
        totals += measure(model, blocks, batch, importance) * examples
        count += examples
    if not count:
        raise DataError("the data hold no examples", hint="give at least one batch")
    if not torch.isfinite(totals).all():
        raise PruningError("a block gives NaN or infinity on the data", hint="check the weights and the data")
    return [float(t) for t in totals / count]


def _evaluating(program: Program) -> Program:
    """The program in evaluation mode; a copy only where it is not."""
    return program.copy().eval() if program.training else program


def _at_sums(program: Program, blocks: Sequence[Block], batch: Batch, importance: str) -> torch.Tensor:
    """For each block `similarity` or `change` where its branch is added, the mean over the batch."""
    run = _Run(program, blocks, _turned if importance == "similarity" else _added)
    run.outputs(batch)
    return torch.stack([run.found[block.node] for block in blocks])


def _turned(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 1 - torch.nn.functional.cosine_similarity(x, y, dim=1, eps=1e-30)


def _added(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (y - x).norm(dim=1) / x.norm(dim=1).clamp_min(1e-30)


def _at_outputs(program: Program, blocks: Sequence[Block], batch: Batch, importance: str) -> torch.Tensor:
    """For each block the change of the outputs without it, the mean over the batch."""
    examples = count_examples(program.inputs, batch)
    expected = [_by_example(y, examples) for y in _Run(program).outputs(batch)]
    scale = torch.stack([y.square().sum(1).expand(examples) for y in expected]).sum(0).clamp_min(1e-30)
    means = []
    for block in blocks:
        got = [_by_example(y, examples) for y in _Run(program, without=block).outputs(batch)]
        change = torch.stack([(a - b).square().sum(1).expand(examples) for a, b in zip(got, expected)]).sum(0)
        means.append((change / scale).mean())
    return torch.stack(means)


def _by_example(tensor: torch.Tensor, examples: int) -> torch.Tensor:
    """One row of float64 for each example; one for all where the first dimension is not made of examples."""
    whole = tensor.ndim == 0 or tensor.shape[0] % examples
    return tensor.double().reshape(1 if whole else examples, -1)


class _Run(fx.Interpreter):
    """Runs a program, compares both ends of blocks on the way, or leaves one block out."""

    def __init__(
        self,
        program: Program,
        blocks: Sequence[Block] = (),
        compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        without: Block | None = None,
    ) -> None:
        super().__init__(program.graph_module)
        self._program = program
        self._blocks = {b.node: b for b in blocks}
        self._compare = compare
        self._without = without
        self._examples = 1
        self.found: dict[str, torch.Tensor] = {}

    def outputs(self, batch: Batch) -> list[torch.Tensor]:
        """The floating-point outputs for the flat inputs of one batch."""
        tensors = iter(batch)
        leaves = [next(tensors) if isinstance(x, torch.Tensor) else x for x in self._program.example_inputs]
        with torch.no_grad():
            self._examples = count_examples(self._program.inputs, batch)
            result = self.run(*leaves, enable_io_processing=False)
        given: list[Any] = pytree.tree_leaves(result)
        return [y for y in given if isinstance(y, torch.Tensor) and y.is_floating_point()]

    def run_node(self, n: fx.Node) -> Any:
        if self._without is not None and n.name == self._without.node:
            return self.env[n.args[self._without.identity]]  # type: ignore[index]
        value = super().run_node(n)
        block = self._blocks.get(n.name)
        if block is not None and self._compare is not None:
            ends = (self.env[n.args[block.identity]], value)  # type: ignore[index]
            self.found[n.name] = self._compare(*(_by_example(t, self._examples) for t in ends)).mean()
        return value


# -- by weights ---------------------------------------------------------------------------------------------------


def _branch_size(program: Program, block: Block, norm: str) -> float:
    (node,) = [n for n in program.graph.nodes if n.name == block.node]
    outputs = {use.node: use for use in weight_uses(program)}
    return _made_of_noise(program, node.args[1 - block.identity], outputs, norm)


def _made_of_noise(program: Program, node: Any, uses: dict[fx.Node, WeightUse], norm: str) -> float:
    """How large the values of `node` are when its last layer reads white noise of size 1.

    A norm gives values of the size of its weight, whatever comes before it; a scale counts as its size; a sum of
    branches adds in squares.
    """
    tensors = [n for n in node.all_input_nodes if n.op == "get_attr"]
    inputs = [n for n in node.all_input_nodes if op_name(n) and isinstance(n.meta.get("val"), torch.Tensor)]
    before = lambda n: _made_of_noise(program, n, uses, norm)  # noqa: E731
    if op_name(node) in _NORMS:
        weight = argument(node, "weight")
        return 1.0 if weight is None else _size(program, str(weight.target), norm)
    if node in uses:
        use = uses[node]
        weight = get_attribute(program.graph_module, use.name)
        return _size(program, use.name, norm) * (weight.numel() / weight.shape[use.outputs or 0]) ** 0.5
    if not inputs:
        return 1.0
    if op_name(node) == "aten.add":
        return sum(before(n) ** 2 for n in inputs) ** 0.5
    scale = _size(program, str(tensors[0].target), norm) if op_name(node) == "aten.mul" and tensors else 1.0
    return scale * before(next((n for n in inputs if n.meta["val"].shape == node.meta["val"].shape), inputs[0]))


_NORMS = ("aten.batch_norm", "aten.layer_norm", "aten.group_norm", "aten.rms_norm")


def _size(program: Program, name: str, norm: str) -> float:
    values = get_attribute(program.graph_module, name).detach().double()
    return float(values.abs().mean() if norm == "l1" else values.square().mean().sqrt())
