"""What a compilation costs, against `onnxruntime.quantization.quantize_static`: processor time, wall time, peak memory.

    python benchmarks/compile_cost.py --core 0 --rounds 3
    python benchmarks/compile_cost.py --core 0 --samples 100 1000 --only fxpress      # memory must not grow

Every run is a process of its own with one thread, pinned to one core; those of the two tools alternate. fxpress: from the module in
memory to a verified artifact on disk (`fxpress.compile`). The peer: from a float ONNX file to an INT8 one (its own
`quant_pre_process`, then uint8 activations and int8 weights per channel); what the export before it costs
(`torch.onnx.export`) is stated besides. Imports are not in these figures, and stated. Random weights, random pictures
made on the fly, batch 10 for fxpress, one by one for the peer, as its readers do.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIZE = 224


@dataclass
class Clock:
    """Wall and processor time since it was made."""

    wall: float = field(default_factory=time.perf_counter)
    processor: float = field(default_factory=time.process_time)

    def read(self) -> dict[str, float]:
        return {
            "wall": round(time.perf_counter() - self.wall, 2),
            "processor": round(time.process_time() - self.processor, 2),
        }


def peak_mb() -> float:
    """Peak resident memory of this process in MB (10^6 bytes)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


# -- one process each ----------------------------------------------------------------------------------------------


def redrawn(name: str) -> Any:
    """A torchvision model whose BatchNorm statistics and weights are not those of a fresh one."""
    import torch

    from fxpress.frontend.sources import load_source

    torch.manual_seed(0)
    module = load_source(f"torchvision:{name}").module.eval()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(part.weight, 0.5, 1.0)
                torch.nn.init.normal_(part.bias, std=0.1)
                torch.nn.init.normal_(part.running_mean, std=0.1)
                torch.nn.init.uniform_(part.running_var, 0.5, 1.5)
    return module


@dataclass
class StageClock:
    """Processor time by stage, from what the progress display is told."""

    started: list[tuple[str, float]] = field(default_factory=list)

    def __call__(self, name: str, done: int, total: int | None) -> None:
        if not self.started or self.started[-1][0] != name:
            self.started.append((name, time.process_time()))

    def stages(self) -> dict[str, float]:
        """Seconds by stage."""
        ends = [*(t for _, t in self.started[1:]), time.process_time()]
        seconds: dict[str, float] = {}
        for (name, start), end in zip(self.started, ends):
            seconds[name] = round(seconds.get(name, 0.0) + end - start, 2)
        return seconds


def run_fxpress(model: str, samples: int, folder: Path) -> dict[str, Any]:
    """Compile, and say what it cost."""
    imports = Clock()
    import torch
    from calibration_memory import RandomPictures

    import fxpress
    import fxpress.api

    torch.set_num_threads(1)
    before = {"imports": imports.read()}
    module = redrawn(model)
    before["memory_before_mb"] = peak_mb()
    clock, stages = Clock(), StageClock()
    data = RandomPictures(samples, SIZE)
    example = (torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)),)
    artifact = fxpress.compile(module, example, calibration=data, output=folder / "out", progress=stages)
    cost = clock.read()
    report = artifact.report
    peaks = {s["pass"]: s["peak_rss_mb"] for s in report["stages"]}
    facts = {"kept": artifact.kept, "speedup": round(report["speedup"], 2), "sqnr_db": round(report["sqnr_db"], 1)}
    # Each stage resets the high-water mark, so the last one's is not that of the process.
    peak = max(peak_mb(), *peaks.values())
    return {**before, **cost, "peak_mb": peak, "stages": stages.stages(), "peaks": peaks, **facts}


def run_export(model: str, samples: int, folder: Path) -> dict[str, Any]:
    """torch.onnx.export to folder/float.onnx."""
    import torch

    torch.set_num_threads(1)
    module = redrawn(model)
    clock = Clock()
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        module, (torch.randn(2, 3, SIZE, SIZE),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    program.save(str(folder / "float.onnx"))
    return {**clock.read(), "peak_mb": peak_mb()}


def run_peer(model: str, samples: int, folder: Path) -> dict[str, Any]:
    """quantize_static on folder/float.onnx."""
    imports = Clock()
    import numpy as np
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    def one_thread(options: Any = onnxruntime.SessionOptions) -> Any:
        """Its sessions would take every core of the machine, pinned process or not."""
        made = options()
        made.intra_op_num_threads = 1
        return made

    onnxruntime.SessionOptions = one_thread

    class Reader:
        """One random picture a call, then None."""

        def __init__(self, name: str) -> None:
            self.name, self.left, self.draw = name, samples, np.random.default_rng(0)

        def get_next(self) -> dict[str, np.ndarray] | None:
            self.left -= 1
            shape = (1, 3, SIZE, SIZE)
            return {self.name: self.draw.standard_normal(shape, dtype=np.float32)} if self.left >= 0 else None

    before = {"imports": imports.read()}
    source, prepared, result = (str(folder / f"{n}.onnx") for n in ("float", "prepared", "int8"))
    name = onnx.load(source, load_external_data=False).graph.input[0].name
    clock = Clock()
    quant_pre_process(source, prepared)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, result, Reader(name), per_channel=True, **types)
    return {**before, **clock.read(), "peak_mb": peak_mb()}


RUNS: dict[str, Callable[[str, int, Path], dict[str, Any]]] = {
    "export": run_export, "quantize_static": run_peer, "fxpress": run_fxpress,
}  # fmt: skip


# -- all of them ---------------------------------------------------------------------------------------------------


def measured(name: str, options: argparse.Namespace, samples: int, folder: Path) -> dict[str, Any]:
    """One run in a fresh process."""
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder), "--model", options.model]
    command += ["--samples", str(samples), "--core", str(options.core)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{name} {samples} {result}", flush=True)
    return result


def compared(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Alternating runs of both, and the ratios of medians."""
    count = options.samples[0]
    export = measured("export", options, count, folder)
    results: dict[str, list[dict[str, Any]]] = {"quantize_static": [], "fxpress": []}
    for turn in range(options.rounds):
        for name in sorted(results, reverse=bool(turn % 2)):
            results[name].append(measured(name, options, count, folder))
    for key in ("wall", "processor", "peak_mb"):
        ours, theirs = (statistics.median(r[key] for r in results[n]) for n in ("fxpress", "quantize_static"))
        yield f"{key}: fxpress {ours:.1f}, quantize_static {theirs:.1f}, ratio {ours / theirs:.2f}"
        if key != "peak_mb":
            yield f"  with the export: {theirs + export[key]:.1f}, ratio {ours / (theirs + export[key]):.2f}"


def grown(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Peak memory at each number of samples."""
    peaks = [measured("fxpress", options, count, folder)["peak_mb"] for count in options.samples]
    yield f"peak memory at {options.samples}: {peaks}, growth {peaks[-1] / peaks[0]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--samples", type=int, nargs="+", default=[100])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--only", choices=["fxpress"])
    parser.add_argument("--one", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        os.sched_setaffinity(0, {options.core})
        print(json.dumps(RUNS[options.one](options.model, options.samples[0], options.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = grown if options.only else compared
        for line in lines(options, Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
