"""Whole architectures without hints: pruned by half, equal to the oracle, exported, and the same in ONNX Runtime.

A sample of the zoo; `python benchmarks/zoo.py` runs all of it and writes docs/zoo.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.zoo]

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

# Model, and the least share of its parameters that must be prunable: pinning everything would fail.
SAMPLE = {
    "transformers:bert-classifier": 0.9,
    "transformers:convnextv2": 0.9,
    "transformers:deberta-v2": 0.8,
    "transformers:gpt2-lm": 0.9,
    "transformers:llama-lm": 0.9,
    "transformers:segformer": 0.9,
    "transformers:swin": 0.8,
    "transformers:t5": 0.8,
    "transformers:wav2vec2": 0.75,
    "timm:xcit_nano_12_p16_224": 0.9,
    "timm:levit_128s": 0.9,
    "timm:sequencer2d_s": 0.9,
}


@pytest.mark.parametrize("name", SAMPLE)
def test_pruned_by_half_without_hints(name: str) -> None:
    pytest.importorskip(name.partition(":")[0])
    import zoo

    row = zoo.measure(name)
    assert row["status"] == "exact", row
    assert row["prunable"] >= SAMPLE[name]
    assert row["unexplained"] == 0
    assert row["params_kept"] < 0.8
