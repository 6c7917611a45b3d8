"""The points at which a program is quantized, to be switched on and off one by one.

A point is the weights of one layer, or one scale of activations (all tensors that share it, through moves).
Quantization at a point is simulated in float on the observed program, so that any set of points can be on while the
rest is exact, and only what lies behind a switch is computed again.

A point vanishes from the compiled model when every integer operation that writes or reads it stays in float: a
convolution in float still reads integers if the one before it gives them. `operations` names those; it is what
`keep_float` must cover.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ....frontend.operators import declare_operators
from ....frontend.program import Program, module_path
from ...rewrite import constant
from ..annotate import annotation
from ..fold import params_of, quantize_weight, weight_scales
from ..observe import Sites, sites_of
from ..spec import QuantParams, Target

Values = dict[fx.Node, Any]
_ORIGIN = "origin"


@dataclass(frozen=True, eq=False)
class Point:
    """One switch. `name` is for people, `operations` are nodes of the float program (see the module's text)."""

    name: str
    kind: Literal["weights", "activation"]
    operations: frozenset[str]
    nodes: tuple[fx.Node, ...]


def mark_origins(program: Program) -> None:
    """Let every node remember its name; what a pass puts in its place later inherits it."""
    for node in program.graph.nodes:
        node.meta["custom"] = {**(node.meta.get("custom") or {}), _ORIGIN: node.name}


def origin_of(node: fx.Node) -> str:
    """The name of the node of the float program that this one was made from."""
    return str((node.meta.get("custom") or {}).get(_ORIGIN, node.name))


def find_points(program: Program) -> list[Point]:
    """All points of an observed program: weights in graph order, then activations. Raises QuantizationError without
    observers."""
    declare_operators()
    sites = sites_of(program)
    names = _Names(program)
    layers = [n for n in program.graph.nodes if (note := annotation(n)) is not None and note.row.kind == "layer"]
    points = [Point(names.of(n), "weights", frozenset({origin_of(n)}), (n,)) for n in layers]
    return points + [_activation(nodes, names) for nodes in _by_scale(program, sites).values()]


def _by_scale(program: Program, sites: Sites) -> dict[int, list[fx.Node]]:
    """The observe nodes of each scale, by the key of the site that decides it."""
    found: dict[int, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target is torch.ops.fxpress.observe.default:
            found.setdefault(sites.root(int(node.args[1])).key, []).append(node)
    return found


def _activation(nodes: list[fx.Node], names: _Names) -> Point:
    writers = [w for n in nodes if (w := _writer(n.args[0])) is not None]
    readers = [u for n in nodes for u in n.users if annotation(u) is not None]
    touching = frozenset(map(origin_of, [*writers, *readers]))
    name = names.of(writers[0]) if writers else f"input of {names.of(readers[0])}" if readers else nodes[0].name
    return Point(name, "activation", touching, tuple(nodes))


def _writer(tensor: Any) -> fx.Node | None:
    """The integer operation whose result is observed at `tensor`: itself, or the one before an absorbed activation."""
    assert isinstance(tensor, fx.Node)
    if annotation(tensor) is not None:
        return tensor
    before = tensor.all_input_nodes[:1]
    note = annotation(before[0]) if before else None
    return before[0] if note is not None and note.output is tensor else None


class _Names:
    """Names for people: the module's where it computes one thing on integers, with the node's name where several."""

    def __init__(self, program: Program) -> None:
        paths = [(module_path(n), origin_of(n)) for n in program.graph.nodes if annotation(n) is not None]
        self.origins: dict[str, set[str]] = {}
        for path, origin in paths:
            self.origins.setdefault(path, set()).add(origin)

    def of(self, node: fx.Node) -> str:
        path, origin = module_path(node), origin_of(node)
        alone = path and len(self.origins.get(path, ())) <= 1
        return path if alone else "/".join(filter(None, (path, origin)))


# -- switching ----------------------------------------------------------------------------------------------------

Fake = Callable[[fx.Interpreter, fx.Node], Any]


class Switchboard:
    """Runs an observed and calibrated program with some points quantized and the others exact.

    `weight_ranges` is the rule of the weights' scales. Raises QuantizationError for a tensor that was never observed.
    """

    def __init__(self, program: Program, target: Target, weight_ranges: str) -> None:
        self.program = program
        self.points = find_points(program)
        sites = sites_of(program)
        self._fakes: list[dict[fx.Node, Fake]] = []
        for point in self.points:
            if point.kind == "weights":
                self._fakes.append({n: _fake_weights(program, n, target, weight_ranges) for n in point.nodes})
            else:
                keys = {n: int(n.args[1]) for n in point.nodes}  # type: ignore[arg-type]
                self._fakes.append({n: _fake_activation(params_of(sites, k, target)) for n, k in keys.items()})

    def values(self, batch: tuple[torch.Tensor, ...], on: Collection[int]) -> Values:
        """Every value of the graph for one batch of flat inputs, with the points `on` (indices) quantized."""
        given = iter(batch)
        leaves = [next(given) if isinstance(e, torch.Tensor) else e for e in self.program.example_inputs]
        run = _Switched(self.program.graph_module, self._switched(on), keep=True)
        with torch.no_grad():
            run.run(*leaves, enable_io_processing=False)
        return run.env

    def outputs(self, values: Values, on: Collection[int], changed: Collection[int]) -> tuple[torch.Tensor, ...]:
        """The flat float outputs with `on` quantized, given `values` that differ only at the points `changed`."""
        stale = self._behind([n for i in changed for n in self.points[i].nodes])
        run = _Switched(self.program.graph_module, self._switched(on), keep=False)
        known = {n: v for n, v in values.items() if n not in stale}
        with torch.no_grad():
            result = run.run(initial_env=known, enable_io_processing=False)
        return float_leaves(result)

    def result(self, values: Values) -> tuple[torch.Tensor, ...]:
        """The flat float outputs among `values`."""
        return float_leaves([values[n] for n in self.program.output_nodes()])

    def _switched(self, on: Collection[int]) -> dict[fx.Node, Fake]:
        return {n: fake for i in on for n, fake in self._fakes[i].items()}

    def _behind(self, nodes: list[fx.Node]) -> set[fx.Node]:
        """`nodes` and all that is computed from them; the output node among them."""
        found, left = set(nodes), list(nodes)
        while left:
            for user in left.pop().users:
                if user not in found:
                    found.add(user)
                    left.append(user)
        return found | {n for n in self.program.graph.nodes if n.op == "output"}


def float_leaves(result: Any) -> tuple[torch.Tensor, ...]:
    """The floating tensors in a nested result."""
    leaves = pytree.tree_leaves(result)
    return tuple(x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point())


class _Switched(fx.Interpreter):
    """Runs the graph with some nodes computed in another way; `keep` keeps all values in `env`."""

    def __init__(self, module: fx.GraphModule, fakes: Mapping[fx.Node, Fake], keep: bool) -> None:
        super().__init__(module, garbage_collect_values=not keep)
        self.fakes = fakes

    def run_node(self, n: fx.Node) -> Any:
        fake = self.fakes.get(n)
        if fake is not None:
            return fake(self, n)
        if n.target is torch.ops.fxpress.observe.default:
            return self.env[n.args[0]]  # type: ignore[index]
        return super().run_node(n)


def _fake_activation(params: QuantParams) -> Fake:
    info = torch.iinfo(params.dtype)

    def fake(run: fx.Interpreter, node: fx.Node) -> torch.Tensor:
        x = run.env[node.args[0]]  # type: ignore[index]
        return torch.fake_quantize_per_tensor_affine(x, params.scale, params.zero_point, info.min, info.max)

    return fake


def _fake_weights(program: Program, layer: fx.Node, target: Target, ranges: str) -> Fake:
    weight = constant(program, layer.args[1])
    assert weight is not None
    note = annotation(layer)
    form = (note.row.weight if note else None) or target.weight
    scales = weight_scales(weight.detach(), form, ranges)
    shaped = scales.reshape(-1, *[1] * (weight.ndim - 1))
    rounded = quantize_weight(weight.detach(), scales, form).float() * shaped

    def fake(run: fx.Interpreter, node: fx.Node) -> Any:
        args, kwargs = run.fetch_args_kwargs_from_env(node)
        return run.call_function(node.target, (args[0], rounded, *args[2:]), kwargs)  # type: ignore[arg-type]

    return fake
