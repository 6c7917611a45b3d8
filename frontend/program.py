"""`Program`: the one thing that travels through the compiler.

A Program is a `torch.fx.GraphModule` in ATen training IR together with what the graph alone does not say: named inputs
and outputs with dtype and dims, example inputs, and the log of what each pass did. It runs at every stage, so one can
always ask what a pass cost. Laws: parameters keep the names of the user's `state_dict`; every node that computes has
`meta["val"]` (shape and dtype) and leads back to a source line; nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import linecache
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import FxpressError, OptionError
from .simulate import Simulator, has_integers
from .tensor_info import TensorInfo

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_LIBRARY_FRAMES = ("/torch/", "<eval_with_key>", "<string>")


@dataclass
class StageRecord:
    """What one pass did: seconds, number of changes, notes for people, peak resident memory in MB."""

    name: str
    seconds: float = 0.0
    changes: int = 0
    notes: list[str] = field(default_factory=list)
    peak_rss_mb: float = 0.0


class Program:
    """A model as one graph. Callable like the module it came from.

    `example_inputs` are the flat leaves of the call `(args, kwargs)` that captured it, tensors with batch >= 2 when the
    batch is dynamic. `inputs` and `outputs` describe only the tensors, in graph order.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: tuple[Any, ...],
        inputs: tuple[TensorInfo, ...],
        outputs: tuple[TensorInfo, ...],
        log: list[StageRecord] | None = None,
    ) -> None:
        self.graph_module = graph_module
        self.example_inputs = example_inputs
        self.inputs = inputs
        self.outputs = outputs
        self.log: list[StageRecord] = log if log is not None else []

    # -- running ------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not has_integers(self.graph):
            return self.graph_module(*args, **kwargs)
        result = Simulator(self.graph_module).run(*self._leaves(args, kwargs), enable_io_processing=False)
        return self.graph.process_outputs(result)

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """A call's arguments in the order of the placeholders, given by position or by name."""
        given = inspect.signature(self.graph_module.forward).bind(*args, **kwargs)
        given.apply_defaults()
        values = list(given.arguments.values())
        count = self.input_spec.child(0).num_children
        by_name = dict(zip(self.input_spec.child(1).context, values[count:]))
        return pytree.tree_leaves((tuple(values[:count]), by_name))

    def run_flat(self, leaves: tuple[Any, ...] | list[Any]) -> tuple[torch.Tensor, ...]:
        """Run on the flat inputs in graph order and return the flat tensor outputs (no gradients)."""
        args, kwargs = pytree.tree_unflatten(list(leaves), self.input_spec)
        with torch.no_grad():
            result = self(*args, **kwargs)
        return tuple(x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor))

    def call_example(self) -> tuple[torch.Tensor, ...]:
        """The flat outputs on the example inputs."""
        return self.run_flat(self.example_inputs)

    @property
    def input_spec(self) -> pytree.TreeSpec:
        """How `(args, kwargs)` flatten to the graph's placeholders."""
        return self.graph_module.graph._codegen.pytree_info.in_spec

    @property
    def symbols(self) -> dict[str, str]:
        """Names of symbolic dims: the shape environment's symbol -> the user's name ("s77" -> "batch")."""
        names: dict[str, str] = {}
        for node, info in zip(self.tensor_placeholders(), self.inputs):
            for size, dim in zip(node.meta["val"].shape, info.dims):
                if isinstance(size, torch.SymInt) and isinstance(dim, str):
                    names.setdefault(str(size), dim)
        return names

    # -- the graph ----------------------------------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def tensor_placeholders(self) -> list[fx.Node]:
        """Placeholders that hold tensors, in order; they correspond to `inputs` one to one."""
        return [n for n in self.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)]

    def output_nodes(self) -> list[fx.Node]:
        """The nodes whose tensors are the flat outputs, in order; they correspond to `outputs` one to one."""
        (output,) = [n for n in self.graph.nodes if n.op == "output"]
        return [n for n in pytree.tree_leaves(output.args[0]) if isinstance(n, fx.Node) and _is_tensor(n)]

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return self.graph_module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.graph_module.named_parameters()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.graph_module.state_dict()

    @property
    def parameter_count(self) -> int:
        """Number of parameter values, int8 and int32 ones of a quantized program included, statistics excluded."""
        used = {n.target: n for n in self.graph.nodes if n.op == "get_attr" and n.users}
        tensors = {name: get_attribute(self.graph_module, str(name)) for name in used}
        return sum(
            t.numel()
            for t in tensors.values()
            if isinstance(t, torch.nn.Parameter) or (isinstance(t, torch.Tensor) and t.dtype in _INTEGER_WEIGHTS)
        )

    # -- modes --------------------------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        return bool(self.graph_module.meta.get("fxpress_training", False))

    def train(self, mode: bool = True) -> Program:
        """Switch BatchNorm and dropout to training (or, with `mode=False`, back to evaluation), in place."""
        for node in self.graph.nodes:
            _set_node_mode(node, mode)
        self.graph_module.meta["fxpress_training"] = mode
        self.graph_module.recompile()
        return self

    def eval(self) -> Program:
        """Switch BatchNorm and dropout to evaluation, in place."""
        return self.train(False)

    # -- copies and files ---------------------------------------------------------------------------------------

    def copy(self, share_weights: bool = False) -> Program:
        """A deep copy: editing it leaves this one alone.

        With `share_weights` both hold the same tensors: putting others in their places is seen by one of them only,
        writing into them by both.
        """
        tensors = (*self.graph_module.parameters(), *self.graph_module.buffers()) if share_weights else ()
        with warnings.catch_warnings():  # torch's own tree specs warn about themselves when they are copied
            warnings.simplefilter("ignore", FutureWarning)
            graph_module = copy.deepcopy(self.graph_module, {id(t): t for t in tensors})
        return Program(
            graph_module, self.example_inputs, self.inputs, self.outputs, copy.deepcopy(self.log)
        )

    def save(self, path: str | Path) -> None:
        """Write a `.pt2` archive (graph as JSON, weights as raw tensors). Written whole or not at all."""
        from .archive import save_program

        save_program(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Program:
        """Read what `save` wrote, or any `.pt2` that `torch.export.save` wrote."""
        from .archive import load_program

        return load_program(Path(path))

    def metadata(self) -> dict[str, Any]:
        """What `save` keeps beside the graph, as plain JSON values."""
        return {
            "format": 1,
            "inputs": [asdict(i) for i in self.inputs],
            "outputs": [asdict(o) for o in self.outputs],
            "log": [asdict(r) for r in self.log],
        }

    def text(self) -> str:
        """The graph for people: a line a node with shape, and the source line where it changes."""
        lines, last = [], None
        for node in self.graph.nodes:
            here = source_of(node)
            if here and here != last and node.op == "call_function":
                lines.append(f"# {here}")
                last = here
            lines.append(_node_line(node))
        return "\n".join(lines)

    def __repr__(self) -> str:
        ops = sum(n.op == "call_function" for n in self.graph.nodes)
        ins, outs = ", ".join(map(str, self.inputs)), ", ".join(map(str, self.outputs))
        return f"Program({ops} ops, {self.parameter_count:,} parameters)\n  inputs   {ins}\n  outputs  {outs}"


_INTEGER_WEIGHTS = (torch.int8, torch.uint8, torch.int32)


# -- attributes by dotted path ------------------------------------------------------------------------------------


def get_attribute(module: torch.nn.Module, path: str) -> Any:
    """The parameter, buffer or submodule at a dotted path."""
    for part in path.split("."):
        module = getattr(module, part)
    return module


def set_attribute(module: torch.nn.Module, path: str, value: torch.Tensor) -> None:
    """Put a parameter (if `value` is one) or a buffer at a dotted path, replacing what is there."""
    *owners, leaf = path.split(".")
    for part in owners:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    module._parameters.pop(leaf, None)
    module._buffers.pop(leaf, None)
    if isinstance(value, torch.nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value)


def delete_attribute(module: torch.nn.Module, path: str) -> None:
    """Remove the attribute at a dotted path, and owners that are empty then."""
    owner_path, _, leaf = path.rpartition(".")
    owner = get_attribute(module, owner_path) if owner_path else module
    delattr(owner, leaf)
    # Constants that torch.export lifted are plain attributes.
    holds = any((owner._parameters, owner._buffers, owner._modules))
    if owner_path and not holds and not any(isinstance(v, torch.Tensor) for v in vars(owner).values()):
        delete_attribute(module, owner_path)


# -- where a node comes from --------------------------------------------------------------------------------------


def source_of(node: fx.Node) -> str | None:
    """The user's source line of a node as `file:line: code`, or None. Frames inside torch come last in choice."""
    frames = [m for m in _FRAME.finditer(node.meta.get("stack_trace") or "") if m["file"][0] != "<"]
    own = [m for m in frames if not any(part in m["file"] for part in _LIBRARY_FRAMES)]
    chosen = (own or frames)[-1:]
    if not chosen:
        return None
    file, line = chosen[0]["file"], int(chosen[0]["line"])
    code = linecache.getline(file, line).strip()
    return f"{file}:{line}" + (f": {code}" if code else "")


def module_path(node: fx.Node) -> str:
    """The dotted name of the innermost module that made a node ("layer1.0.conv1"), or ""."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""


def layer_name(node: fx.Node) -> str:
    """What to call a node before people: its module's name when it has one, else the node's own."""
    return module_path(node) or node.name


# -- inner parts --------------------------------------------------------------------------------------------------


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _node_line(node: fx.Node) -> str:
    value = node.meta.get("val")
    shape = ""
    if isinstance(value, torch.Tensor):
        shape = f"  # {str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if node.op == "call_function":
        args = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
        return f"%{node.name} = {node.target}({args}){shape}"
    if node.op == "output":
        return f"return {node.args[0]}"
    return f"%{node.name} = {node.op}[{node.target}]{shape}"


FROZEN = "frozen"  # in meta["custom"] of a norm that keeps its running statistics in training too

# Position of the mode literal in the argument list of each op that behaves differently in training.
_MODE_ARGUMENT = {
    torch.ops.aten.batch_norm.default: 5,
    torch.ops.aten.instance_norm.default: 5,
    torch.ops.aten.dropout.default: 2,
    torch.ops.aten.alpha_dropout.default: 2,
    torch.ops.aten.feature_dropout.default: 2,
    torch.ops.aten.feature_alpha_dropout.default: 2,
    **dict.fromkeys(
        (
            torch.ops.aten.lstm.input, torch.ops.aten.lstm.data, torch.ops.aten.gru.input, torch.ops.aten.gru.data,
            torch.ops.aten.rnn_tanh.input, torch.ops.aten.rnn_relu.input,
        ),
        6,
    ),
}  # fmt: skip
_NORMS = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)


def _set_node_mode(node: fx.Node, training: bool) -> None:
    """Rewrite a mode literal. Norms without running statistics and always-on dropout keep what capture found; norms
    that are marked as frozen stay in evaluation."""
    position = _MODE_ARGUMENT.get(node.target) if node.op == "call_function" else None
    if position is None or len(node.args) <= position:
        return
    if node.target in _NORMS and node.args[3] is None:
        return
    custom = dict(node.meta.get("custom") or {})
    captured = custom.setdefault("eval_mode", node.args[position])
    node.meta["custom"] = custom
    node.update_arg(position, True if training and not custom.get(FROZEN) else captured)


def require_program(value: Any, what: str = "expected") -> None:
    """Raise OptionError for what is no Program."""
    if not isinstance(value, Program):
        kind = type(value).__name__
        raise OptionError(f"{what} a Program, got {kind}", hint="fxpress.capture(module, example_inputs) makes one")


def describe_tensors(nodes: list[fx.Node], names: list[str], symbols: dict[str, str]) -> tuple[TensorInfo, ...]:
    """`TensorInfo` for nodes, with symbolic sizes written by the given names."""
    return tuple(
        TensorInfo(name, dtype_name(n.meta["val"].dtype), tuple(_dim(s, symbols) for s in n.meta["val"].shape))
        for n, name in zip(nodes, names)
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "float32"."""
    return str(dtype).removeprefix("torch.")


def _dim(size: int | torch.SymInt, symbols: dict[str, str]) -> int | str:
    if isinstance(size, int):
        return size
    text = str(size)
    for symbol, name in symbols.items():
        text = re.sub(rf"\b{symbol}\b", name, text)
    with contextlib.suppress(ValueError):
        return int(text)
    return text


def parse_metadata(text: str) -> dict[str, Any]:
    """Read what `Program.metadata` wrote; {} for a foreign archive."""
    if not text:
        return {}
    data = json.loads(text)
    if data.get("format") != 1:
        raise FxpressError(f"this archive has metadata format {data.get('format')}, this fxpress reads format 1")
    return data
