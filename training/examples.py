"""The examples of a training, in an order that depends on the seed and the epoch alone.

A step's batch is the same set of examples however many processes there are: each process takes its own part of it. So
two processes train as one does, up to rounding (and BatchNorm, which sees only its process's part).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ..errors import DataError, OptionError
from ..frontend.batch_dim import batched, count_examples, some_examples
from ..frontend.batches import Batches, as_batches, read
from ..frontend.data import Data
from ..frontend.program import Program
from .seeding import generator_for, seed_all, seed_for

Inputs = tuple[torch.Tensor, ...]
Augment = Callable[[Inputs, torch.Generator], Inputs]
_HELD_BYTES = 2**31  # streams up to this size are read once and kept


@dataclass(frozen=True)
class Part:
    """Which process this is, of how many."""

    rank: int = 0
    count: int = 1

    def of(self, size: int) -> slice:
        """This process's part of `size` examples; parts differ by at most one example."""
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)

    def share(self, size: int) -> tuple[slice, float]:
        """This process's part of a batch and its weight. Where there is nothing left for it, it works on the first
        example for nothing: all processes take the same steps."""
        own = self.of(size)
        count = own.stop - own.start
        return (own, count * self.count / size) if count else (slice(0, 1), 0.0)

    def smallest(self, size: int) -> int:
        """How many examples of a batch the process with the fewest works on."""
        return max(1, size // self.count)


@dataclass(frozen=True)
class Slot:
    """One step's examples for this process. `weight` makes the mean over processes of `weight * loss` the mean over the
    whole batch, whose size is `total`; it is 0 where the process has nothing left to do."""

    inputs: Inputs
    labels: torch.Tensor
    weight: float
    total: int


class Examples(Protocol):
    """The examples of a training."""

    @property
    def steps(self) -> int:
        """Batches in an epoch."""

    def epoch(self, number: int, skip: int, part: Part) -> Iterator[Slot]:
        """This process's part of the batches of epoch `number`, without the first `skip`."""


@dataclass
class Held:
    """Examples in memory: inputs and labels, each [N, ...], drawn anew each epoch.

    Every example comes once in an epoch, in batches that differ by at most one example: no short batch at the end.
    """

    inputs: Inputs
    labels: torch.Tensor
    batch_size: int
    seed: int

    @property
    def steps(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, number: int, skip: int, part: Part) -> Iterator[Slot]:
        for rows in drawn(len(self.labels), self.steps, self.seed, number)[skip:]:
            own, weight = part.share(len(rows))
            mine = rows[own]
            yield Slot(tuple(t[mine] for t in self.inputs), self.labels[mine], weight, len(rows))

    def split(self, share: float) -> tuple[Held, Held]:
        """What to train on and what to judge on: `share` of the examples, drawn by the seed."""
        count = round(share * len(self.labels))
        if not 0 < count < len(self.labels):
            raise OptionError(f"hold_out={share} takes {count} of {len(self.labels)} examples", hint="give more data")
        order = torch.randperm(len(self.labels), generator=generator_for(self.seed, "hold-out"))
        return self.rows(order[count:]), self.rows(order[:count])

    def rows(self, rows: torch.Tensor) -> Held:
        """Some of the examples."""
        return Held(tuple(t[rows] for t in self.inputs), self.labels[rows], self.batch_size, self.seed)

    def batches(self) -> Iterator[tuple[Inputs, torch.Tensor]]:
        """All examples in their order."""
        for rows in torch.arange(len(self.labels)).split(self.batch_size):
            yield tuple(t[rows] for t in self.inputs), self.labels[rows]


@dataclass
class Indexed:
    """A map-style dataset, examples read one by one, each epoch in an order of its own; only what a process needs is
    read by it. Randomness inside the dataset is the user's to seed."""

    program: Program
    dataset: Any
    batch_size: int
    seed: int
    workers: int = 0
    labelled: bool = True

    @property
    def steps(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def epoch(self, number: int, skip: int, part: Part) -> Iterator[Slot]:
        whole = drawn(len(self.dataset), self.steps, self.seed, number)[skip:]
        shares = [part.share(len(rows)) for rows in whole]
        mine = [rows[own].tolist() for rows, (own, _) in zip(whole, shares)]
        loader = DataLoader(self.dataset, batch_sampler=mine, num_workers=self.workers)
        checked = Batches(self.program, lambda: loader).labelled(self.labelled)
        for (inputs, labels), rows, (_, weight) in zip(checked, whole, shares, strict=True):
            yield Slot(inputs, labels, weight, len(rows))


@dataclass
class Streamed:
    """Batches as the data give them, in their order; every process reads all and takes its part of each.

    The source is started anew for each epoch, and the global generators are seeded by its place before each batch,
    those of a DataLoader by the epoch, so that one that shuffles gives each process, and a resumed run, the same
    examples.
    """

    data: Batches
    seed: int
    labelled: bool = True
    loader: DataLoader[Any] | None = None

    @cached_property
    def steps(self) -> int:
        source = self.data.source()
        with suppress(TypeError):  # a DataLoader over an IterableDataset has a length that cannot be asked for
            return len(source)  # type: ignore[arg-type]
        return sum(1 for _ in read(lambda: source))

    def epoch(self, number: int, skip: int, part: Part) -> Iterator[Slot]:
        with self._own_generators(number):
            yield from self._shared(number, skip, part)

    def _shared(self, number: int, skip: int, part: Part) -> Iterator[Slot]:
        infos = self.data.program.inputs
        for index, (inputs, labels) in enumerate(self._counted(number)):
            if index < skip:
                continue
            size = count_examples(infos, inputs)
            rows, weight = part.share(size)
            yield Slot(some_examples(infos, inputs, rows), labels[rows], weight, size)

    def _counted(self, epoch: int) -> Iterator[tuple[Inputs, torch.Tensor]]:
        """The batches of an epoch. Raises DataError unless they are as many as were counted, which the schedule goes
        by."""
        count = 0
        for count, batch in enumerate(self._seeded(epoch), 1):
            if count > self.steps:
                break
            yield batch
        if count != self.steps:
            given = f"{count} batches" if count < self.steps else f"more than {self.steps} batches"
            raise DataError(
                f"the data give {given} in epoch {epoch + 1}, and were counted as {self.steps}",
                hint="give data with the same number of batches each time, and with that length where they tell one",
            )

    @contextmanager
    def _own_generators(self, epoch: int) -> Iterator[None]:
        """Seed the generators that a DataLoader was given, by the epoch, and give them back as they were."""
        loader = self.loader
        owners = () if loader is None else (loader, loader.sampler, loader.batch_sampler)
        found = {id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)}
        states = [(g, g.get_state()) for g in found.values()]
        for generator, _ in states:
            generator.manual_seed(seed_for(self.seed, "loader", epoch))
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)

    def _seeded(self, epoch: int) -> Iterator[tuple[Inputs, torch.Tensor]]:
        batches = self.data.labelled(self.labelled)
        for index in itertools.count():
            seed_all(self.seed, "data", epoch, index)
            batch = next(batches, None)
            if batch is None:
                return
            yield batch


def drawn(count: int, steps: int, seed: int, epoch: int) -> list[torch.Tensor]:
    """The rows of each batch of an epoch: 0..count-1 in random order, in `steps` nearly equal pieces."""
    order = torch.randperm(count, generator=generator_for(seed, "order", epoch))
    return list(order.tensor_split(steps))


def as_examples(
    program: Program, data: Any, batch_size: int, seed: int, workers: int = 0, labelled: bool = True
) -> Held | Indexed | Streamed:
    """Data in the form in which they are trained on. Raises DataError where they do not fit, or are not `labelled` and
    have to be.

    A tuple (inputs..., labels) of tensors or arrays, a list of labelled batches, and pictures or arrays opened by name
    are held in memory (up to 2 GB) and drawn at random. A map-style `Dataset` of single examples is read by
    index, at random. A `DataLoader`, a function and any other iterable stream: their batches are the steps, in their
    order, and they are started anew for each epoch.
    """
    if isinstance(data, DataLoader):
        _require_whole(data)
    if isinstance(data, Dataset) and hasattr(data, "__len__") and not isinstance(data, IterableDataset):
        if len(cast(Sized, data)) == 0:
            raise DataError("the dataset is empty", hint="give at least one example")
        return Indexed(program, data, batch_size, seed, workers, labelled)
    if workers:
        raise OptionError("workers have no effect on these data", hint="give a torch Dataset of single examples")
    whole = _one_set(program, data, labelled)
    batches = as_batches(program, whole or data)
    finite = isinstance(batches.source(), (list, tuple)) or (isinstance(data, Data) and data.count is not None)
    held = hold(batches, batch_size, seed, labelled) if finite and all(batched(program.inputs)) else None
    return held or Streamed(batches, seed, labelled, data if isinstance(data, DataLoader) else None)


def hold(batches: Batches, batch_size: int, seed: int, labelled: bool = True) -> Held | None:
    """All examples in memory, or None where they take more than 2 GB."""
    parts, total = [], 0
    for inputs, labels in batches.labelled(labelled):
        parts.append((*inputs, labels))
        total += sum(t.nbytes for t in parts[-1])
        if total > _HELD_BYTES or not all(t.ndim for t in parts[-1]):
            return None
    *tensors, labels = (torch.cat(pieces) for pieces in zip(*parts))
    return Held(tuple(tensors), labels, batch_size, seed)


def _require_whole(loader: DataLoader[Any]) -> None:
    """Raise OptionError for a DataLoader that gives each process a share of its own, of which each would then get a
    share again."""
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    if any(isinstance(s, DistributedSampler) for s in samplers):
        raise OptionError(
            "the DataLoader has a DistributedSampler, and each process would train on a part of its part",
            hint="leave the sampler out: fxpress shares each batch among the processes itself",
        )


def _one_set(program: Program, data: Any, labelled: bool) -> list[tuple[Any, ...]] | None:
    """`data` as one batch, if they are a tuple (inputs..., labels) of all examples.

    Two tensors of one form are two batches where no labels are wanted (`images.split(100)` is a tuple).
    """
    if not isinstance(data, tuple) or len(data) != len(program.inputs) + 1:
        return None
    if isinstance(data[-1], list) and data[-1] and all(isinstance(v, (int, float)) for v in data[-1]):
        data = (*data[:-1], torch.as_tensor(data[-1]))
    if not labelled and len({(tuple(np.shape(t)), str(getattr(t, "dtype", ""))) for t in data}) == 1:
        return None
    arrays = all(isinstance(t, (torch.Tensor, np.ndarray)) and t.ndim for t in data)
    if arrays and labelled and len({len(t) for t in data}) > 1 and np.ndim(data[-1]) == 1:
        counts = ", ".join(str(len(t)) for t in data[:-1])
        raise DataError(f"the data hold {counts} examples and {len(data[-1])} labels", hint="give one label for each")
    return [data] if arrays and len({len(t) for t in data}) == 1 else None
