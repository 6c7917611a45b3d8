"""From an `nn.Module` to a `Program`.

Laws: the user's module is not touched (a deep copy is exported, in eval mode); the batch is dynamic unless the user
says otherwise (capture runs with batch >= 2, or torch would silently freeze it); the graph is functional; guards are
left out. What cannot be captured is an error that names the user's source line and what to change. What was captured
gives what the module gives on the example inputs, or it is an error too.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import CaptureError, DataError, first_line
from .agreement import check_same
from .aliases import use_canonical_names
from .composites import write_out_composites
from .fake_run import recurrent_at_once
from .functionalize import AUTOCAST, UPDATED, functionalize, resolve_masks
from .program import Program, delete_attribute, describe_tensors, dtype_name, source_of
from .train_modes import UNTRAINED, differences_in_training

BATCH = "batch"
_LIBRARY_PARTS = ("/torch/", str(Path(__file__).parent), "<")


def capture(
    module: torch.nn.Module,
    args: tuple[Any, ...] | torch.Tensor,
    kwargs: dict[str, Any] | None = None,
    dynamic_batch: bool = True,
    share_weights: bool = False,
) -> Program:
    """Trace `module(*args, **kwargs)` to a Program.

    `args` are example inputs; their values only matter for the numeric checks of later passes. With `dynamic_batch`
    every tensor whose first size equals that of the first tensor shares one symbolic dim "batch". `share_weights` lets
    the Program read the module's own parameters instead of copies, for those who do not write into them.
    Raises `CaptureError` (what cannot be traced, and where) or `DataError` (inputs that are no inputs).
    """
    args, kwargs = _checked_inputs(module, args, kwargs)
    given = args, kwargs
    if dynamic_batch:
        args, kwargs = _with_batch_of_two(args, kwargs)
    copied = _copy(module, share_weights)
    untrained = differences_in_training(copied)
    dynamic = _dynamic_shapes(copied, args, kwargs) if dynamic_batch else None
    with quiet():
        try:
            expected = _run(module, args, kwargs)
        except CaptureError as error:
            if _batch_size(*given) == 1 and dynamic_batch:
                _run(module, *given)  # if that fails too, the batch of two is not to blame
                raise _no_batch_of_one(error) from error
            raise
        with recurrent_at_once():
            exported = _export(copied, args, kwargs, dynamic)
        program = program_from_exported(exported, example_leaves=tuple(pytree.tree_leaves((args, kwargs))))
        check_same(program, expected, lambda: _run(module, args, kwargs))
    meta, state = program.graph_module.meta, {n for n, _ in (*copied.named_buffers(), *copied.named_parameters())}
    meta["fxpress_model"] = type(module).__name__
    meta[UNTRAINED] = untrained
    meta[UPDATED] = [n for n in meta.get(UPDATED, ()) if n in state]
    return program


def notes_of(program: Program) -> list[str]:
    """What people should know of a captured program."""
    updated, autocast = (program.graph_module.meta.get(key) for key in (UPDATED, AUTOCAST))
    notes = []
    if updated:
        notes.append(
            f"the model writes into {', '.join(updated)} as it runs; the program does not: each call starts from what "
            "they were at capture"
        )
    if autocast:
        notes.append(f"what the model computes in {dtype_name(autocast)} under autocast has its weights' dtype here")
    return notes


def program_from_exported(
    exported: torch.export.ExportedProgram,
    example_leaves: tuple[Any, ...] | None = None,
    dim_names: list[list[int | str]] | None = None,
) -> Program:
    """A Program from an `ExportedProgram` in training IR (not decomposed)."""
    graph_module = exported.module(check_guards=False)
    if example_leaves is None:
        example_leaves = tuple(pytree.tree_leaves(exported.example_inputs))
    use_canonical_names(graph_module)
    functionalize(graph_module)
    resolve_masks(graph_module)
    _check_sizes(graph_module)
    write_out_composites(graph_module)
    _drop_counters(graph_module)
    program = Program(graph_module, example_leaves, (), ())
    placeholders = program.tensor_placeholders()
    symbols = _symbol_names(placeholders, dim_names)
    program.inputs = describe_tensors(placeholders, [str(p.target) for p in placeholders], symbols)
    outputs = program.output_nodes()
    program.outputs = describe_tensors(outputs, _output_names(graph_module, outputs), symbols)
    graph_module.recompile()
    return program


def _checked_inputs(
    module: torch.nn.Module, args: Any, kwargs: dict[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(module, torch.nn.Module):
        raise CaptureError(
            f"expected a torch.nn.Module, got {type(module).__name__}",
            hint="pass the module itself, not its class or its output",
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError("a ScriptModule cannot be traced", hint="pass the module that it was made from")
    if isinstance(args, torch.Tensor):
        args = (args,)
    if not isinstance(args, (tuple, list)):
        raise DataError(f"args must be a tuple of example inputs, got {type(args).__name__}", hint="write (x,)")
    kwargs = dict(kwargs or {})
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if not tensors:
        raise DataError("the example inputs hold no tensor", hint="pass one at least: torch.randn(2, 3, 224, 224)")
    for tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError(
                "the example inputs hold NaN or infinity",
                hint="check how they were loaded; give masks as booleans, or with a large negative number as -1e9",
            )
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (tuple(args), kwargs))
    return args, kwargs


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    sizes = [x.shape[0] for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
    return int(sizes[0]) if sizes else None


def _with_batch_of_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat a batch of one, since torch freezes sizes 0 and 1."""
    batch = _batch_size(args, kwargs)
    if batch == 0:
        raise DataError("the example batch is empty", hint="pass at least one example")
    if batch != 1:
        return args, kwargs
    return pytree.tree_map(lambda x: torch.cat([x, x]) if _has_batch(x, 1) else x, (args, kwargs))


def _no_batch_of_one(error: CaptureError) -> CaptureError:
    return CaptureError(
        f"the model runs on the example inputs, but not with a batch of two of them: {error.message}",
        where=error.where,
        hint="the batch is the first size of the first input, here 1: give two examples, or, if that is no batch, "
        "fxpress.capture(..., dynamic_batch=False)",
    )


def _has_batch(x: Any, batch: int) -> bool:
    return isinstance(x, torch.Tensor) and x.ndim > 0 and x.shape[0] == batch


def _dynamic_shapes(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One `Dim` shared by all first sizes that equal the batch, keyed by forward's parameter names."""
    batch = _batch_size(args, kwargs)
    if batch is None:
        return None
    dim = torch.export.Dim(BATCH, min=1)
    spec = lambda x: {0: dim} if _has_batch(x, batch) else None  # noqa: E731
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise DataError(
            f"the example inputs do not fit {type(module).__name__}.forward: {error}",
            hint=f"its signature is forward{inspect.signature(module.forward)}",
        ) from error
    shapes = {name: pytree.tree_map(spec, value) for name, value in bound.items()}
    kinds = inspect.signature(module.forward).parameters
    for name, value in list(shapes.items()):
        if kinds[name].kind is inspect.Parameter.VAR_KEYWORD:
            shapes |= shapes.pop(name) if isinstance(value, dict) else {}
    return shapes


def _copy(module: torch.nn.Module, share_weights: bool = False) -> torch.nn.Module:
    """A copy in evaluation mode. Raises CaptureError for what cannot be copied."""
    memo: dict[int, Any] = {id(p): p for p in module.parameters()} if share_weights else {}
    for part in module.modules():
        for value in vars(part).values():  # what a hook computed last (old weight_norm): torch copies leaves only
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(module, memo).eval()
    except Exception as error:
        raise CaptureError(
            f"the module cannot be copied: {type(error).__name__}: {first_line(error)}",
            hint="the copy is what is traced; take off what holds open files, locks or other processes",
        ) from error


def _run(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the module itself gives. It may write into its inputs, its buffers, even its weights: all are copies."""
    trial = _copy(module)
    copies, named = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    try:
        with torch.no_grad():
            return trial(*copies, **named)
    except Exception as error:
        raise CaptureError(
            f"the model fails on the example inputs: {type(error).__name__}: {first_line(error)}",
            where=_user_line(error),
            hint="call the model on these inputs yourself; check shapes and dtypes" + _shapes_text(args, kwargs),
        ) from error


def _export(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise _capture_error(error) from error


def _capture_error(error: Exception) -> CaptureError:
    text = str(error)
    name = type(error).__name__
    if "specialized" in text or "ConstraintViolation" in name or "Constraints violated" in text:
        condition = _condition(text)
        fixed = f"the model fixes the batch size: {first_line(error)}"
        return CaptureError(
            f"the model does not take every batch size: it needs {condition}" if condition else fixed,
            where=_user_line(error) or _line_in_text(text),
            hint="use x.shape[0] or -1 instead of a number in view/reshape, or capture with dynamic_batch=False; where "
            "the batch of the example equals another of its sizes (tokens, say), give an example of another batch",
        )
    if "data-dependent" in text or "DataDependent" in name or "GuardOnDataDependent" in name:
        return CaptureError(
            f"the model's control flow or a size depends on data: {first_line(error)}",
            where=_user_line(error) or _line_in_text(text),
            hint="replace the `if` or `.item()` by torch.where or a fixed size; capture the part before it on its own",
        )
    return CaptureError(
        f"torch.export cannot trace the model: {name}: {first_line(error)}",
        where=_user_line(error) or _line_in_text(text),
        hint="change this line to plain tensor operations, or capture a submodule that leaves it out",
    )


def _condition(text: str) -> str | None:
    """What torch found that the batch must fulfil, in the user's words."""
    found = re.search(r"generated guard ([^\n]+?)(?:\.Specializ|\.?\n|$)", text)
    return re.sub(r"L\['[^']*'\](\[[^\]]*\])*\.size\(\)\[0\]", BATCH, found[1]) if found else None


def _user_line(error: BaseException) -> str | None:
    """The deepest frame of a traceback that is not torch's or ours."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(part in f.filename for part in _LIBRARY_PARTS)]
    return f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else None


def _line_in_text(text: str) -> str | None:
    """The last user line that torch wrote into its message."""
    lines = [s.strip() for s in text.splitlines()]
    found = [
        (s, lines[i + 1] if i + 1 < len(lines) else "")
        for i, s in enumerate(lines)
        if s.startswith('File "') and not any(part in s for part in _LIBRARY_PARTS)
    ]
    return f"{found[-1][0]}: {found[-1][1]}" if found else None


def _shapes_text(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    shapes = [f"{tuple(x.shape)} {x.dtype}" for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    return f" (given: {', '.join(shapes)})"


def _symbol_names(placeholders: list[fx.Node], dim_names: list[list[int | str]] | None) -> dict[str, str]:
    """Which user name each shape symbol bears: the archive's, or "batch" for first sizes and "dimN" for others."""
    symbols: dict[str, str] = {}
    for i, node in enumerate(placeholders):
        for j, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and str(size) not in symbols:
                given = dim_names[i][j] if dim_names and i < len(dim_names) else None
                default = BATCH if j == 0 and BATCH not in symbols.values() else f"dim{len(symbols)}"
                symbols[str(size)] = given if isinstance(given, str) else default
    return symbols


def _output_names(graph_module: fx.GraphModule, outputs: list[fx.Node]) -> list[str]:
    """Names from the output's dict keys where it has them, else output, output_1, ..."""
    spec = graph_module.graph._codegen.pytree_info.out_spec
    (output,) = [n for n in graph_module.graph.nodes if n.op == "output"]
    paths = pytree.tree_leaves_with_path(pytree.tree_unflatten(pytree.tree_leaves(output.args[0]), spec))
    named = {id(leaf): _path_name(path) for path, leaf in paths if isinstance(leaf, fx.Node)}
    names: list[str] = []
    for i, node in enumerate(outputs):
        name = named.get(id(node)) or ("output" if i == 0 else f"output_{i}")
        names.append(name if name not in names else f"{name}_{i}")
    return names


def _path_name(path: tuple[Any, ...]) -> str:
    keys = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
    return "_".join(k for k in keys if k)


def _check_sizes(graph_module: fx.GraphModule) -> None:
    """Sizes may depend on those of the inputs, not on their values: no runtime could plan for them."""
    for node in graph_module.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            sizes = value.shape if isinstance(value, torch.Tensor) else ()
            if any(isinstance(s, torch.SymInt) and s.node.hint is None for s in sizes):
                raise CaptureError(
                    f"a size depends on data: {node.name} ({node.target}) gives {list(value.shape)}",
                    where=source_of(node),
                    hint="keep all values and multiply them by the mask, or use torch.where or topk; or capture the "
                    "part before this line on its own",
                )


def _drop_counters(graph_module: fx.GraphModule) -> None:
    """`num_batches_tracked` takes no part in inference, and capture in eval mode never advances it."""
    used = {n.target for n in graph_module.graph.nodes if n.op == "get_attr" and n.users}
    for node in list(graph_module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph_module.graph.erase_node(node)
    for name in [n for n, _ in graph_module.named_buffers()]:
        if name not in used and name.endswith("num_batches_tracked"):
            delete_attribute(graph_module, name)


@contextmanager
def quiet() -> Iterator[None]:
    """torch.export logs, warns and prints much about what is checked here anyway, or ends in an error of ours."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
