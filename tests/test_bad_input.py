"""What a user can get wrong, from the command line: one message with a hint, exit code 1, nothing half-written."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import fxpress
from fxpress.cli import main

FILE = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))

def with_inputs():
    return make(), (torch.randn(2, 3, 8, 8),)

def with_dict():
    return make(), {"input": torch.randn(2, 3, 8, 8)}

def broken():
    module = make()
    with torch.no_grad():
        module[0].weight[0, 0, 0, 0] = float("nan")
    return module

class Unlowered(nn.Module):
    def forward(self, x):
        return torch.special.i0(x)  # no row in the lowering table

def unlowered():
    return Unlowered()

class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x

def branching():
    return Branching()

def empty():
    return []

def failing():
    raise ValueError("out of disk")

def failing_later():
    yield torch.randn(4, 3, 8, 8)
    raise OSError("disk gone")
"""


@pytest.fixture
def place(tmp_path):
    """A folder of good and bad files."""
    rng = np.random.default_rng(0)
    good = rng.normal(size=(8, 3, 8, 8)).astype(np.float32)
    (tmp_path / "m.py").write_text(FILE)
    np.save(tmp_path / "good.npy", good)
    np.savez(tmp_path / "labelled.npz", x=good, y=np.arange(8) % 4)
    np.savez(tmp_path / "wronglabels.npz", x=good, y=np.arange(8) + 100)
    np.savez(tmp_path / "pixels.npz", images=rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), labels=np.arange(8) % 4)
    np.save(tmp_path / "small.npy", good[:, :, :5])
    np.save(tmp_path / "double.npy", good.astype(np.float64))
    np.save(tmp_path / "none.npy", good[:0])
    spoiled = good.copy()
    spoiled[3, 1, 2, 2] = np.nan
    np.save(tmp_path / "nan.npy", spoiled)
    torch.save({"state_dict": nn.Linear(3, 3).state_dict()}, tmp_path / "other.pth")
    (tmp_path / "file").write_text("a regular file")
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object))
    (tmp_path / "objects.pth").write_bytes(pickle.dumps({"model": object()}))
    (tmp_path / "noplugin.py").write_text("x = 1\n")
    (tmp_path / "bad.toml").write_text("pipeline = 3\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    return tmp_path


GOOD = ["m.py:make", "--data", "good.npy"]
CASES = {
    "wrong weights": ([*GOOD, "--weights", "other.pth"], "missing (4): 0.weight"),
    "weights are no checkpoint": ([*GOOD, "--weights", "file"], "cannot read weights"),
    "an archive that is not there": (["x.pt2", "--data", "good.npy"], "no such file"),
    "nan in weights": (["m.py:broken", "--data", "good.npy"], "0.weight"),
    "wrong shape": (["m.py:with_inputs", "--data", "small.npy"], "shape [8, 3, 5, 8]"),
    "wrong dtype": (["m.py:with_inputs", "--data", "double.npy"], "dtype float64"),
    "nan in data": (["m.py:with_inputs", "--data", "nan.npy"], "1 NaN"),
    "nan in data without example inputs": (["m.py:make", "--data", "nan.npy"], "NaN"),
    "empty data": (["m.py:make", "--data", "none.npy"], "no examples"),
    "an empty iterable": (["m.py:make", "--data", "m.py:empty"], "no examples"),
    "data that fail": (["m.py:make", "--data", "m.py:failing"], "out of disk"),
    "data that fail later": (["m.py:make", "--data", "m.py:failing_later"], "batch 1 of the data cannot be read: OSError"),
    "data of objects": (["m.py:make", "--data", "objects.npy"], "Python objects"),
    "weights of objects": ([*GOOD, "--weights", "objects.pth"], "more than tensors and plain values"),
    "observers without fold": ([*GOOD, "--pipeline", "cleanup,annotate,observe,calibrate"], "add `fold`"),
    "quantized twice": ([*GOOD, "--pipeline", "quantize,quantize"], "quantized already"),
    "half after integers": ([*GOOD, "--pipeline", "quantize,to-half"], "quantized already"),
    "an idle form": ([*GOOD, "--pipeline", "quantize{forms=[attention]}"], "'attention' changes nothing"),
    "an unwritable dump": (["m.py:with_inputs", "--data", "good.npy", "--dump", "file/below"], "cannot dump"),
    "example inputs of the wrong form": (["m.py:with_dict", "--recipe", "float"], "a model and a dict"),
    "no data": (["m.py:with_inputs"], "calibration data"),
    "no inputs": (["m.py:make", "--recipe", "float"], "what inputs"),
    "pixels without a preprocess": (["m.py:make", "--data", "pixels.npz"], "--preprocess"),
    "no labels": ([*GOOD, "--eval", "good.npy"], "no labels"),
    "labels of another model": ([*GOOD, "--eval", "wronglabels.npz"], "labels go from 100 to 107"),
    "unknown op": (["m.py:unlowered", "--recipe", "float", "--input", "3x8x8"], "i0"),
    "control flow": (["m.py:branching", "--data", "good.npy"], "depends on data"),
    "a model that fails on its input": (["m.py:make", "--recipe", "float", "--input", "3x9x9"], "fails on the example"),
    "unknown model": (["resnet", "--data", "good.npy"], "not a model"),
    "unknown callable": (["m.py:mak", "--data", "good.npy"], "did you mean make"),
    "unknown option": ([*GOOD, "--prunes", "macs=0.5"], "No such option"),
    "unknown pass": ([*GOOD, "--pipeline", "cleanup,fuse-batchnrm"], "did you mean 'fuse-batchnorm'"),
    "unknown pass option": ([*GOOD, "--pipeline", "quantize{range=mse}"], "did you mean 'ranges'"),
    "bad option value": ([*GOOD, "--pipeline", "quantize{ranges=best}"], "choose one of"),
    "broken pipeline": ([*GOOD, "--pipeline", "cleanup,,quantize"], "expected a pass name"),
    "unknown target": ([*GOOD, "--target", "ort-x68"], "did you mean 'ort-x86'"),
    "unknown recipe": ([*GOOD, "--recipe", "int4"], "did you mean int8"),
    "bad recipe file": ([*GOOD, "--recipe", "bad.toml"], "must hold the text `pipeline`"),
    "unknown preprocess": (["m.py:make", "--data", "pixels.npz", "--preprocess", "imagnet"], "unknown preprocess"),
    "bad prune": ([*GOOD, "--prune", "macs=2"], "macs is 2"),
    "unknown prune option": ([*GOOD, "--prune", "flops=0.5"], "no option 'flops'"),
    "bad size": ([*GOOD, "--input", "3*8*8"], "--input is '3*8*8'"),
    "bad drop": ([*GOOD, "--eval", "labelled.npz", "--max-drop", "little"], "max-drop is 'little'"),
    "bad threads": ([*GOOD, "--threads", "0"], "threads"),
    "preprocess without pictures": ([*GOOD, "--preprocess", "imagenet"], "no effect"),
    "preprocess without data": (["m.py:with_inputs", "--recipe", "float", "--preprocess", "imagenet"], "no effect"),
    "samples without data": (["m.py:with_inputs", "--recipe", "float", "--samples", "3"], "no effect"),
    "max-drop without eval": ([*GOOD, "--max-drop", "1%"], "no effect"),
    "recipe beside pipeline": ([*GOOD, "--recipe", "int8", "--pipeline", "cleanup"], "no effect"),
    "prune beside pipeline": ([*GOOD, "--prune", "macs=0.5", "--pipeline", "cleanup"], "beside a pipeline"),
    "input beside example inputs": (["m.py:with_inputs", "--data", "good.npy", "--input", "3x8x8"], "no effect"),
    "a plugin without a pass": ([*GOOD, "--plugin", "noplugin.py"], "no effect"),
    "a plugin that is not there": ([*GOOD, "--plugin", "absent.py"], "no such file"),
}  # fmt: skip


def failed(arguments, capsys):
    """stderr of a command that must end with exit code 1 and say nothing on stdout."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 1
    assert out == ""
    return err


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_explained(place, case, capsys, monkeypatch):
    monkeypatch.chdir(place)
    before = sorted(p.name for p in place.iterdir())
    arguments, message = CASES[case]
    err = failed(["compile", *arguments, "-o", "out"], capsys)
    assert message in " ".join(err.split())
    assert err.startswith(("error: ", "warning: "))
    assert err.count("error: ") == 1
    assert "hint: " in err
    assert "Traceback" not in err
    for advice in ("allow_pickle", "weights_only"):
        assert advice not in err, "no advice to run what a file holds"
    after = sorted(p.name for p in place.iterdir() if p.name != "__pycache__")
    assert after == before, "nothing half-written"


@pytest.mark.parametrize("output", ["file", "file/below", "taken"])
def test_an_output_that_cannot_be_written(place, output, capsys, monkeypatch):
    monkeypatch.chdir(place)
    err = failed(["compile", *GOOD, "-o", output], capsys)
    assert "hint: " in err
    assert (place / "file").read_text() == "a regular file"
    assert [p.name for p in (place / "taken").iterdir()] == ["thesis.tex"]


def test_a_failed_compilation_leaves_the_older_artifact(place, tiny_folder, capsys, monkeypatch):
    import shutil

    monkeypatch.chdir(place)
    shutil.copytree(tiny_folder, place / "out")
    before = {p.name: p.read_bytes() for p in (place / "out").iterdir()}
    failed(["compile", "m.py:with_inputs", "--data", "nan.npy", "-o", "out"], capsys)
    assert {p.name: p.read_bytes() for p in (place / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nothing"], "is not a model"),
        (["inspect", "."], "no fxpress artifact"),
        (["eval", "absent", "--data", "labelled.npz"], "no fxpress artifact"),
        (["eval", "TINY", "--data", "good.npy"], "no labels"),
        (["eval", "TINY", "--data", "wronglabels.npz"], "labels go from"),
        (["eval", "TINY", "--data", "pixels.npz", "--preprocess", "imagenet"], "was compiled with"),
        (["bench", "TINY", "--against", "absent.onnx"], "no such file"),
        (["bench", "TINY", "--against", "file"], "give an .onnx file"),
        (["bench", "TINY", "--seconds", "0"], "--seconds is 0"),
        (["opt", "absent.pt2", "--pipeline", "cleanup", "-o", "o.pt2"], "no such file"),
        (["opt", "file", "--pipeline", "cleanup", "-o", "o.pt2"], "not a readable"),
        (["opt", "absent.pt2", "--pipeline", "cleanup", "-o", "o.onnx"], ".pt2"),
        (["rerun", "absent"], "no reproducer"),
        (["demo", "-o", "file"], "is a file"),
        (["compile"], "Missing"),
        (["nonsense"], "No such command"),
    ],
)
def test_mistakes_of_the_other_commands(place, tiny_folder, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(place)
    err = failed([str(tiny_folder) if a == "TINY" else a for a in arguments], capsys)
    assert message in " ".join(err.split())
    assert "hint: " in err


def test_the_command_alone_shows_its_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 1
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: fxpress.quantize(m, x), "expected a Program, got"),
        (lambda m, x: fxpress.to_onnx(m), "expected a Program, got"),
        (lambda m, x: fxpress.compile(m, (x[:2],), calibration=x, reference=m), "reference must be a Program, got"),
        (lambda m, x: fxpress.compile(m, (x[:2],), calibration=x, plan=5), "plan is a int"),
        (lambda m, x: fxpress.compile(m, (x[:2],), calibration=x, preprocess="imagnet"), "unknown preprocess"),
        (lambda m, x: fxpress.compile(m, (x[:2],), calibration=x, preprocess={}), "preprocess is a dict"),
        (lambda m, x: fxpress.compile(m, (x[:2],), calibration=x, labels="abcd"), "labels are 'abcd'"),
        (lambda m, x: fxpress.compile(m, (x[:2],), calibration=x, labels=[1, 2]), r"labels are \[1, 2\]"),
        (lambda m, x: fxpress.compile(m, (x[:2],), calibration=[x, x[:0]]), "the batch is empty"),
        (lambda m, x: fxpress.compile(m, (x[:2],), calibration=x, target=None), "target is a NoneType"),
        (lambda m, x: fxpress.compile(m, (x[:2],), calibration=x, seed="a"), "seed is 'a'"),
        (lambda m, x: fxpress.compile(m, (x[:2],), calibration=x, output=5), "output is a int"),
        (lambda m, x: fxpress.compile(m, (x[:2],), calibration=x, evaluate=lambda r: 0, max_drop=[1]), "max-drop is"),
        (lambda m, x: fxpress.compile(m, (x[:2],), calibration=x, evaluate=lambda r: 10**400), "returned 1000"),
        (lambda m, x: fxpress.load(5), "a int is no folder"),
    ],
)
def test_mistakes_in_python(call, message, tiny_module, tiny_data):
    with pytest.raises(fxpress.FxpressError, match=message) as caught:
        call(tiny_module, tiny_data)
    assert "hint: " in str(caught.value)


def test_class_names_that_do_not_fit_are_left_out(tiny_module, tiny_data):
    """Folders of calibration pictures may be few of the classes."""
    artifact = fxpress.compile(tiny_module, (tiny_data[:2],), calibration=tiny_data, labels=["cat", "dog"], recipe="int8")
    assert artifact.manifest.labels == ()
    notes = [n for s in artifact.report["stages"] for n in s["notes"]]
    assert any("name 2 classes and the model has" in n for n in notes)


def test_weights_beside_an_archive(place, tiny_module, tiny_data, capsys, monkeypatch):
    monkeypatch.chdir(place)
    fxpress.capture(tiny_module, (tiny_data[:2],)).save("tiny.pt2")
    err = failed(["compile", "tiny.pt2", "--weights", "other.pth", "--data", "good.npy", "-o", "out"], capsys)
    assert "--weights has no effect" in err
    assert not (place / "out").exists()
