"""`Preprocess`: how a picture becomes a model input, once, for calibration, evaluation and the shipped bundle.

Needs numpy and pillow only, so that the bundle runs where torch is not installed. The steps, in this order, each left
out where its field says so:

    RGB (or grey) -> resize -> centre crop -> x * scale -> (x - mean) / std -> layout -> dtype
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import DataError, OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Preprocess:
    """A picture (PIL image, or uint8 array HxWxC or HxW) to one example without its batch dimension.

    `resize`: the shorter side in pixels, or (height, width) exactly; None leaves the size. `crop`: centre crop to
    (height, width). `scale` is multiplied. `mean` and `std` have one value per channel, and () leaves them out.
    """

    name: str = "none"
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: Interpolation = "bilinear"
    channels: Literal[1, 3] = 3
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: Literal["CHW", "HWC"] = "CHW"
    dtype: Literal["float32", "uint8"] = "float32"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values and len(values) != self.channels:
                raise OptionError(
                    f"preprocess {name} has {len(values)} values for {self.channels} channels",
                    hint=f"give {self.channels} values, or none",
                )
        if self.dtype == "uint8" and (self.scale != 1.0 or self.mean or self.std):
            raise OptionError(
                "preprocess with dtype uint8 cannot scale or normalize", hint='use dtype = "float32", or drop them'
            )

    def __call__(self, picture: Image | np.ndarray) -> np.ndarray:
        """One example, [C, H, W] or [H, W, C] by `layout`. Raises DataError for what is no picture."""
        image = self._resized(_as_image(picture).convert(_MODES[self.channels]))
        pixels = np.asarray(self._cropped(image))
        return self._normalized(pixels[:, :, None] if pixels.ndim == 2 else pixels)

    def _resized(self, image: Image) -> Image:
        if self.resize is None:
            return image
        width, height = image.size
        if isinstance(self.resize, int):
            short = min(width, height)
            size = (int(self.resize * width / short), int(self.resize * height / short))
        else:
            size = (self.resize[1], self.resize[0])
        return image if size == image.size else image.resize(size, _filter(self.interpolation))

    def _cropped(self, image: Image) -> Image:
        if self.crop is None:
            return image
        (width, height), (crop_height, crop_width) = image.size, self.crop
        if width < crop_width or height < crop_height:
            raise DataError(
                f"a picture of {height}x{width} is smaller than the crop of {crop_height}x{crop_width}",
                hint="set resize in the preprocess, or make the crop smaller",
            )
        left, top = round((width - crop_width) / 2.0), round((height - crop_height) / 2.0)
        return image.crop((left, top, left + crop_width, top + crop_height))

    def _normalized(self, pixels: np.ndarray) -> np.ndarray:
        values = pixels if self.dtype == "uint8" else pixels.astype(np.float32) * np.float32(self.scale)
        if self.mean:
            values = values - np.asarray(self.mean, np.float32)
        if self.std:
            values = values / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(values if self.layout == "HWC" else values.transpose(2, 0, 1))

    def example_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) or (H, W, C) of every example, or None where it depends on the picture."""
        size = self.crop or (self.resize if isinstance(self.resize, tuple) else None)
        if size is None:
            return None
        return (self.channels, *size) if self.layout == "CHW" else (*size, self.channels)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back to an equal Preprocess."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any], where: str | None = None) -> Preprocess:
        """Read what `to_json` or a TOML file says. Raises OptionError for an unknown key or a bad value."""
        hints = typing.get_type_hints(Preprocess)
        for key, value in values.items():
            if key not in hints:
                raise OptionError(
                    f"preprocess has no field {key!r}", where=where, hint=f"its fields: {', '.join(hints)}"
                )
            if not _fits(value, hints[key]):
                raise OptionError(
                    f"preprocess field {key} is {value!r}", where=where, hint=f"it must be {_type_text(hints[key])}"
                )
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return Preprocess(**fields)

    def __str__(self) -> str:
        default = Preprocess()
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if f.name != "name" and getattr(self, f.name) != getattr(default, f.name)
        ]
        return f"{self.name}({', '.join(changed)})"


def _fits(value: Any, hint: Any) -> bool:
    """Is a JSON or TOML value of a field's type?"""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        items = isinstance(value, (list, tuple)) and all(_fits(v, arguments[0]) for v in value)
        return bool(items and (arguments[-1] is Ellipsis or len(value) == len(arguments)))
    if arguments:
        return any(_fits(value, a) for a in arguments)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _type_text(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)).replace("typing.", "").replace("NoneType", "none")


def _as_image(picture: Any) -> Image:
    """A PIL image from a PIL image or a uint8 array."""
    from PIL import Image as pil

    if isinstance(picture, pil.Image):
        return picture
    if not isinstance(picture, np.ndarray):
        raise DataError(f"a {type(picture).__name__} is no picture", hint="give a PIL image or a uint8 array HxWxC")
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (1,), (3,), (4,)):
        raise DataError(
            f"an array {picture.dtype}{list(picture.shape)} is no picture",
            hint="pictures are uint8 of shape HxW or HxWxC with C = 1, 3 or 4",
        )
    return pil.fromarray(picture[:, :, 0] if picture.shape[2:] == (1,) else picture)


def _filter(name: str) -> Any:
    from PIL.Image import Resampling

    return Resampling[name.upper()]


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

PRESETS = {
    "none": Preprocess(),
    "imagenet": Preprocess(
        "imagenet", resize=256, crop=(224, 224), scale=1 / 255, mean=_IMAGENET_MEAN, std=_IMAGENET_STD
    ),
    # The statistics with which the widespread CIFAR ResNets were trained are ImageNet's.
    "cifar10": Preprocess("cifar10", crop=(32, 32), scale=1 / 255, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
}


def load_preprocess(text: str) -> Preprocess:
    """A preset by name, or a TOML file whose keys are the fields of `Preprocess`. Raises OptionError."""
    if text in PRESETS:
        return PRESETS[text]
    path = Path(text)
    if path.suffix != ".toml":
        raise OptionError(f"unknown preprocess {text!r}", hint=f"choose {', '.join(PRESETS)}, or give a FILE.toml")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"cannot read {text}: {error.strerror}", hint="check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{text} is not valid TOML: {error}", hint="write lines like: mean = [0.5, 0.5, 0.5]"
        ) from error
    return Preprocess.from_json({"name": path.stem, **values}, where=text)


def imagenet_like(height: int, width: int) -> Preprocess:
    """The `imagenet` preset for another input size: shorter side 256/224 of the crop's."""
    base = PRESETS["imagenet"]
    if (height, width) == base.crop:
        return base
    return dataclasses.replace(
        base, name=f"imagenet-{height}x{width}", resize=round(min(height, width) * 256 / 224), crop=(height, width)
    )
