"""What data say about channels: the streaming sums behind the importances that read activations or gradients.

All of them are sums over examples, so memory does not grow with the number of examples, and the result does not depend
on how they are batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ....errors import DataError, OptionError
from ....frontend.program import Program
from ..axes import Vector
from .batch_layout import BatchLayout
from .criteria import Activations, Contributions, Gradients, Moments
from .gates import Call, Gate, GateRun, Signs, all_pieces, example_count

Batch = tuple[torch.Tensor, ...]
Loss = Callable[[Any, Any], torch.Tensor]

# A batch (and labels) -> the inputs, and what is made of the outputs and differentiated: sums over the examples.
Objective = Callable[[tuple[Any, ...]], tuple[Batch, Callable[[Any], list[torch.Tensor]]]]

_PROBES = 4  # random projections of each example's outputs


def measure_gates(program: Program, gates: list[Gate], batches: Iterable[Batch], sums: list[Any]) -> list[Any]:
    """Show all data to `sums`, one for each gate, and return what each of them finds."""
    by_gate = dict(zip(gates, sums, strict=True))

    def visit(call: Call, here: list[Gate]) -> Call:
        shared = by_gate[here[0]].prepare(call, here[0])
        for gate in here:
            by_gate[gate].add(gate, *shared)
        return call

    run = GateRun(program, gates, visit)
    with torch.no_grad():
        for piece in all_pieces(program, batches, gates):
            run.outputs(piece)
    return [s.finish() for s in sums]


# -- activations --------------------------------------------------------------------------------------------------


class ActivationSums:
    """Sums behind `Activations`."""

    def __init__(self, gate: Gate) -> None:
        self._squares = torch.zeros(len(gate.index), dtype=torch.float64)
        self._weights = torch.zeros(len(gate.index), dtype=torch.float64)
        self._count = 0

    def prepare(self, call: Call, gate: Gate) -> tuple[torch.Tensor, torch.Tensor]:
        """The operand and the magnitudes beside it, by example."""
        return gate.by_example(call.operand, call.count), gate.by_example(_magnitudes(call), call.count)

    def add(self, gate: Gate, operand: torch.Tensor, weights: torch.Tensor) -> None:
        self._squares += operand.double().square().sum((0, 1))
        self._weights += weights.double().sum((0, 1))
        self._count += operand.shape[0] * operand.shape[1]

    def finish(self) -> Activations:
        return Activations((self._squares / self._count).sqrt(), self._weights / self._count)


def _magnitudes(call: Call) -> torch.Tensor:
    """For each value of the operand the sum of the magnitudes of all that it is multiplied by."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, _magnitude, (call.args, call.kwargs))
    positive = Call(call.contraction, args, kwargs, call.count)
    return _pull_back(positive, lambda y: [torch.ones_like(y)])[1][0].abs()


def _magnitude(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs() if tensor.is_floating_point() else tensor


# -- contributions ------------------------------------------------------------------------------------------------


class ContributionSums:
    """Sums behind `Contributions`: what each channel adds to the node's output.

    With A the linear map from the operand to the output and r random signs, E <r, A x_i>^2 = |A x_i|^2 (Hutchinson
    1990), and <r, A x_i> = <A^T r, x_i> comes for all channels i from one run backward.
    """

    def __init__(self, gate: Gate, signs: Signs) -> None:
        self._signs = signs
        self._added = torch.zeros(len(gate.literals), dtype=torch.float64)
        self._output = 0.0

    def prepare(self, call: Call, gate: Gate) -> tuple[torch.Tensor, list[torch.Tensor], float]:
        """The operand by example, its products with each probe, and the energy of the output."""

        def probes(y: torch.Tensor) -> list[torch.Tensor]:
            at = call.contraction
            keys = [f"{at.node.name}.{at.argument}.{at.position}.{at.dim}.{i}" for i in range(_PROBES)]
            return [self._signs.like(y, key, call.count, gate.output_batch) for key in keys]

        output, gradients = _pull_back(call, probes)
        operand = gate.by_example(call.operand, call.count)
        products = [(gate.by_example(g, call.count) * operand).sum(1) for g in gradients]
        return operand, products, float(output.double().square().sum())

    def add(self, gate: Gate, operand: torch.Tensor, products: list[torch.Tensor], energy: float) -> None:
        self._output += energy
        for product in products:
            self._added += gate.by_literal(product.double()).square().sum(0) / len(products)

    def finish(self) -> Contributions:
        return Contributions(self._share())

    def _share(self) -> torch.Tensor:
        return self._added / self._output if self._output > 0 else self._added


class MomentSums(ContributionSums):
    """Sums behind `Moments`."""

    def __init__(self, gate: Gate, signs: Signs) -> None:
        super().__init__(gate, signs)
        size = len(gate.literals)
        self._means = torch.zeros(size, dtype=torch.float64)
        self._products = torch.zeros(size, size, dtype=torch.float64)
        self._samples = 0

    def add(self, gate: Gate, operand: torch.Tensor, products: list[torch.Tensor], energy: float) -> None:
        super().add(gate, operand, products, energy)
        values = gate.side_by_side(operand.flatten(0, 1))
        self._means += values.double().sum(0)
        self._products += (values.T @ values).double()
        self._samples += len(values)

    def finish(self) -> Moments:
        count = self._samples
        return Moments(self._share(), self._means / count, self._products / count, count)


def _pull_back(
    call: Call, cotangents: Callable[[torch.Tensor], list[torch.Tensor]]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The node's output, and its derivative by the operand, transposed, applied to each cotangent of the output."""
    with torch.enable_grad():
        operand = call.operand.detach().requires_grad_()
        output = call.on(operand).output()
        given = cotangents(output.detach())
        last = len(given) - 1
        return output.detach(), [
            torch.autograd.grad(output, operand, c, retain_graph=i < last)[0] for i, c in enumerate(given)
        ]


# -- gradients ----------------------------------------------------------------------------------------------------


class GateGradients:
    """The derivative of each example's objective by the gate of every literal."""

    def __init__(self, program: Program, gates: list[Gate]) -> None:
        self.literals = np.unique(np.concatenate([g.literals for g in gates]))
        self._columns = [torch.from_numpy(np.searchsorted(self.literals, g.literals)) for g in gates]
        self._number = {gate: i for i, gate in enumerate(gates)}
        self._seen: list[tuple[torch.Tensor, list[Gate]]] = []
        self._run = GateRun(program, gates, self._open)

    def _open(self, call: Call, here: list[Gate]) -> Call:
        """A copy of the operand for this reader alone, so that its gradient is that of the gate."""
        operand = call.operand if call.operand.requires_grad else call.operand.detach().requires_grad_()
        own = operand.view_as(operand)
        self._seen.append((own, here))
        return call.on(own)

    def __call__(self, batch: Batch, count: int, objectives: Callable[[Any], list[torch.Tensor]]) -> list[torch.Tensor]:
        """For each objective (a sum over the examples) [examples, literals], float64."""
        self._seen = []
        with torch.enable_grad():
            values = objectives(self._run.outputs(batch))
            operands = [x for x, _ in self._seen]
            results = []
            for i, value in enumerate(values):
                keep = i + 1 < len(values)
                gradients = torch.autograd.grad(value, operands, retain_graph=keep, allow_unused=True)
                results.append(self._by_literal(gradients, count))
        self._seen = []
        return results

    def _by_literal(self, gradients: tuple[torch.Tensor | None, ...], count: int) -> torch.Tensor:
        result = torch.zeros(count, len(self.literals), dtype=torch.float64)
        for (operand, gates), gradient in zip(self._seen, gradients):
            if gradient is None:
                continue
            product = gates[0].by_example((gradient * operand).detach(), count).sum(1).double()
            for gate in gates:
                share = 1 if len(product) == count else 1 / count
                result[:, self._columns[self._number[gate]]] += share * gate.by_literal(product)
        return result


def measure_gradients(
    program: Program, gates: list[Gate], batches: Iterable[tuple[Any, ...]], objective: Objective
) -> tuple[Vector, Gradients]:
    """(literals, moments of the derivatives by their gates, over the examples and objectives)."""
    measure = GateGradients(program, gates)
    sums, count = torch.zeros(3, len(measure.literals), dtype=torch.float64), 0
    for piece in all_pieces(program, batches, gates):
        batch, objectives = objective(piece)
        for found in measure(batch, example_count(program, batch), objectives):
            sums += torch.stack([found.sum(0), found.abs().sum(0), found.square().sum(0)])
            count += len(found)
    return measure.literals, Gradients(*(sums / count))


# -- objectives ---------------------------------------------------------------------------------------------------


class OutputProbes:
    """Without labels: projections of the outputs on random signs.

    The objective is the change of the outputs, E |f(x) - f'(x)|^2 / E |f(x)|^2, summed over the outputs. At the program
    as it is its gradient is zero and its Hessian J^T J: the mean square of the projections' gradients.
    """

    def __init__(self, program: Program, signs: Signs) -> None:
        self._program = program
        self._signs = signs
        layout = BatchLayout(program)
        self._axes = [layout.of(n.name) for n in program.output_nodes()]
        self._scales = [1.0] * len(self._axes)

    def __call__(self, batch: tuple[Any, ...]) -> tuple[Batch, Callable[[Any], list[torch.Tensor]]]:
        count = example_count(self._program, batch)
        return batch, lambda outputs: [self._projection(outputs, i, count) for i in range(_PROBES)]

    def _projection(self, outputs: Any, probe: int, count: int) -> torch.Tensor:
        terms = [
            (y * self._signs.like(y, f"output.{i}.{probe}", count, axis)).sum() * scale
            for i, (y, axis, scale) in enumerate(zip(_tensors(outputs), self._axes, self._scales))
            if y.is_floating_point()
        ]
        return torch.stack(terms).sum()

    def observe(self, batches: Iterable[Batch]) -> None:
        """Make the outputs count alike: each is divided by the root of its mean energy over all examples."""
        energies, count = [0.0] * len(self._axes), 0
        for piece in all_pieces(self._program, batches):
            for i, y in enumerate(self._program.run_flat(_leaves(self._program, piece))):
                energies[i] += float(y.double().square().sum())
            count += example_count(self._program, piece)
        self._scales = [(count / e) ** 0.5 if e > 0 else 1.0 for e in energies]


class Labelled:
    """A user's `loss(outputs, labels)`: one value for each example, or their mean."""

    def __init__(self, program: Program, loss: Loss) -> None:
        self._program = program
        self._loss = loss

    def __call__(self, batch: tuple[Any, ...]) -> tuple[Batch, Callable[[Any], list[torch.Tensor]]]:
        *inputs, labels = batch
        count = example_count(self._program, tuple(inputs))
        return tuple(inputs), lambda outputs: [self._total(self._loss(outputs, labels), count)]

    def _total(self, value: torch.Tensor, count: int) -> torch.Tensor:
        if not isinstance(value, torch.Tensor) or value.numel() not in (1, count) or not value.requires_grad:
            raise OptionError(
                f"loss gave {_form(value)}",
                hint="return the mean of the examples' losses, or one loss for each example, as a tensor that "
                "follows from the outputs",
            )
        if not torch.isfinite(value).all():
            raise DataError("the loss is NaN or infinite", hint="check the labels and the loss on one batch")
        return value.sum() if value.numel() == count else value.sum() * count


def _form(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"shape {list(value.shape)}" + ("" if value.requires_grad else " without gradient")


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]


def _leaves(program: Program, batch: Batch) -> list[Any]:
    given = dict(zip(program.tensor_placeholders(), batch, strict=True))
    names = [n for n in program.graph.nodes if n.op == "placeholder"]
    return [given.get(n, e) for n, e in zip(names, program.example_inputs)]
