"""Any iterable of batches, checked and brought to one form: flat tuples of tensors in the order of `program.inputs`.

A batch may be a tensor, a tuple or list of tensors, a dict by input name, each with labels or without (one leaf more
than the program has inputs: the last is the label and is dropped). What does not fit the program is an error that says
what was received; nothing is cast or reshaped in silence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..errors import DataError, explained
from .batch_dim import count_examples, some_examples
from .program import Program, TensorInfo, dtype_name

NO_LABEL = -100  # the class number that PyTorch's losses ignore
LABEL_NAMES = ("label", "labels", "y", "target", "targets")
# A one-shot iterator is kept in memory up to this size, since calibration and verification read the data again.
_KEEP_MB = 512.0
_TENSOR_BATCH = 32
_END = object()


@dataclass
class Batches:
    """Re-iterable flat batches that fit a program. Every pass checks every batch; `count` is known after the first.

    Raises DataError while iterating: empty data, wrong number, names, shapes or dtypes, NaN or infinity.
    """

    program: Program
    source: Callable[[], Iterable[Any]] = field(repr=False)
    count: int | None = None
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        count = 0
        for index, item in enumerate(read(self.source)):
            batch = flat_inputs(self.program.inputs, item)
            check_batch(self.program.inputs, batch, index)
            if index == 0:
                self.notes = sanity_notes(self.program, batch)
            count += count_examples(self.program.inputs, batch)
            yield batch
        if count == 0:
            raise DataError("the data hold no examples", hint="give at least one batch")
        self.count = count

    def labelled(self, needed: bool = True) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
        """The checked batches, each with its labels: the one leaf more than the program has inputs.

        Where there are none, and they are not `needed`, they are NO_LABEL.
        """
        for index, item in enumerate(read(self.source)):
            batch = flat_inputs(self.program.inputs, item)
            check_batch(self.program.inputs, batch, index)
            count = count_examples(self.program.inputs, batch)
            labels = _labels(self.program.inputs, item, None if needed else count)
            if labels.ndim and len(labels) != count:
                raise DataError(
                    f"batch {index} of the data holds {count} examples and {len(labels)} labels",
                    hint="give one label, or one tensor of labels, for each example",
                )
            yield batch, labels

    def first(self, examples: int | None = None) -> tuple[torch.Tensor, ...]:
        """The first batch, cut to `examples`."""
        batch = next(iter(self))
        return some_examples(self.program.inputs, batch, slice(examples)) if examples else batch


def as_batches(program: Program, data: Any) -> Batches:
    """Make `data` re-iterable flat batches for `program`, and check its first batch now.

    `data` is an iterable of batches, a callable that returns one, or one tensor or array that holds all examples. A
    one-shot iterator (a generator) is read once and kept in memory, up to 512 MB; above, DataError says what to pass.
    """
    batches = Batches(program, _reiterable(program, data))
    batches.first()
    return batches


def read(source: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """What the data give. Raises DataError where the user's own code fails at it."""
    items: Iterator[Any] | None = None
    for index in itertools.count():
        what, hint = f"batch {index} of the data cannot be read", "the code that gives the data fails"
        with explained(DataError, what, f"{hint}: try `for batch in data: pass`"):
            items = iter(source()) if items is None else items
            item = next(items, _END)
        if item is _END:
            return
        yield item


def flat_inputs(infos: tuple[TensorInfo, ...], item: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of one batch in the order of `infos`, labels dropped. Raises DataError."""
    names = [i.name for i in infos]
    if isinstance(item, Mapping):
        leaves = _by_name(item, names)
    else:
        leaves = [x for x in pytree.tree_leaves(item, is_leaf=_is_numbers) if x is not None]
    if len(leaves) == len(infos) + 1:
        leaves = leaves[:-1]
    if len(leaves) != len(infos):
        raise DataError(
            f"a batch holds {len(leaves)} tensors, the model takes {len(infos)}: {', '.join(map(str, infos))}",
            hint="give inputs, or (inputs, labels), in the order of the model's arguments; labels are one tensor "
            "(stack several into columns, which an objective of your own takes apart)",
        )
    return tuple(_as_tensor(x, i) for x, i in zip(leaves, infos))


def _labels(infos: tuple[TensorInfo, ...], item: Any, unlabelled: int | None) -> torch.Tensor:
    """The labels of a batch; where it has none, and `unlabelled` says how many examples it holds, as many NO_LABEL."""
    if isinstance(item, Mapping):
        given = [item[n] for n in LABEL_NAMES if n in item]
    else:
        given = [x for x in pytree.tree_leaves(item, is_leaf=_is_numbers) if x is not None][len(infos) :]
    if not given and unlabelled is not None:
        return torch.full((unlabelled,), NO_LABEL)
    if len(given) != 1:
        raise DataError(
            "a batch holds no labels",
            hint="give (inputs, labels), in a list or DataLoader (a one-shot iterator keeps its inputs only)",
        )
    return given[0] if isinstance(given[0], torch.Tensor) else torch.as_tensor(given[0])


def _is_numbers(value: Any) -> bool:
    """Is it a plain list of numbers, such as class numbers?"""
    return isinstance(value, list) and bool(value) and all(isinstance(v, (int, float)) for v in value)


def check_batch(infos: tuple[TensorInfo, ...], batch: tuple[torch.Tensor, ...], index: int) -> None:
    """Raise DataError unless every tensor has its input's dtype and dims, and holds finite values."""
    sizes: dict[str, int] = {}
    for info, tensor in zip(infos, batch):
        _check_dtype(info, tensor, index)
        _check_dims(info, tensor, index, sizes)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise DataError(
                f"batch {index} of the data holds {bad} NaN or infinite values in input {info.name!r}",
                hint="find them with torch.isfinite(x).all(); calibration on them would be worthless",
            )


def _check_dtype(info: TensorInfo, tensor: torch.Tensor, index: int) -> None:
    if dtype_name(tensor.dtype) != info.dtype:
        raise DataError(
            f"batch {index} of the data has dtype {dtype_name(tensor.dtype)} for input {info}",
            hint=f"convert it: x.to(torch.{info.dtype})" + _PIXELS * (tensor.dtype == torch.uint8),
        )


_PIXELS = "; for pictures use a Preprocess (--preprocess), which also scales and normalizes"


def _check_dims(info: TensorInfo, tensor: torch.Tensor, index: int, sizes: dict[str, int]) -> None:
    shape = tuple(tensor.shape)
    if not info.fits_shape(shape, sizes):
        unbatched = len(shape) == len(info.dims) - 1
        raise DataError(
            f"batch {index} of the data has shape {list(shape)} for input {info}",
            hint="add a batch dimension: x.unsqueeze(0)" if unbatched else _shape_hint(info, shape),
        )


def _shape_hint(info: TensorInfo, shape: tuple[int, ...]) -> str:
    if 0 in shape:
        return "the batch is empty: leave it out"
    if len(shape) == 4 and len(info.dims) == 4 and shape[3] == info.dims[1]:
        return "the data look like NHWC: x.permute(0, 3, 1, 2)"
    if info.dims and isinstance(info.dims[0], int):
        return "the batch is fixed: give batches of that size, or capture with dynamic_batch=True"
    return "give data of the size that the model was captured with, or capture with the size of the data"


def sanity_notes(program: Program, batch: tuple[torch.Tensor, ...]) -> list[str]:
    """What looks wrong in a batch without being impossible. Raises DataError for inputs that are all one value."""
    notes = []
    for info, tensor in zip(program.inputs, batch):
        if not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        low, high = float(tensor.min()), float(tensor.max())
        if low == high:
            raise DataError(
                f"every value of input {info.name!r} is {low:g}",
                hint="calibration needs real examples: check how the data were loaded",
            )
        if low >= 0 and high > 2 and torch.equal(tensor, tensor.round()):
            notes.append(
                f"input {info.name!r} holds whole numbers from {low:g} to {high:g}: pixels without normalization?"
            )
    return notes


def _by_name(item: Mapping[Any, Any], names: list[str]) -> list[Any]:
    unknown = [str(k) for k in item if k not in names and k not in LABEL_NAMES]
    missing = [n for n in names if n not in item]
    if missing or unknown:
        raise DataError(
            f"a batch has the keys {', '.join(map(str, item))}; the model's inputs are {', '.join(names)}",
            hint="name each entry after the argument of forward that it is for",
        )
    return [item[n] for n in names]


def _as_tensor(value: Any, info: TensorInfo) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return torch.from_numpy(np.ascontiguousarray(value))
    raise DataError(
        f"a batch holds a {type(value).__name__} for input {info}", hint="give torch tensors or numpy arrays"
    )


def _reiterable(program: Program, data: Any) -> Callable[[], Iterable[Any]]:
    """A function that starts the data anew."""
    if isinstance(data, Batches):
        return data.source
    if isinstance(data, (torch.Tensor, np.ndarray)):
        return lambda: [data[i : i + _TENSOR_BATCH] for i in range(0, len(data), _TENSOR_BATCH)]
    if isinstance(data, Mapping):
        raise DataError("the data are one dict, not an iterable of batches", hint="put it into a list: [batch]")
    if isinstance(data, Iterator):
        kept = _keep(program, data)
        return lambda: kept
    if isinstance(data, Iterable):
        return lambda: data
    if callable(data):
        return lambda: _called(data)
    raise DataError(
        f"the data are a {type(data).__name__}",
        hint="give a list of batches, a DataLoader, or a function that returns one",
    )


def _called(make: Callable[[], Any]) -> Iterable[Any]:
    with explained(DataError, "the data function fails", "it is called without arguments"):
        result = make()
    if not isinstance(result, Iterable):
        raise DataError(f"the data function returned a {type(result).__name__}", hint="return an iterable of batches")
    return result


def _keep(program: Program, data: Iterator[Any]) -> list[tuple[torch.Tensor, ...]]:
    kept, size = [], 0.0
    for item in read(lambda: data):
        batch = flat_inputs(program.inputs, item)
        size += sum(t.nbytes for t in batch) / 1e6
        if size > _KEEP_MB:
            raise DataError(
                f"the data are an iterator that can be read only once, and hold more than {_KEEP_MB:.0f} MB",
                hint="pass what can be read again: a list, a DataLoader, or a function that returns the iterator",
            )
        kept.append(batch)
    return kept
