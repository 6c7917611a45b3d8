"""The command line: output for people on stderr, for machines on stdout, exit codes, no torch for help."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fxpress
from fxpress.cli import main

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

def make():
    return Net()

def with_inputs():
    return Net(), (torch.randn(2, 3, 8, 8),)

def batches():
    torch.manual_seed(1)
    for _ in range(3):
        yield torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "mine.py"
    path.write_text(MODEL)
    return path


@pytest.fixture
def fxp(capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve pictures in four class folders."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(12):
        (folder / f"class{i % 4}").mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (14, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class{i % 4}" / f"{i}.png")
    return folder


# -- compile ------------------------------------------------------------------------------------------------------


def test_compile_from_pictures_to_a_bundle(fxp, model, pictures, tmp_path):
    (tmp_path / "how.toml").write_text("resize = 10\ncrop = [8, 8]\nscale = 0.00392156862745098\nmean = [0.5, 0.5, 0.5]\n")
    out = tmp_path / "out"
    code, stdout, stderr = fxp(
        "compile", f"{model}:make", "--data", pictures, "--eval", pictures, "--preprocess", tmp_path / "how.toml",
        "--seed", 3, "-o", out, "--json",
    )  # fmt: skip
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report == json.loads((out / "report.json").read_text())
    assert report["metric"] == {"name": "top-1", "count": 12}
    assert report["seed"] == 3
    for words in ("top-1", "latency", "in integer kernels", "kept parity", "compiled in", "judged on what calibrated"):
        assert words in stderr
    run = fxpress.load(out)
    assert run.labels == ("class0", "class1", "class2", "class3")
    picture = Image.open(next(pictures.rglob("*.png")))
    assert run(run.preprocess(picture)).shape == (1, 4)


def test_compile_from_a_callable_with_dump(fxp, model, tmp_path):
    code, stdout, stderr = fxp("compile", f"{model}:make", "--data", f"{model}:batches", "-o", tmp_path / "o",
                               "--dump", tmp_path / "dump")  # fmt: skip
    assert (code, stdout) == (0, ""), stderr
    dumped = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert dumped == ["00-input.txt", "01-cleanup.txt", "02-canonicalize.txt", "03-fuse-batchnorm.txt",
                      "04-smooth.txt", "05-quantize.txt"]  # fmt: skip
    assert "aten.batch_norm.default: 1 -> 0" in (tmp_path / "dump" / dumped[3]).read_text()


def test_compile_float_needs_no_data(fxp, model, tmp_path):
    code, _, stderr = fxp("compile", f"{model}:with_inputs", "--recipe", "float", "-o", tmp_path / "o")
    assert code == 0, stderr
    code, _, stderr = fxp("compile", f"{model}:make", "--recipe", "float", "--input", "3x9x7", "-o", tmp_path / "p")
    assert code == 0, stderr
    assert fxpress.load(tmp_path / "p").inputs[0].dims == ("batch", 3, 9, 7)


def test_compile_a_saved_program(fxp, tiny_module, tiny_data, tmp_path):
    fxpress.capture(tiny_module, (tiny_data[:2],)).save(tmp_path / "tiny.pt2")
    np.savez(tmp_path / "d.npz", x=tiny_data.numpy(), y=tiny_module(tiny_data).argmax(1).numpy())
    code, stdout, stderr = fxp("compile", tmp_path / "tiny.pt2", "--data", tmp_path / "d.npz", "--samples", 32,
                               "--eval", tmp_path / "d.npz", "--prune", "macs=0.9", "-o", tmp_path / "o", "--json")  # fmt: skip
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report["float"]["metric"] == 1.0
    assert report["pruning"]["macs_kept"] <= 0.91


def test_a_missed_promise_is_exit_code_2_and_the_artifact_is_kept(fxp, model, pictures, tmp_path, monkeypatch):
    scores = iter([0.9, 0.5])
    monkeypatch.setattr("fxpress.runtime.evaluate.Top1.__call__", lambda self, run: next(scores))
    code, _, stderr = fxp("compile", f"{model}:with_inputs", "--data", f"{model}:batches", "--eval", f"{model}:batches",
                          "--max-drop", "1%", "-o", tmp_path / "o")  # fmt: skip
    assert code == 2
    assert "MISSED max-drop: top-1 went from 0.9000 to 0.5000" in stderr
    assert fxpress.load(tmp_path / "o").manifest.kept is False


@pytest.mark.zoo
def test_random_weights_are_said(fxp, tmp_path):
    code, _, stderr = fxp("compile", "torchvision:squeezenet1_1", "--input", "3x64x64", "--recipe", "float",
                          "-o", tmp_path / "o")  # fmt: skip
    assert code == 0, stderr
    assert "random weights" in stderr
    assert fxpress.load(tmp_path / "o").manifest.preprocess.crop == (64, 64)


# -- the rest -----------------------------------------------------------------------------------------------------


def test_inspect_a_model(fxp, model):
    code, stdout, stderr = fxp("inspect", f"{model}:with_inputs", "--json")
    assert code == 0, stderr
    facts = json.loads(stdout)
    assert facts["model"]["parameters"] == 3 * 16 * 9 + 32 + 16 * 4 + 4
    assert facts["model"]["macs"] == 36 * 3 * 16 * 9 + 64
    assert 16 in [g["size"] for g in facts["groups"]]
    assert any(p["size"] == 4 and "output" in p["reason"] for p in facts["pinned"])
    assert "groups that can be pruned" in stderr


def test_inspect_a_folder(fxp, tiny_folder):
    code, stdout, stderr = fxp("inspect", tiny_folder, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["model"]["name"] == "tiny"
    assert "conv1" in stderr
    code, _, stderr = fxp("inspect", tiny_folder, "--input", "3x8x8")
    assert code == 1
    assert "no effect" in stderr


def test_explain(fxp, tiny_folder):
    code, stdout, stderr = fxp("explain", tiny_folder, "conv1", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["layer"]["bytes"] > 0
    assert "SQNR" in stderr
    code, _, stderr = fxp("explain", tiny_folder, "conv11")
    assert code == 1
    assert "did you mean conv1" in stderr


def test_eval_and_bench(fxp, tiny_folder, tiny_module, tiny_data, tmp_path):
    np.savez(tmp_path / "d.npz", x=tiny_data.numpy(), y=tiny_module(tiny_data).argmax(1).numpy())
    code, stdout, stderr = fxp("eval", tiny_folder, "--data", tmp_path / "d.npz", "--json")
    assert code == 0, stderr
    result = json.loads(stdout)
    report = json.loads((tiny_folder / "report.json").read_text())
    assert result["float"]["metric"] == 1.0
    assert result["compiled"]["metric"] == report["compiled"]["metric"]
    code, stdout, _ = fxp("bench", tiny_folder, "--against", tiny_folder / "model.onnx", "--seconds", 0.3, "--json")
    assert code == 0
    assert 0.7 < json.loads(stdout)["speedup"] < 1.4  # the same file
    code, stdout, _ = fxp("bench", tiny_folder, "--seconds", 0.3, "--json")
    assert json.loads(stdout)["against"] == "float"


def test_opt_writes_a_program(fxp, tiny_module, tiny_data, tmp_path):
    fxpress.capture(tiny_module, (tiny_data[:2],)).save(tmp_path / "in.pt2")
    code, _, stderr = fxp("opt", tmp_path / "in.pt2", "--pipeline", "cleanup,fuse-batchnorm", "-o", tmp_path / "o.pt2")
    assert code == 0, stderr
    result = fxpress.Program.load(tmp_path / "o.pt2")
    assert "batch_norm" not in result.text()
    torch.testing.assert_close(result(tiny_data), tiny_module(tiny_data), rtol=1e-4, atol=1e-5)


def test_what_there_is(fxp):
    for command, name in (("passes", "fuse-batchnorm"), ("targets", "ort-x86"), ("recipes", "int8")):
        code, stdout, stderr = fxp(command, "--json")
        assert code == 0
        assert name in [row["name"] for row in json.loads(stdout)]
        assert name in stderr


CRASHING = """
from dataclasses import dataclass
import fxpress

@fxpress.register_pass
@dataclass(frozen=True)
class Crash(fxpress.Pass):
    "Fails."
    name = "crash"
    def run(self, program, context):
        raise RuntimeError("on purpose")
"""


def test_a_failure_is_recorded_and_replayed(fxp, model, tmp_path):
    (tmp_path / "crash.py").write_text(CRASHING)
    with pytest.raises(RuntimeError, match="on purpose") as caught:
        main(["compile", f"{model}:with_inputs", "--pipeline", "cleanup,crash", "--plugin", str(tmp_path / "crash.py"),
              "-o", str(tmp_path / "o"), "--dump", str(tmp_path / "dump")])  # fmt: skip
    named, recorded = caught.value.__notes__
    assert named == "in pass 'crash', number 2 of the pipeline"
    assert "crash.repro" in recorded
    assert not (tmp_path / "o").exists()
    with pytest.raises(RuntimeError, match="on purpose"):
        main(["rerun", str(tmp_path / "dump" / "crash.repro"), "--plugin", str(tmp_path / "crash.py")])
    code, _, stderr = fxp("rerun", tmp_path / "crash.py")
    assert code == 1
    assert "no reproducer" in stderr


def test_help_and_version_do_not_load_torch():
    script = "import sys\nfrom fxpress.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n    assert 'torch' not in sys.modules\n"
    for arguments in (["--help"], ["compile", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_progress_is_drawn_on_a_terminal_only(capsys):
    from fxpress.commands.screen import progress_display

    with progress_display() as progress:
        assert progress is None  # under pytest stderr is no terminal
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal(monkeypatch, capsys):
    import io

    from fxpress.commands.screen import progress_display

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress_display() as progress:
        progress("train", 3, 8)
        progress("calibrate", 256, None)
        progress("calibrate", 512, 1024)
    assert "512/1024" in screen.getvalue()
    assert capsys.readouterr().out == ""
