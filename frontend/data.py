"""From what a user types as DATA to batches: pictures in a folder or zip, arrays, or a user's own callable.

Everything streams: one batch at a time is in memory, however many examples there are (an `.npz` is read as a whole,
as the format demands). Every `Data` can be iterated again; it gives `inputs`, or `(inputs, labels)` if it has labels.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from ..errors import DataError, OptionError, first_line
from .preprocess import Preprocess
from .sources import load_callable

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
_FORMS = "a folder or .zip of pictures, FILE.npz with images|x (and labels|y), FILE.npy, or FILE.py:CALLABLE"
# `CLASSINDEX_WNID.jpg`, as the ImageNet sample collections name their pictures.
_INDEXED = re.compile(r"^(\d+)_n\d{8}(?:_.*)?$")


@dataclass(frozen=True)
class Data:
    """Examples that can be iterated again and again.

    `count` is the number of examples, None where only iterating tells. `labelled` says whether items are
    `(inputs, labels)`, None where only iterating tells. `classes` are the names of the labels. `preprocess` is what was
    applied to pictures, None for ready inputs.
    """

    name: str
    make: Callable[[], Iterable[Any]] = field(repr=False)
    count: int | None = None
    labelled: bool | None = None
    classes: tuple[str, ...] = ()
    preprocess: Preprocess | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.make())


@dataclass(frozen=True)
class Loading:
    """How to read data: pictures pass through `preprocess` (asked for: refused where it has no effect), else through
    `fallback` (what the model brings); `samples` takes that many examples, evenly spaced."""

    preprocess: Preprocess | None = None
    fallback: Preprocess | None = None
    batch_size: int = 32
    samples: int | None = None

    def for_pictures(self, path: Path) -> Preprocess:
        """The preprocess of pictures. Raises OptionError where there is none."""
        chosen = self.preprocess or self.fallback
        if chosen is None:
            raise OptionError(
                f"{path} holds pictures, and nothing says how they become model inputs",
                hint="add --preprocess imagenet, cifar10, none or FILE.toml (resize, crop, scale, mean, std, ...)",
            )
        return chosen

    def refuse_preprocess(self, text: str) -> None:
        """Raise OptionError if a preprocess was asked for, since ready inputs take none."""
        if self.preprocess is not None:
            raise OptionError(
                f"{text} holds ready inputs, so --preprocess {self.preprocess.name} would have no effect",
                hint="leave it out, or give uint8 pictures (N, H, W, C)",
            )


def open_data(text: str, loading: Loading | None = None) -> Data:
    """Resolve DATA. Raises DataError (missing, empty, unreadable) or OptionError (see `Loading`)."""
    loading = loading or Loading()
    path = Path(text)
    owner, colon, name = text.rpartition(":")
    if colon and (owner.endswith(".py") or not path.exists()):
        loading.refuse_preprocess(text)
        return _from_callable(text, load_callable(owner, name), loading)
    if not path.exists():
        raise DataError(f"no such data: {text}", hint=f"data are {_FORMS}")
    if path.is_dir():
        return _from_folder(path, loading)
    if path.suffix in _READERS:
        return _READERS[path.suffix](path, loading)
    raise DataError(f"cannot tell what kind of data {text} is", hint=f"data are {_FORMS}")


# -- pictures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Picture:
    """One picture: its path within the folder or zip, and how to read its bytes."""

    path: PurePosixPath
    read: Callable[[], bytes]


def _from_folder(path: Path, loading: Loading) -> Data:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    pictures = [_Picture(PurePosixPath(p.relative_to(path).as_posix()), p.read_bytes) for p in files]
    return _from_pictures(path, pictures, loading)


def _from_zip(path: Path, loading: Loading) -> Data:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(
            f"cannot read {path}: {first_line(error)}", hint="check that it is a complete zip file"
        ) from error
    names = sorted(n for n in archive.namelist() if PurePosixPath(n).suffix.lower() in PICTURES)
    names = [n for n in names if "__MACOSX" not in n]
    pictures = [_Picture(PurePosixPath(n), lambda n=n: archive.read(n)) for n in names]  # type: ignore[misc]
    return _from_pictures(path, pictures, loading)


def _from_pictures(path: Path, pictures: list[_Picture], loading: Loading) -> Data:
    if not pictures:
        raise DataError(f"{path} holds no pictures", hint=f"pictures end in {', '.join(PICTURES)}")
    prepared = loading.for_pictures(path)
    labels, classes = _picture_labels([p.path for p in pictures])
    chosen = spaced(len(pictures), loading.samples)

    def batches() -> Iterator[Any]:
        for start in range(0, len(chosen), loading.batch_size):
            part = chosen[start : start + loading.batch_size]
            inputs = torch.from_numpy(_stack([_read(pictures[i], prepared, path) for i in part]))
            yield inputs if labels is None else (inputs, torch.tensor([labels[i] for i in part]))

    return Data(str(path), batches, len(chosen), labels is not None, classes, prepared)


def _picture_labels(paths: list[PurePosixPath]) -> tuple[list[int] | None, tuple[str, ...]]:
    """Labels from names like `281_n02123045.jpg`, else from class subfolders (numbers mean themselves), else none."""
    indexed = [_INDEXED.match(p.stem) for p in paths]
    if all(indexed):
        return [int(m[1]) for m in indexed if m], ()
    depth = _shared_depth(paths)
    folders = [p.parts[depth] if len(p.parts) > depth + 1 else None for p in paths]
    if None in folders or len(set(folders)) < 2:
        return None, ()
    names = sorted({str(f) for f in folders})
    if all(n.isdecimal() for n in names):
        return [int(str(f)) for f in folders], ()
    return [names.index(str(f)) for f in folders], tuple(names)


def _shared_depth(paths: list[PurePosixPath]) -> int:
    """How many leading folders all paths share (a zip often wraps everything in one)."""
    depth = 0
    while (
        len({p.parts[depth] if len(p.parts) > depth + 1 else None for p in paths}) == 1
        and len(paths[0].parts) > depth + 1
    ):
        depth += 1
    return depth


def _read(picture: _Picture, preprocess: Preprocess, path: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(picture.read()))
        image.load()
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError(
            f"cannot read the picture {picture.path} in {path}: {first_line(error)}", hint="remove or replace it"
        ) from error
    return preprocess(image)


def _stack(examples: list[np.ndarray]) -> np.ndarray:
    shapes = {e.shape for e in examples}
    if len(shapes) > 1:
        raise DataError(
            f"pictures of different sizes cannot form a batch: {', '.join(map(str, sorted(shapes)[:4]))}",
            hint="use a preprocess with resize and crop",
        )
    return np.stack(examples)


# -- arrays -------------------------------------------------------------------------------------------------------


def _from_npz(path: Path, loading: Loading) -> Data:
    with _opened(path) as archive:
        inputs = _member(archive, ("images", "x"), path)
        labels = _member(archive, ("labels", "y"), path, required=False)
        classes = tuple(map(str, archive["classes"])) if "classes" in archive.files else ()
    assert inputs is not None
    if labels is not None and len(labels) != len(inputs):
        raise DataError(f"{path} has {len(inputs)} examples but {len(labels)} labels", hint="write them anew, in step")
    return _from_arrays(path, inputs, labels, classes, loading)


def _from_npy(path: Path, loading: Loading) -> Data:
    return _from_arrays(path, _opened(path, mmap_mode="r"), None, (), loading)


def _opened(path: Path, **options: Any) -> Any:
    """np.load without pickle: object arrays are refused."""
    try:
        return np.load(path, allow_pickle=False, **options)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        pickled = "pickle" in str(error)
        why = "it holds Python objects, or is no such file" if pickled else first_line(error)
        raise DataError(f"cannot read {path}: {why}", hint="write it with numpy.save or numpy.savez") from error


def _member(archive: Any, names: tuple[str, ...], path: Path, required: bool = True) -> np.ndarray | None:
    for name in names:
        if name in archive.files:
            try:
                return archive[name]
            except ValueError as error:
                raise DataError(f"{name!r} in {path} holds Python objects", hint="save plain number arrays") from error
    if required:
        raise DataError(
            f"{path} has no array called {' or '.join(names)} (found: {', '.join(archive.files)})",
            hint="name the inputs images or x, the labels labels or y",
        )
    return None


def _from_arrays(
    path: Path, inputs: np.ndarray, labels: np.ndarray | None, classes: tuple[str, ...], loading: Loading
) -> Data:
    if inputs.ndim < 1 or len(inputs) == 0:
        raise DataError(f"{path} holds no examples", hint="the first dimension counts the examples")
    pictures = inputs.dtype == np.uint8 and (inputs.ndim == 3 or (inputs.ndim == 4 and inputs.shape[3] in (1, 3, 4)))
    prepare = loading.for_pictures(path) if pictures else None
    if not pictures:
        loading.refuse_preprocess(str(path))
    chosen = spaced(len(inputs), loading.samples)

    def batches() -> Iterator[Any]:
        for start in range(0, len(chosen), loading.batch_size):
            part = chosen[start : start + loading.batch_size]
            rows = inputs[part]
            batch = torch.from_numpy(_stack([prepare(r) for r in rows]) if prepare else np.ascontiguousarray(rows))
            yield batch if labels is None else (batch, torch.as_tensor(np.asarray(labels[part]).astype(np.int64)))

    return Data(str(path), batches, len(chosen), labels is not None, classes, prepare)


# -- a user's callable --------------------------------------------------------------------------------------------


def _from_callable(text: str, make: Callable[[], Any], loading: Loading) -> Data:
    """The callable is called again for every pass over the data, so a generator function is fine."""
    if loading.samples is not None:
        raise OptionError(f"--samples has no effect on {text}", hint="let your callable choose how many it gives")

    def batches() -> Iterable[Any]:
        try:
            result = make()
        except Exception as error:
            raise DataError(
                f"{text} fails: {type(error).__name__}: {first_line(error)}", hint="call it yourself"
            ) from error
        if not isinstance(result, Iterable):
            raise DataError(f"{text} returns a {type(result).__name__}", hint="return an iterable of batches")
        return result

    return Data(text, batches)


# -- what they share ----------------------------------------------------------------------------------------------


def spaced(count: int, wanted: int | None) -> np.ndarray:
    """`wanted` of `count` indices, evenly spaced (sorted data keep all their classes); all when None or too few."""
    if wanted is None or wanted >= count:
        return np.arange(count)
    if wanted < 1:
        raise OptionError(f"{wanted} samples were asked for", hint="ask for one at least")
    return np.linspace(0, count - 1, wanted).round().astype(np.int64)


_READERS: dict[str, Callable[[Path, Loading], Data]] = {
    ".zip": _from_zip,
    ".npz": _from_npz,
    ".npy": _from_npy,
}
