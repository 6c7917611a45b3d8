"""A compiled model in use: `fxpress.load(dir)(x)` needs numpy and onnxruntime only (and pillow for pictures)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtifactError
from ..frontend.preprocess import Preprocess
from ..frontend.tensor_info import TensorInfo
from .manifest import MODEL, Manifest
from .session import Session, make_session


def load(folder: str | Path, threads: int = 1) -> Bundle:
    """Open what `compile` wrote. Raises ArtifactError: no artifact, or a file that does not have its checksum."""
    if not isinstance(folder, (str, Path)):
        raise ArtifactError(f"a {type(folder).__name__} is no folder", hint="give the path of what `compile` wrote")
    folder = Path(folder)
    manifest = Manifest.read(folder)
    return Bundle(manifest, make_session(manifest.verify(folder, MODEL), threads=threads))


class Bundle:
    """A compiled model. Call it with arrays, batch first, in the order of `inputs` or by their names.

    Nothing is cast, scaled or reshaped in silence: what does not fit is an ArtifactError. Pictures become an input by
    `preprocess`, the same that calibration and evaluation used.
    """

    def __init__(self, manifest: Manifest, session: Session) -> None:
        self.manifest = manifest
        self.session = session

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Name, dtype and dims of each input."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Name, dtype and dims of each output."""
        return self.manifest.outputs

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, () where they are not known."""
        return self.manifest.labels

    def __call__(self, *args: np.ndarray, **kwargs: np.ndarray) -> Any:
        """The output array, or a tuple of arrays where the model has several outputs."""
        arrays = self._ordered(args, kwargs)
        sizes: dict[str, int] = {}
        for info, array in zip(self.inputs, arrays):
            check_array(info, array, sizes)
        results = self.session.run(*arrays)
        return results[0] if len(results) == 1 else results

    def preprocess(self, *pictures: Any) -> np.ndarray:
        """A batch from pictures (PIL images or uint8 arrays HxWxC): float32 [N, C, H, W] as a rule."""
        if self.manifest.preprocess is None:
            raise ArtifactError(
                "this model was not compiled with a preprocess", hint="prepare the inputs yourself, as in training"
            )
        if not pictures:
            raise ArtifactError("no picture was given", hint="call preprocess(picture, ...)")
        return np.stack([self.manifest.preprocess(p) for p in pictures])

    def _ordered(self, args: tuple[np.ndarray, ...], kwargs: dict[str, np.ndarray]) -> list[np.ndarray]:
        names = [i.name for i in self.inputs]
        given = dict(zip(names, args))
        twice = [k for k in kwargs if k in given]
        unknown = [k for k in kwargs if k not in names]
        missing = [n for n in names if n not in given and n not in kwargs]
        if len(args) > len(names) or twice or unknown or missing:
            received = f"{len(args)} by position" + (f", {', '.join(kwargs)} by name" if kwargs else "")
            raise ArtifactError(
                f"the model takes {', '.join(map(str, self.inputs))}; received {received}",
                hint="pass every input once, by position or by name",
            )
        return [{**given, **kwargs}[n] for n in names]

    def __repr__(self) -> str:
        ins, outs = ", ".join(map(str, self.inputs)), ", ".join(map(str, self.outputs))
        how: Preprocess | str = self.manifest.preprocess or "none"
        return f"Bundle({self.manifest.model})\n  inputs   {ins}\n  outputs  {outs}\n  preprocess  {how}"


def check_array(info: TensorInfo, array: Any, sizes: dict[str, int]) -> None:
    """Raise ArtifactError unless `array` has the dtype and dims of an input."""
    if not isinstance(array, np.ndarray):
        raise ArtifactError(f"input {info} received a {type(array).__name__}", hint="pass numpy arrays")
    if str(array.dtype) != info.dtype:
        raise ArtifactError(f"input {info} received dtype {array.dtype}", hint=f"convert it: x.astype({info.dtype!r})")
    if not info.fits_shape(array.shape, sizes):
        missing_batch = array.ndim == len(info.dims) - 1
        raise ArtifactError(
            f"input {info} received shape {list(array.shape)}",
            hint="add the batch dimension: x[None]"
            if missing_batch
            else "give the size that the model was compiled for",
        )
