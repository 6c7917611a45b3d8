"""How long lowering takes: fxpress' own table against `torch.onnx.export(dynamo=True)`, from the same exported program.

    python benchmarks/lowering_speed.py --repeats 3 --models resnet50 mobilenet_v2

Both begin with an `ExportedProgram` (fxpress: the Program made from it) and end with serialized bytes. The runs are
interleaved, the medians compared. The two files are compared in ONNX Runtime too: speed means nothing if they differ.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from fxpress.backends.onnx.lower import lower
from fxpress.frontend.capture import program_from_exported
from fxpress.frontend.sources import declare_torchvision_operators
from fxpress.runtime.session import make_session


@dataclass(frozen=True)
class Result:
    """Medians in seconds, and how far the two files are apart (max |a - b| / max |b|)."""

    model: str
    fxpress_s: float
    torch_s: float
    ratio: float
    slowest_fxpress_s: float
    fastest_torch_s: float
    relative_difference: float
    fxpress_mb: float
    torch_mb: float


def measure(name: str, size: int, repeats: int) -> Result:
    """Interleaved runs on one model with random weights."""
    import torchvision

    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None).eval()
    example = torch.randn(2, 3, size, size)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    exported = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
    program = program_from_exported(exported, (example,))
    ours: list[float] = []
    theirs: list[float] = []
    first = second = b""
    for _ in range(repeats):
        first = timed(lambda: lower(program).SerializeToString(), ours)
        second = timed(lambda: export_with_torch(exported), theirs)
    return Result(
        model=name,
        fxpress_s=statistics.median(ours),
        torch_s=statistics.median(theirs),
        ratio=statistics.median(theirs) / statistics.median(ours),
        slowest_fxpress_s=max(ours),
        fastest_torch_s=min(theirs),
        relative_difference=difference(first, second, example.numpy()),
        fxpress_mb=len(first) / 1e6,
        torch_mb=len(second) / 1e6,
    )


def timed(work: Callable[[], bytes], seconds: list[float]) -> bytes:
    """Run `work`, add its wall time."""
    start = time.perf_counter()
    result = work()
    seconds.append(time.perf_counter() - start)
    return result


def export_with_torch(exported: torch.export.ExportedProgram) -> bytes:
    """torch's exporter, which decomposes a copy of the same exported program; its chatter is dropped."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.onnx.export(exported, dynamo=True, verbose=False)
    assert model is not None
    return model.model_proto.SerializeToString()


def difference(first: bytes, second: bytes, x: np.ndarray) -> float:
    """max |a - b| / max |b| of the first output."""
    (a, *_), (b, *_) = (make_session(m).run(x) for m in (first, second))
    return float(np.abs(a - b).max() / np.abs(b).max())


def table(results: list[Result]) -> str:
    """The results for people."""
    lines = [f"{'model':24} {'fxpress s':>10} {'torch s':>9} {'ratio':>7} {'difference':>11}"]
    for r in results:
        lines.append(
            f"{r.model:24} {r.fxpress_s:10.3f} {r.torch_s:9.2f} {r.ratio:6.1f}x {r.relative_difference:11.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--size", type=int, default=224, help="height and width of the input")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    declare_torchvision_operators()
    for name in ("torch.onnx", "torch.export", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    results = [measure(name, options.size, options.repeats) for name in options.models]
    print(table(results), file=sys.stderr)
    print(json.dumps({"torch": torch.__version__, "repeats": options.repeats, "results": [asdict(r) for r in results]}))


if __name__ == "__main__":
    main()
