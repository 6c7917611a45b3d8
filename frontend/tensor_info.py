"""The description of one named input or output. Free of torch, since the shipped bundle reads it too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorInfo:
    """One named input or output: dtype as torch names it ("float32"), dims as int or symbolic name ("batch")."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]

    def fits_shape(self, shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
        """Does `shape` fit? `sizes` holds what each symbolic dim has been so far, and is added to."""
        return len(shape) == len(self.dims) and all(_dim_fits(d, s, sizes) for d, s in zip(self.dims, shape))

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.dims))}]"


def _dim_fits(dim: int | str, size: int, sizes: dict[str, int]) -> bool:
    if isinstance(dim, int):
        return dim == size
    if not dim.isidentifier():  # a size computed from others, such as 2*batch
        return True
    return size >= 1 and sizes.setdefault(dim, size) == size
