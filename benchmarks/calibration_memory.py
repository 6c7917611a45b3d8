"""Peak memory of calibration must not grow with the number of samples.

    python benchmarks/calibration_memory.py --model mobilenet_v2 --samples 100 1000

Each count runs in a process of its own. The calibration data are made on the fly (the data set itself takes no memory);
the peak is the operating system's high-water mark of the resident set during the `quantize` pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RandomPictures:
    """A data set that is drawn anew, and alike, at every pass over it."""

    count: int
    size: int
    batch: int = 10

    def __iter__(self) -> Iterator[tuple[torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.count, self.batch):
            n = min(self.batch, self.count - start)
            yield (torch.randn(n, 3, self.size, self.size, generator=generator),)


def measure(model: str, samples: int, size: int, ranges: str) -> dict[str, float]:
    """Peak resident MB and seconds of the quantize pass, in this process."""
    import fxpress
    from fxpress.backends.targets import load_target
    from fxpress.frontend.sources import load_source
    from fxpress.passes.base import Context
    from fxpress.passes.manager import PassManager

    torch.set_num_threads(1)
    program = fxpress.capture(load_source(f"torchvision:{model}").module, torch.randn(2, 3, size, size))
    context = Context(target=load_target("ort-x86"), calibration=RandomPictures(samples, size))
    pipeline = f"cleanup,canonicalize,fuse-batchnorm,quantize{{ranges={ranges}}}"
    record = PassManager(pipeline).run(program, context).log[-1]
    return {"samples": samples, "peak_mb": record.peak_rss_mb, "seconds": round(record.seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--ranges", default="auto")
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.model, options.samples[0], options.size, options.ranges)))
        return
    results = []
    for count in options.samples:
        command = [sys.executable, __file__, "--one", "--samples", str(count)]
        command += ["--model", options.model, "--size", str(options.size), "--ranges", options.ranges]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{options.model} {results[-1]}", flush=True)
    print(f"growth {results[-1]['peak_mb'] / results[0]['peak_mb']:.3f}")


if __name__ == "__main__":
    main()
