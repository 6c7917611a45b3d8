"""Mini-batches in random order from any stream of batches, in bounded memory; and label-free augmentation of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch.nn import functional as F

from ....frontend.batch_dim import batched
from ....frontend.program import Program

Batch = tuple[torch.Tensor, ...]
Augment = Callable[[Batch, torch.Generator], Batch]

_BUFFER_BYTES = 2**28
_SHIFT = 8  # images are moved by up to one part in so many of their size


def shuffled(
    program: Program, batches: Iterable[Batch], size: int, generator: torch.Generator, limit: int = _BUFFER_BYTES
) -> Iterator[Batch]:
    """Batches of `size` examples, drawn from a buffer of at most about `limit` bytes. Each example comes once.

    A program whose batch is fixed gets its batches as they are.
    """
    if not all(batched(program.inputs)):
        yield from batches
        return
    held: list[Batch] = []
    total = 0
    for batch in batches:
        held.append(batch)
        total += sum(t.nbytes for t in batch)
        if total >= limit:
            yield from _drawn(held, size, generator)
            held, total = [], 0
    yield from _drawn(held, size, generator)


def _drawn(held: list[Batch], size: int, generator: torch.Generator) -> Iterator[Batch]:
    if not held:
        return
    whole = tuple(torch.cat(parts) for parts in zip(*held))
    order = torch.randperm(len(whole[0]), generator=generator)
    for index in order.split(size):
        yield tuple(t[index] for t in whole)


def flip_and_shift(batch: Batch, generator: torch.Generator) -> Batch:
    """Every image [n, channels, height, width] is mirrored with probability one half and moved by up to an eighth of
    its size, its border repeated. The inputs that are not images stay as they are."""
    return tuple(_moved(x, generator) if x.ndim == 4 and x.is_floating_point() else x for x in batch)


def _moved(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    count, _, height, width = x.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    up, left = height // _SHIFT, width // _SHIFT
    padded = F.pad(x, (left, left, up, up), mode="replicate")
    rows = torch.randint(2 * up + 1, (count, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(2 * left + 1, (count, 1), generator=generator) + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def cut_and_mix(batch: Batch, generator: torch.Generator) -> Batch:
    """As `flip_and_shift`; then every second image, on average, gets a rectangle of another one (Yun et al. 2019,
    "CutMix"). There are no labels to mix: the reference says what it sees in such an image (Beyer et al. 2022)."""
    return tuple(_pasted(x, generator) if x.ndim == 4 else x for x in flip_and_shift(batch, generator))


def _pasted(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A rectangle as wide and high as the image in proportion, of any share of its area, around any place in it."""
    count, _, height, width = x.shape
    side = torch.rand(count, 1, generator=generator).sqrt()
    inside = []
    for length in (height, width):
        middle = torch.randint(length, (count, 1), generator=generator)
        inside.append((torch.arange(length) - middle).abs() <= side * length / 2)
    pasted = inside[0][:, :, None] & inside[1][:, None, :] & (torch.rand(count, 1, 1, generator=generator) < 0.5)
    return torch.where(pasted[:, None].to(x.device), x[torch.randperm(count, generator=generator)], x)


AUGMENTATIONS: dict[str, Augment] = {
    "none": lambda batch, generator: batch,
    "flip-shift": flip_and_shift,
    "flip-shift-cutmix": cut_and_mix,
}
