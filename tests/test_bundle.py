"""A compiled model in use, where torch is not installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import fxpress
from fxpress.errors import ArtifactError, DataError

TORCHLESS = """
    import sys

    class NoTorch:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("torch", "torchvision", "onnx", "onnx_ir"):
                raise ImportError(f"{name} is not installed here")

    sys.meta_path.insert(0, NoTorch())
    import numpy as np
    import fxpress

    run = fxpress.load(sys.argv[1])
    x = np.load(sys.argv[2])
    np.save(sys.argv[3], run(x))
    picture = np.full((10, 12, 3), 200, np.uint8)
    assert run(run.preprocess(picture)).shape == (1, 5)
    assert "torch" not in sys.modules
    try:
        import torch
    except ImportError:
        print("torch cannot be imported")
"""


@pytest.fixture(scope="module")
def run(tiny_folder):
    return fxpress.load(tiny_folder)


@pytest.fixture
def x(tiny_data):
    return tiny_data[:7].numpy()


def test_it_runs_where_torch_cannot_be_imported(tiny_folder, x, tmp_path, run):
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", textwrap.dedent(TORCHLESS), tiny_folder, tmp_path / "x.npy", tmp_path / "y.npy"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch cannot be imported" in done.stdout
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), run(x))


def test_inputs_by_position_or_name(run, x):
    assert run(x).shape == (7, 5)
    np.testing.assert_array_equal(run(x=x), run(x))
    assert "x: float32[batch, 3, 8, 8]" in repr(run)
    assert run.labels == tuple("abcde")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: ((), {}), "received 0 by position"),
        (lambda x: ((x, x), {}), "received 2 by position"),
        (lambda x: ((), {"pixels": x}), "pixels by name"),
        (lambda x: ((x,), {"x": x}), "once"),
        (lambda x: ((x.astype(np.float64),), {}), r"x.astype\('float32'\)"),
        (lambda x: ((x[0],), {}), r"x\[None\]"),
        (lambda x: ((x[:, :, :7],), {}), r"received shape \[7, 3, 7, 8\]"),
        (lambda x: ((x[:0],), {}), "shape"),
        (lambda x: ((x.tolist(),), {}), "received a list"),
    ],
)
def test_inputs_that_do_not_fit(run, x, make, message):
    args, kwargs = make(x)
    with pytest.raises(ArtifactError, match=message):
        run(*args, **kwargs)


def test_pictures_are_prepared_as_in_calibration(run):
    picture = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    batch = run.preprocess(picture, picture)
    assert batch.shape == (2, 3, 8, 8)
    np.testing.assert_allclose(batch[0], (picture[1:9, 2:10] / 255 - 0.5).transpose(2, 0, 1), atol=1e-6)
    with pytest.raises(ArtifactError, match="no picture"):
        run.preprocess()
    with pytest.raises(DataError, match="smaller than the crop"):
        run.preprocess(picture[:4])


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def test_a_damaged_model_is_refused(copy):
    content = bytearray((copy / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match="checksum differs"):
        fxpress.load(copy)


def test_an_unlisted_or_missing_model_is_refused(copy):
    (copy / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        fxpress.load(copy)
    with pytest.raises(ArtifactError, match="no fxpress artifact"):
        fxpress.load(copy / "absent")


def test_only_the_model_and_the_manifest_are_needed(copy, x, run):
    for name in ("float.onnx", "report.json", "report.html"):
        (copy / name).unlink()
    np.testing.assert_array_equal(fxpress.load(copy)(x), run(x))


def test_a_model_without_a_preprocess_says_so(copy, tiny_folder):
    values = json.loads((copy / "manifest.json").read_text())
    values["preprocess"] = None
    (copy / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="not compiled with a preprocess"):
        fxpress.load(copy).preprocess(np.zeros((8, 8, 3), np.uint8))
