"""The demonstration: the whole job, on digits that took no part in training or calibration."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from fxpress.demo import CALIBRATION, load_digits


def test_held_out_digits_take_no_part_in_training_or_calibration():
    digits = load_digits(seed=0)
    assert len(digits.inputs) + len(digits.held_out_inputs) == 1797
    assert len(digits.held_out_inputs) == len(digits.held_out_labels) == 539
    assert len(digits.inputs) >= CALIBRATION
    used = {x.numpy().tobytes() for x in digits.inputs}
    shared = sum(x.numpy().tobytes() in used for x in digits.held_out_inputs)
    assert shared == 0
    again = load_digits(seed=0)
    assert torch.equal(again.held_out_labels, digits.held_out_labels)
    assert not torch.equal(load_digits(seed=1).held_out_labels, digits.held_out_labels)


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path):
    command = [sys.executable, "-c", "from fxpress.cli import main; main()", "demo", "-o", str(tmp_path / "out"), "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["metric"] == {"name": "top-1", "count": 539}
    assert report["float"]["metric"] > 0.97, "the float network must be worth comparing with"
    assert report["compiled"]["metric"] >= report["float"]["metric"] - 0.01
    assert report["compiled"]["size_bytes"] < 0.25 * report["float"]["size_bytes"]
    assert report["pruning"]["macs_kept"] <= 0.505
    assert report["coverage"]["integer_macs"] == 1.0
    assert report["parity"]["layer_max_steps"] <= 1
    assert str(tmp_path / "out" / "report.html") in "".join(done.stderr.split("\n"))
    for words in ("top-1", "latency", "file size", "float", "compiled"):
        assert words in done.stderr
    assert seconds < 60
