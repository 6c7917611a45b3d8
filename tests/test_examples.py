"""The examples run and do what they say."""

from __future__ import annotations

from pathlib import Path

import fxpress
from fxpress.frontend.sources import load_file

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_prune_and_finetune(tmp_path):
    artifact = load_file(EXAMPLES / "prune_and_finetune.py").main(str(tmp_path / "out"))
    report = artifact.report
    assert report["float"]["metric"] > 0.9
    assert report["compiled"]["metric"] > report["float"]["metric"] - 0.03
    assert report["pruning"]["macs_kept"] <= 0.51
    assert fxpress.load(tmp_path / "out").manifest.kept
