"""A model that waits in a file is the model that `lower` gives."""

from __future__ import annotations

import gc
import os
import time

import onnx
import pytest
import torch
from torch import nn

import fxpress
from fxpress.backends.onnx.lower import lower
from fxpress.errors import ArtifactError
from fxpress.runtime import model_file
from fxpress.runtime.artifact import read_models
from fxpress.runtime.model_file import ModelFile
from fxpress.runtime.session import make_session


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 64, 3), nn.Linear(64, 200)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)).mean((2, 3)) * 2)


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_file_holds_what_lowering_gives(monkeypatch, tmp_path, in_memory):
    monkeypatch.setattr(model_file, "_IN_MEMORY", 10**9 if in_memory else 0)
    program = fxpress.capture(Net().eval(), torch.randn(2, 3, 8, 8))
    waiting, expected = ModelFile(program), lower(program)
    assert isinstance(waiting.source, onnx.ModelProto) == in_memory
    assert waiting.load() == expected
    assert waiting.size_bytes == expected.ByteSize()
    waiting.save(tmp_path / "one.onnx")
    assert (tmp_path / "one.onnx").stat().st_size == waiting.size_bytes
    assert onnx.load(tmp_path / "one.onnx") == expected
    x = torch.randn(2, 3, 8, 8)
    for source in (waiting.source, tmp_path / "one.onnx"):
        torch.testing.assert_close(torch.from_numpy(make_session(source).run(x.numpy())[0]), program(x).detach())


def test_the_file_goes_away_with_the_object(monkeypatch):
    monkeypatch.setattr(model_file, "_IN_MEMORY", 0)
    waiting = ModelFile(fxpress.capture(Net().eval(), torch.randn(2, 3, 8, 8)))
    folder = waiting.source.parent
    assert folder.is_dir()
    del waiting
    gc.collect()
    assert not folder.exists()


def test_what_a_killed_process_left_goes_after_a_day(monkeypatch, tmp_path):
    monkeypatch.setattr(model_file, "_IN_MEMORY", 0)
    monkeypatch.setattr(model_file.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(model_file, "alive", lambda pid: pid == 17)
    for name, days in (("fxpress-16-old", 2), ("fxpress-16-new", 0), ("fxpress-17-alive", 2), ("fxpress-mine", 2)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - 86400 * days - 1,) * 2)
    waiting = ModelFile(fxpress.capture(Net().eval(), torch.randn(2, 3, 8, 8)))
    own = waiting.source.parent.name
    assert {p.name for p in tmp_path.iterdir()} == {"fxpress-16-new", "fxpress-17-alive", "fxpress-mine", own}


def test_where_no_file_can_be_written_the_model_stays_in_memory(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_file, "_IN_MEMORY", 0)
    monkeypatch.setattr(model_file.ir, "save", full)
    waiting = ModelFile(fxpress.capture(Net().eval(), torch.randn(2, 3, 8, 8)))
    assert isinstance(waiting.source, onnx.ModelProto)
    make_session(waiting.source)


def test_above_two_gigabytes_the_weights_lie_beside(monkeypatch, tmp_path):
    """The limit is lowered here; everything else is as it is for a large model."""
    monkeypatch.setattr(model_file, "_IN_MEMORY", 0)
    monkeypatch.setattr(model_file, "_PROTOBUF_END", 10_000)
    program = fxpress.capture(Net().eval(), torch.randn(2, 3, 8, 8))
    artifact = fxpress.compile(program, calibration=[torch.randn(8, 3, 8, 8)], output=tmp_path / "out")
    folder = artifact.path
    assert set(artifact.manifest.files) >= {"model.onnx", "float.onnx", "float.onnx.data"}
    assert (folder / "float.onnx").stat().st_size < 10_000
    floating, compiled = read_models(folder)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.from_numpy(make_session(floating).run(x.numpy())[0]), program(x).detach())
    make_session(compiled)
    content = bytearray((folder / "float.onnx.data").read_bytes())
    content[100] ^= 1
    (folder / "float.onnx.data").write_bytes(content)
    with pytest.raises(ArtifactError, match="checksum differs"):
        read_models(folder)
    (folder / "float.onnx.data").unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_models(folder)
