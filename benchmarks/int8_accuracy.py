"""INT8 against float and against `quantize_static`, on real weights and data: accuracy, size, coverage, latency.

    taskset -c 0 python benchmarks/int8_accuracy.py            # ResNet-20 on CIFAR-10, MobileNetV2 on ImageNet pictures

Every model is compiled by the public interface with its defaults. Calibration: 1,000 CIFAR-10 train images; 100 of the
500 ImageNet pictures (every fifth), and the figure to judge by is the one on the other 400. Latency: batch 1, one
thread, runs of all models interleaved, medians; the ratio is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from models import cifar_resnet20
from peers import interleaved, quantize_static_models

import fxpress
from fxpress.backends.coverage import measure_coverage
from fxpress.frontend.data import Loading, open_data
from fxpress.frontend.preprocess import load_preprocess
from fxpress.frontend.sources import load_source
from fxpress.frontend.weights import load_weights
from fxpress.runtime.session import Session, make_session

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def collect(path: Path, preprocess: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """All (evenly spaced) examples of a data source: float32 [N, C, H, W] and labels [N]."""
    data = open_data(str(path), Loading(preprocess=load_preprocess(preprocess), samples=limit))
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in data]
    return np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs])


def top1(run: Callable[[np.ndarray], np.ndarray], x: np.ndarray, y: np.ndarray) -> float:
    """Percent right."""
    right = sum(int((run(x[i : i + 20]).argmax(1) == y[i : i + 20]).sum()) for i in range(0, len(x), 20))
    return 100 * right / len(x)


def eager(module: torch.nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    def run(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(x)).numpy()

    return run


def compare(
    title: str,
    module: torch.nn.Module,
    calibration: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    rounds: int,
    everything: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, object]:
    """One model, all variants. `everything` is judged on besides: all examples, those of the calibration included."""
    batches = [torch.from_numpy(calibration[i : i + 25]) for i in range(0, len(calibration), 25)]
    start = time.perf_counter()
    artifact = fxpress.compile(module, (torch.from_numpy(x[:2]),), calibration=batches)
    seconds = time.perf_counter() - start
    models = {"float": artifact.float_onnx, "fxpress": artifact.onnx}
    entry = artifact.float_onnx.graph.input[0].name
    models |= quantize_static_models(artifact.float_onnx, [{entry: c[None]} for c in calibration[:100]])
    sessions = {name: make_session(model, threads=1) for name, model in models.items()}
    times = interleaved(models, x[:1], rounds)
    rows = {name: row(name, models, sessions, times, x, y) for name in models}
    eager_top1 = top1(eager(module.eval()), x, y)
    report = artifact.report
    print(f"\n{title}: PyTorch eager {eager_top1:.2f} % on {len(y)} images; compiled in {seconds:.1f} s")
    print(f"integer MACs {report['coverage']['integer_macs']:.4f}; parity {report['parity']}")
    print(f"{'':38} top-1 %   size  integer   ms     vs float  vs fxpress")
    for name, r in rows.items():
        print(
            f"{name:38} {r['top1']:7.2f} {r['size']:6.3f} {r['coverage']:7.3f} {r['ms']:8.3f} "
            f"{r['speedup']:7.2f}x {r['against_fxpress']:8.3f}"
        )
    if everything is not None:
        for name in ("float", "fxpress"):
            value = top1(lambda a, s=sessions[name]: s.run(a)[0], *everything)
            print(f"{name} on all {len(everything[1])}, the calibration pictures included: {value:.2f} %")
    return {"model": title, "eager_top1": eager_top1, "seconds": seconds, "images": len(y), "rows": rows}


def row(
    name: str, models: dict[str, onnx.ModelProto], sessions: dict[str, Session], times: dict[str, list[float]],
    x: np.ndarray, y: np.ndarray,
) -> dict[str, float]:  # fmt: skip
    """Figures of one variant; `against_fxpress` above 1 means slower than fxpress."""
    return {
        "top1": top1(lambda a: sessions[name].run(a)[0], x, y),
        "size": models[name].ByteSize() / models["float"].ByteSize(),
        "coverage": measure_coverage(models[name]).integer_macs,
        "ms": statistics.median(times[name]),
        "speedup": statistics.median(f / t for f, t in zip(times["float"], times[name])),
        "against_fxpress": statistics.median(t / o for t, o in zip(times[name], times["fxpress"])),
    }


def resnet20(rounds: int) -> dict[str, object]:
    module = cifar_resnet20()
    load_weights(module, DATA / "cifar_resnet20.th")
    calibration, _ = collect(DATA / "cifar10_train20k.npz", "cifar10", 1000)
    x, y = collect(DATA / "cifar10_test_a.npz", "cifar10")
    return compare("ResNet-20, CIFAR-10 test_a", module, calibration, x, y, rounds)


def mobilenet_v2(rounds: int) -> dict[str, object]:
    module = load_source("torchvision:mobilenet_v2").module
    load_weights(module, DATA / "mobilenet_v2-b0353104.pth")
    x, y = collect(DATA / "imagenet_sample_500.zip", "imagenet")
    chosen = np.arange(len(x)) % 5 == 0
    return compare("MobileNetV2, 400 ImageNet pictures", module, x[chosen], x[~chosen], y[~chosen], rounds, (x, y))


BENCHMARKS = {"resnet20": resnet20, "mobilenet_v2": mobilenet_v2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(BENCHMARKS), choices=list(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"no data: {DATA} is absent")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = [BENCHMARKS[name](options.rounds) for name in options.models]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
