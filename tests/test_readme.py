"""What the README shows is run, exactly as it stands there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fxpress
from fxpress.cli import main
from fxpress.frontend.sources import load_file

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = """
from torch import nn

def make_model():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4))
"""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the README's own pass in my_passes.py, and the files that its commands speak of."""
    folder = tmp_path_factory.mktemp("readme")
    (text,) = [b for b in blocks("python") if "register_pass" in b]
    (folder / "my_passes.py").write_text(text)
    (folder / "mine.py").write_text(MODEL)
    np.save(folder / "calibration.npy", np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32))
    return folder


def test_it_begins_with_two_commands():
    first, second = blocks("sh")[:2]
    assert README.index("```sh") < README.index("## ")
    assert first.strip().endswith("fxpress demo")
    assert second.strip().endswith("pytest")
    for command in (first, second):
        assert command.count("\n") == 1
        assert "-m venv" in command
        assert "-c constraints.txt" in command


def test_the_own_pass_is_short():
    (text,) = [b for b in blocks("python") if "register_pass" in b]
    assert len([line for line in text.splitlines() if line.strip() and not line.startswith("#")]) <= 16


def test_the_own_pass_runs_from_python(place):
    load_file(place / "my_passes.py")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    program = fxpress.capture(net, (x,))
    (pipeline,) = re.findall(r'`fxpress\.run_passes\(program, "([^"]+)"\)`', README)
    changed = fxpress.run_passes(program, pipeline)
    net[1], net[3] = nn.Hardswish(), nn.Hardswish()
    torch.testing.assert_close(changed(x), net(x))
    assert changed.log[-1].changes == 2
    assert "hardswish" not in program.text()


def test_the_own_pass_runs_from_the_command_line(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    (command,) = [b for b in blocks("sh") if "my_passes.py" in b]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "fxpress"
    with pytest.raises(SystemExit) as stopped:
        main([*words[1:], "--json"])
    out, err = capsys.readouterr()
    assert stopped.value.code in (0, None), err
    stages = {s["pass"]: s["changes"] for s in json.loads(out)["stages"]}
    assert stages["relu-to-hardswish"] == 1
    assert (place / "out" / "model.onnx").is_file()


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (text,) = [b for b in blocks("python") if "fxpress.compile" in b]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    images = torch.randn(6, 3, 224, 224)
    names = {
        "model": model,
        "example": images[:2],
        "loader": [(images, torch.arange(6))],
        "accuracy": lambda run: float((run(images).argmax(1) == model(images).argmax(1)).float().mean()),
        "picture": np.random.default_rng(0).integers(0, 256, (300, 280, 3), dtype=np.uint8),
    }
    exec(text, names)
    assert names["scores"].shape == (1, 4)
    assert "Artifact(Sequential for ort-x86)" in capsys.readouterr().out


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_command_in_the_table_exists(capsys):
    commands = set(re.findall(r"`fxpress (\w+)", README)) | {"targets", "recipes"}
    for command in sorted(commands - {"run_passes"}):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code in (0, None), command
        assert capsys.readouterr().out


def test_every_option_that_it_names_exists(capsys):
    with pytest.raises(SystemExit):
        main(["compile", "--help"])
    text = capsys.readouterr().out
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)):
        assert option[:12] in text, option
