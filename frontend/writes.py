"""In-place writes as values: what is written into a tensor is read by all that share its memory.

A value is an alias where its example has the storage of one of its inputs: the tracer's examples know, whatever the op
is called, that `reshape` of a transposed tensor copies and `chunk` does not. From an alias to what it is a view of, and
so on, leads a path to the tensor that owns the memory.

A write makes a new value of the tensor written. Along the path each view is undone (`select` by `select_scatter`, a
permutation by its inverse, a reshape by one), which gives a new value of each tensor on it. Everything else that shares
the memory is out of date from then on: whoever reads it later reads a view that is taken again, of the new value. This
is how torch functionalizes below autograd, done here on the graph, where ops are still as the user wrote them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from ..errors import CaptureError
from .aliases import canonical
from .fake_run import FakeRun
from .program import source_of

aten = torch.ops.aten

# View op -> the op that writes a source back through it: scatter(base, source, *view arguments).
_SCATTER = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
_RESHAPES = {
    "view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "reshape_as", "ravel", "contiguous",
    "expand", "expand_as", "broadcast_to", "atleast_1d", "atleast_2d", "atleast_3d",
}  # fmt: skip
_EXPANSIONS = {"expand", "expand_as", "broadcast_to"}
_PERMUTES = {
    "transpose", "t", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "mT", "mH", "numpy_T", "matrix_H",
    "adjoint",
}  # fmt: skip
_SPLITS = {"chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit"}
# In evaluation these return their input itself; the tracer's examples do not show it.
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
# In-place ops whose functional form has another name or signature.
_FUNCTIONAL = {
    aten.copy_.default: aten.copy.default,
    aten.fill_.Scalar: aten.full_like.default,
    aten.zero_.default: aten.zeros_like.default,
}
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "logical_not"}


def replace_writes(graph_module: fx.GraphModule) -> list[str]:
    """Leave no op in the graph that writes into a tensor. Returns the names of the buffers and parameters that were
    written into: each call starts from what they are now. Raises CaptureError, with the line, where that cannot be."""
    nodes = [n for n in graph_module.graph.nodes if n.op == "call_function"]
    if not any(_mutated(n) for n in nodes):
        return []
    memory = _Memory(graph_module)
    memory.run()
    return [str(owner.target) for owner in memory.writes if owner.op == "get_attr"]


# -- what is written -------------------------------------------------------------------------------------------------


def _mutated(node: fx.Node) -> list[str]:
    """Names of the arguments that an op writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    return [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def _written(node: fx.Node) -> fx.Node | None:
    """The tensor that an op writes into: its first argument, or `out`."""
    names = _mutated(node)
    if not names:
        return None
    first = node.target._schema.arguments[0].name  # type: ignore[union-attr]
    written = node.args[0] if names[0] == first and node.args else node.kwargs.get(names[0])
    if len(names) > 1 or names[0] not in (first, "out") or not isinstance(written, fx.Node):
        raise _unknown(node)
    return written


def _unknown(node: fx.Node) -> CaptureError:
    return CaptureError(
        f"in-place op {node.target} has no functional form that fxpress knows",
        where=source_of(node),
        hint="write the line without the in-place op",
    )


def _make_functional(node: fx.Node) -> None:
    """The op that gives as its result what this one writes."""
    if "out" in node.kwargs:
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "out"}
        node.target = _without_out(node)
    else:
        node.target = _out_of_place(node)


def _out_of_place(node: fx.Node) -> Any:
    if node.target in _FUNCTIONAL:
        return _FUNCTIONAL[node.target]
    schema = node.target._schema  # type: ignore[union-attr]
    name = schema.name.split("::")[1]
    plain = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")  # __ior__ is __or__ in place
    overload = getattr(getattr(aten, plain, None), schema.overload_name or "default", None)
    if overload is None:
        raise _unknown(node)
    return canonical(overload)


def _without_out(node: fx.Node) -> Any:
    schema = node.target._schema  # type: ignore[union-attr]
    wanted = [(a.name, str(a.type)) for a in schema.arguments if a.name != "out"]
    packet = getattr(aten, schema.name.split("::")[1])
    for name in packet.overloads():
        overload = getattr(packet, name)
        if [(a.name, str(a.type)) for a in overload._schema.arguments] == wanted:
            return overload
    raise _unknown(node)


# -- who shares memory -------------------------------------------------------------------------------------------------


def _name(node: fx.Node) -> str:
    """An op's name without its namespace and overload."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else ""


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _storages(value: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in _tensors(value)}


def _examples(graph_module: fx.GraphModule) -> dict[fx.Node, Any]:
    """An example of each value, sharing memory as the values do: the tracer's own, or, after an archive that has lost
    that, new ones."""
    nodes = list(graph_module.graph.nodes)
    examples = {n: n.meta.get("val") for n in nodes}
    strict = [n for n in nodes if _is_view_op(n) and _storages(examples[n]) and _storages(examples[n.args[0]])]
    if all(_storages(examples[n]) & _storages(examples[n.args[0]]) for n in strict):
        return examples
    return fake_values(graph_module)


def fake_values(graph_module: fx.GraphModule) -> dict[fx.Node, Any]:
    """What each node gives for the examples of the placeholders, computed anew on fake tensors."""
    inputs = [n.meta.get("val") for n in graph_module.graph.nodes if n.op == "placeholder"]
    mode = detect_fake_mode(inputs)
    assert mode is not None
    seen: dict[fx.Node, Any] = {}

    class Run(FakeRun):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    Run(graph_module, mode, garbage_collect_values=False).run_nodes(inputs)
    return seen


def _is_view_op(node: fx.Node) -> bool:
    """Does this op give a view of its first argument, whatever its strides?"""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    return node.target in _SCATTER or node.target in (aten.view.default, aten.transpose.int, aten.permute.default)


class _Memory:
    """Who shares memory with whom, and which node holds the value of each alias at this point of the graph."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph = graph_module.graph
        self.examples = _examples(graph_module)
        self.bases: dict[fx.Node, tuple[fx.Node, ...]] = {}  # what a node is a view of
        self.same: set[fx.Node] = set()  # aliases that are their base, as it is
        self.owners: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.writes: dict[fx.Node, int] = {}  # owner of memory -> how often it was written
        self.asked: dict[fx.Node, tuple[Any, Any]] = {}  # arguments as the user wrote them
        self.current: dict[fx.Node, fx.Node] = {}
        self.stamp: dict[fx.Node, tuple[int, ...]] = {}  # the writes that `current` has seen, by owner

    def run(self) -> None:
        """Go through the graph in order."""
        self._find_aliases()
        for node in list(self.graph.nodes):
            if node.op not in ("call_function", "output"):
                continue
            written = _written(node)
            if self.writes:
                self.asked[node] = node.args, node.kwargs
                node.args, node.kwargs = self._read_all(node, node)
                self.stamp[node] = self._now(node)
            if written is not None:
                self._write(node, written)

    def _find_aliases(self) -> None:
        first: dict[Any, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr" or node.target is operator.getitem:
                key = (node.op, node.target, *node.args)
                if first.setdefault(key, node) is not node:
                    self.bases[node] = (first[key],)
                    self.same.add(node)
                    continue
            if node.op != "call_function" or _mutated(node):
                continue
            if node.target is operator.getitem:
                if node.args[0] in self.bases:
                    self.bases[node] = (node.args[0],)
                continue
            mine = _storages(self.examples[node])
            shared = [a for a in node.all_input_nodes if _storages(self.examples[a]) & mine]
            if _name(node) in _DROPOUTS and not node.args[2]:
                shared = [node.args[0]]
            if shared:
                self.bases[node] = tuple(shared) if isinstance(self.examples[node], (list, tuple)) else (shared[0],)

    def _owned_by(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Who owns the memory of a node. (Asked for in graph order, so that all its bases are known.)"""
        if node not in self.owners:
            found = [owner for base in self.bases.get(node, ()) for owner in self._owned_by(base)]
            self.owners[node] = tuple(dict.fromkeys(found)) or (node,)
        return self.owners[node]

    def _now(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.writes.get(owner, 0) for owner in self._owned_by(node))

    def _read(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The node that holds what `node` is worth at `before`; views that are out of date are taken again."""
        now = self._now(node)
        if self.stamp.get(node, (0,) * len(now)) == now:
            return self.current.get(node, node)
        if node in self.same:
            value = self._read(self.bases[node][0], before)
        else:
            with self.graph.inserting_before(before):
                args, kwargs = self._read_all(node, before)
                value = self.graph.node_copy(node)
                value.args, value.kwargs = args, kwargs
        self.current[node], self.stamp[node] = value, now
        return value

    def _read_all(self, node: fx.Node, before: fx.Node) -> tuple[Any, Any]:
        """The arguments of `node` as they are at `before`."""
        args, kwargs = self.asked.get(node, (node.args, node.kwargs))
        look = lambda n: self._read(n, before)  # noqa: E731
        return fx.map_arg(args, look), fx.map_arg(dict(kwargs), look)

    def _write(self, node: fx.Node, written: fx.Node) -> None:
        """Let `node`, which writes into `written`, give a value, and everything that shares its memory follow it."""
        after = node.next
        _make_functional(node)
        value = self._cast(node, written, after)
        updates = [(written, value)]
        view = written
        while view in self.bases:
            base, undo = self._step_up(view)
            if undo is not None:
                old = self._read(base, node)
                with self.graph.inserting_before(after):
                    new = undo(old, value)
                new.meta = {**node.meta, "val": base.meta["val"]}
                value = new
            updates.append((base, value))
            view = base
        self.writes[view] = self.writes.get(view, 0) + 1
        self.bases[node] = self.bases[written] if written in self.same else (written,)
        self.same.add(node)
        self.owners.pop(node, None)  # until now it had memory of its own
        for alias, now_worth in [*updates, (node, updates[0][1])]:
            self.current[alias], self.stamp[alias] = now_worth, self._now(alias)

    def _cast(self, node: fx.Node, written: fx.Node, after: fx.Node) -> fx.Node:
        """What is written takes the dtype of the tensor that it is written into."""
        target = written.meta["val"]
        operands = [t for a in node.all_input_nodes for t in _tensors(a.meta.get("val"))]
        if _name(node) not in _COMPARISONS and all(t.dtype == target.dtype for t in operands):
            return node
        mode = detect_fake_mode([target])
        assert mode is not None
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        with mode, torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        if result.dtype == target.dtype:
            return node
        node.meta["val"] = result
        with self.graph.inserting_before(after):
            cast = self.graph.call_function(aten.to.dtype, (node, target.dtype))
        cast.meta = {**node.meta, "val": target}
        return cast

    # -- undoing a view ------------------------------------------------------------------------------------------------

    def _step_up(self, view: fx.Node) -> tuple[fx.Node, Callable[[fx.Node, fx.Node], fx.Node] | None]:
        """(what `view` is a view of, how its new value comes from its old one and the new value of the view); None
        where both are the same value."""
        base = self.bases[view][0]
        if view in self.same:
            return base, None
        if view.target is operator.getitem:
            owners = self.bases[base]
            if len(owners) > 1:
                raise self._no_way_back(base, view)
            return owners[0], lambda old, value: self._undo_piece(base, view, old, value)
        if self._alike(view, base):
            return base, None
        return base, lambda old, value: self._undo(view, base, old, value)

    def _alike(self, view: fx.Node, base: fx.Node) -> bool:
        """Has a view the form of its base?"""
        mine, theirs = view.meta["val"], base.meta["val"]
        if _name(view) in _DROPOUTS:
            return True
        return _texts(mine.shape) == _texts(theirs.shape) and _texts(mine.stride()) == _texts(theirs.stride())

    def _undo(self, view: fx.Node, base: fx.Node, old: fx.Node, value: fx.Node) -> fx.Node:
        call, name = self.graph.call_function, _name(view)
        if view.target in _SCATTER:
            return call(_SCATTER[view.target], (old, value, *view.args[1:]), dict(view.kwargs))
        if name == "narrow" and all(isinstance(a, int) for a in view.args[1:4]):
            dim, start, length = view.args[1:4]
            return call(aten.slice_scatter.default, (old, value, dim, start, start + length))  # type: ignore[operator]
        if name in _PERMUTES:
            order = _order(view, base.meta["val"].ndim)
            return call(aten.permute.default, (value, [order.index(d) for d in range(len(order))]))
        sizes = [_texts([s for s in n.meta["val"].shape if not _is_one(s)]) for n in (view, base)]
        if name in _RESHAPES and (name not in _EXPANSIONS or sizes[0] == sizes[1]):
            shape = [
                s if isinstance(s, int) else call(aten.sym_size.int, (old, d))
                for d, s in enumerate(base.meta["val"].shape)
            ]
            for node, size in zip(shape, base.meta["val"].shape):
                if isinstance(node, fx.Node):
                    node.meta["val"] = size
            return call(aten.reshape.default, (value, shape))
        raise self._no_way_back(view, value)

    def _undo_piece(self, pieces: fx.Node, view: fx.Node, old: fx.Node, value: fx.Node) -> fx.Node:
        """Write back one result of an op that gives several views, such as `chunk`."""
        call, index = self.graph.call_function, view.args[1]
        whole, parts = old.meta["val"], pieces.meta["val"]
        index = index % len(parts)  # type: ignore[operator]
        if _name(pieces) == "unbind":
            dim = pieces.args[1] if len(pieces.args) > 1 else pieces.kwargs.get("dim", 0)
            return call(aten.select_scatter.default, (old, value, dim, index))
        if _name(pieces) in _SPLITS and parts[index].ndim == whole.ndim:
            dims = [d for d in range(whole.ndim) if str(parts[index].shape[d]) != str(whole.shape[d])]
            dim = dims[0] if dims else 0
            ends = [0]
            for part in parts[: index + 1]:
                ends.append(ends[-1] + part.shape[dim])
            if isinstance(ends[index + 1], int):
                return call(aten.slice_scatter.default, (old, value, dim, ends[index], ends[index + 1]))
        raise self._no_way_back(pieces, value)

    def _no_way_back(self, view: fx.Node, value: fx.Node) -> CaptureError:
        return CaptureError(
            f"the model writes in place through {view.target}, which fxpress cannot express without in-place ops",
            where=source_of(value) or source_of(view),
            hint="write it as torch.where, torch.cat or index_put",
        )


def _texts(sizes: Any) -> list[str]:
    """Sizes to be compared without a guard: == on SymInts would add one."""
    return [str(s) for s in sizes]


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _order(view: fx.Node, ndim: int) -> list[int]:
    """The permutation that an op makes, seen on a tensor whose sizes are all different."""
    sizes = list(range(2, 2 + ndim))
    out = view.target(torch.empty(sizes), *view.args[1:], **view.kwargs)  # type: ignore[operator]
    return [sizes.index(s) for s in out.shape]
