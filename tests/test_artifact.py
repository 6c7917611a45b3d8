"""The folder that a compilation writes: its report, its page, and that it appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib

import pytest
import torch
from torch import nn

import fxpress
from fxpress.errors import ArtifactError, OutputError
from fxpress.runtime.artifact import check_output, read_models, read_report
from fxpress.runtime.atomic import replace_folder
from fxpress.runtime.manifest import Manifest
from fxpress.runtime.report.page import render_page

NUMBER = (int, float)
MAYBE = (int, float, type(None))
FIGURES = {"size_bytes": int, "parameters": int, "macs": int, "latency_ms": NUMBER, "metric": MAYBE}
LAYER = {
    "name": str, "op": str, "sqnr_isolated_db": MAYBE, "sqnr_accumulated_db": MAYBE, "low": MAYBE, "high": MAYBE,
    "scale": MAYBE, "zero_point": (int, type(None)), "bytes": int,
}  # fmt: skip
# interface.md, report.json schema 1.
SCHEMA = {
    "schema": int,
    "model": {"name": str, "parameters": int, "macs": int},
    "target": str,
    "pipeline": str,
    "seed": int,
    "stages": [{"pass": str, "seconds": NUMBER, "changes": int, "notes": [str], "peak_rss_mb": NUMBER}],
    "float": FIGURES,
    "compiled": FIGURES,
    "speedup": NUMBER,
    "metric": {"name": str, "count": int},
    "parity": {
        "batches": [int], "layer_max_steps": MAYBE, "layer_share_equal": MAYBE, "output_within_1_step": MAYBE,
        "max_abs": NUMBER,
    },
    "sqnr_db": MAYBE,
    "coverage": {
        "integer_macs": NUMBER,
        "float_islands": [{"node": str, "op": str, "macs": int, "reason": str, "hint": str}],
    },
    "layers": [LAYER],
    "pruning": {
        "groups": int, "macs_kept": NUMBER, "effects": [str], "notes": [str], "zeros": int, "blocks": [str],
        "compressed_bytes": (dict, type(None)),
        "pinned": [{"size": int, "reason": str, "source": (str, type(None))}],
    },
    "promises": [{"name": str, "kept": bool, "detail": str}],
    "fallback": (dict, type(None)),
    "tuning": (dict, type(None)),
    "environment": {
        "fxpress": str, "python": str, "torch": str, "onnx": str, "onnxruntime": str, "cpu": str, "threads": int,
    },
}  # fmt: skip


def misfits(value, schema, path="report"):
    """Every place where `value` does not have the form of `schema`: keys exactly, types exactly."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path} is {value!r}"]
        wrong = [f"{path}.{k} missing" for k in schema if k not in value]
        wrong += [f"{path}.{k} unexpected" for k in value if k not in schema]
        return wrong + [m for k in schema if k in value for m in misfits(value[k], schema[k], f"{path}.{k}")]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path} is {value!r}"]
        return [m for i, v in enumerate(value) for m in misfits(v, schema[0], f"{path}[{i}]")]
    right = isinstance(value, schema) and (schema is bool or not isinstance(value, bool))
    return [] if right else [f"{path} is {value!r}"]


# -- the report ---------------------------------------------------------------------------------------------------


def test_a_folder_with_files_of_the_user_is_left_alone(tiny_folder, tmp_path):
    """Not only one that holds no artifact: an artifact with notes beside it, too."""
    out = tmp_path / "out"
    shutil.copytree(tiny_folder, out)
    check_output(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"also holds what fxpress did not write \(notes.txt\)"):
        check_output(out)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    (out / "manifest.json").write_text("damaged")
    check_output(out)


def test_the_report_has_exactly_the_keys_of_schema_1(tiny_folder):
    report = json.loads((tiny_folder / "report.json").read_text())
    assert report["pruning"] is None
    nothing = {
        "groups": 0, "macs_kept": 1.0, "effects": [], "notes": [], "zeros": 0, "blocks": [], "compressed_bytes": None, "pinned": [],
    }  # fmt: skip
    assert misfits({**report, "pruning": nothing}, SCHEMA) == []


def test_the_schema_test_can_fail(tiny_folder):
    report = json.loads((tiny_folder / "report.json").read_text())
    report["float"]["macs"] = "many"
    del report["seed"]
    report["extra"] = 1
    found = misfits(report, SCHEMA)
    assert {"report.float.macs is 'many'", "report.seed missing", "report.extra unexpected"} <= set(found)


def test_the_figures_are_those_of_the_files(tiny_folder, tiny_module):
    report = json.loads((tiny_folder / "report.json").read_text())
    assert report["compiled"]["size_bytes"] == (tiny_folder / "model.onnx").stat().st_size
    assert report["float"]["size_bytes"] == (tiny_folder / "float.onnx").stat().st_size
    assert report["float"]["parameters"] == sum(p.numel() for p in tiny_module.parameters())
    assert report["float"]["macs"] == report["compiled"]["macs"] == 64 * (3 * 16 * 9 + 16 * 16 * 9) + 16 * 5
    assert report["metric"] == {"name": "top-1", "count": 64}
    assert report["float"]["metric"] == 1.0
    assert [s["pass"] for s in report["stages"]][:4] == ["capture", "data", "cleanup", "canonicalize"]


def test_a_pruned_model_reports_groups_and_what_is_pinned(tiny_module, tiny_data):
    artifact = fxpress.compile(tiny_module, (tiny_data[:2],), calibration=[tiny_data], prune={"macs": 0.6})
    report = artifact.report
    assert report["metric"] is None
    assert misfits({**report, "metric": {"name": "", "count": 0}}, SCHEMA) == []
    assert report["pruning"]["macs_kept"] == pytest.approx(report["compiled"]["macs"] / report["float"]["macs"])
    assert report["pruning"]["macs_kept"] <= 0.61
    assert any(p["size"] == 5 for p in report["pruning"]["pinned"])  # the classes
    assert report["float"]["parameters"] == sum(p.numel() for p in tiny_module.parameters())


def test_a_sparse_model_says_that_it_is_no_faster(tiny_module, tiny_data):
    """Half of the weights are zero: the MACs stay, only the file compresses better."""
    dense = fxpress.compile(tiny_module, (tiny_data[:2],), calibration=[tiny_data]).onnx.SerializeToString()
    artifact = fxpress.compile(
        tiny_module, (tiny_data[:2],), calibration=[tiny_data], prune="kind=unstructured,ratio=0.7"
    )
    pruning = artifact.report["pruning"]
    assert misfits(pruning, SCHEMA["pruning"]) == []
    assert pruning["macs_kept"] == 1.0
    assert pruning["zeros"] == round(0.7 * (3 * 16 * 9 + 16 * 16 * 9 + 16 * 5))
    assert "makes nothing faster" in pruning["effects"][0]
    assert 0 < pruning["compressed_bytes"]["compiled"] < len(zlib.compress(dense))
    assert "makes nothing faster" in render_page(artifact.report)


def test_a_model_without_a_block_says_so(tiny_module, tiny_data):
    artifact = fxpress.compile(tiny_module, (tiny_data[:2],), calibration=[tiny_data], prune="kind=blocks,ratio=1")
    pruning = artifact.report["pruning"]
    assert pruning["blocks"] == ["conv2"]
    assert pruning["macs_kept"] == pytest.approx(artifact.report["compiled"]["macs"] / artifact.report["float"]["macs"])
    assert "their MACs and time go" in pruning["effects"][0]
    assert pruning["compressed_bytes"] is None


def test_the_page_stands_alone_and_escapes(tiny_folder):
    report = json.loads((tiny_folder / "report.json").read_text())
    report["model"]["name"] = "<script>alert(1)</script>"
    page = render_page(report)
    assert "<script" not in page
    for outside in ("http://", "https://", "src=", "@import", "url("):
        assert outside not in page
    assert "of MACs on integers" in page


def test_the_page_says_when_a_promise_was_missed(tiny_folder):
    report = json.loads((tiny_folder / "report.json").read_text())
    report["promises"].append({"name": "max-drop", "kept": False, "detail": "fell by 0.3"})
    assert "A promise was missed" in render_page(report)


# -- the manifest -------------------------------------------------------------------------------------------------


def test_the_manifest_describes_and_seals_the_folder(tiny_folder):
    manifest = Manifest.read(tiny_folder)
    assert set(manifest.files) == {"model.onnx", "float.onnx", "report.json", "report.html"}
    assert str(manifest.inputs[0]) == "x: float32[batch, 3, 8, 8]"
    assert manifest.labels == tuple("abcde")
    assert manifest.preprocess.crop == (8, 8)
    assert manifest.kept
    assert read_report(tiny_folder)["model"]["name"] == "tiny"
    assert len(read_models(tiny_folder)) == 2


def test_a_folder_that_is_no_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="no fxpress artifact"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 99}')
    with pytest.raises(ArtifactError, match="not of schema 1"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 1, "model": "x"}')
    with pytest.raises(ArtifactError, match="lacks"):
        Manifest.read(tmp_path)


# -- writing ------------------------------------------------------------------------------------------------------


def owned(folder):
    return (folder / "mine").exists()


def fill(text):
    def write(folder):
        (folder / "mine").write_text(text)
        (folder / "big").write_text(text * 1000)

    return write


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_a_folder_is_replaced_whole(tmp_path):
    replace_folder(tmp_path / "out", fill("old"), owned)
    replace_folder(tmp_path / "out", fill("new"), owned)
    assert (tmp_path / "out" / "mine").read_text() == "new"
    assert leftovers(tmp_path) == []


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    replace_folder(tmp_path / "out", fill("old"), owned)

    def fail(folder):
        (folder / "mine").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        replace_folder(tmp_path / "out", fail, owned)
    assert (tmp_path / "out" / "mine").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="no fxpress artifact"):
        replace_folder(tmp_path / "out", fill("new"), owned)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("a file")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError):
            replace_folder(target, fill("new"), owned)


KILLED = """
    import sys, time
    from pathlib import Path
    from fxpress.runtime.atomic import replace_folder

    def write(folder):
        (folder / "mine").write_text("new")
        for i in range(200):
            (folder / f"part{i}").write_text("x" * 10000)
            time.sleep(0.001)

    print("ready", flush=True)
    while True:
        replace_folder(Path(sys.argv[1]), write, lambda f: True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.17, 0.31])
def test_a_killed_writer_leaves_the_old_folder_or_the_new_one(tmp_path, delay):
    target = tmp_path / "out"
    replace_folder(target, fill("old"), owned)
    writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(target)], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"ready\n"
    time.sleep(delay)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    files = {p.name for p in target.iterdir()}
    if (target / "mine").read_text() == "old":
        assert files == {"mine", "big"}
    else:
        assert len(files) == 201
    replace_folder(target, fill("next"), owned)  # the next writer sweeps up
    assert {p.name for p in target.iterdir()} == {"mine", "big"}
    assert leftovers(tmp_path) == []
    assert os.path.isdir(target)


@pytest.mark.parametrize(
    ("times", "recipe", "said"), [(1, "int8", None), (1000, "int8", "int8-accurate"), (1000, "int8-accurate", None)]
)
def test_outputs_far_from_those_of_float_are_said(times, recipe, said):
    """One channel a thousand times as large as the others, which its reader takes back: one scale for all loses them."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
    with torch.no_grad():
        first.weight[0] *= times
        second.weight[:, 0] /= times
    model = nn.Sequential(first, nn.ReLU(), second, nn.Conv2d(16, 4, 1))
    data = [torch.randn(4, 3, 6, 6) for _ in range(4)]
    artifact = fxpress.compile(model, (data[0][:2],), calibration=data, recipe=recipe)
    page = render_page(artifact.report)
    assert ("NOTE the outputs are far from the float model's" in repr(artifact)) == bool(said)
    assert ("far from the float model" in page) == bool(said)
    assert said is None or said in repr(artifact)
