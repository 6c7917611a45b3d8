"""float16: what is converted, what stays in float32 and why, and that PyTorch and ONNX Runtime agree."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import fxpress
from fxpress.backends.onnx.lower import lower
from fxpress.errors import FxpressError
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager, run_passes
from fxpress.runtime.verify import HALF_BOUND, check_parity

aten = torch.ops.aten


class Block(nn.Module):
    """A convolution, attention and a normalization: what converts and what does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.norm, self.q, self.k, self.v = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        y = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        y = torch.softmax(self.q(y) @ self.k(y).transpose(1, 2) / 4, -1) @ self.v(y)
        return self.head(y.mean(1))


def halved(module: nn.Module, example: torch.Tensor, data=None) -> fxpress.Program:
    torch.manual_seed(0)
    program = run_passes(fxpress.capture(module.eval(), example), "cleanup,canonicalize,fuse-batchnorm")
    return PassManager("to-half").run(program, Context(calibration=data))


class Turned(nn.Module):
    """A linear layer over the batch dim's neighbour, as attention with the sequence first has it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        return self.linear(x.transpose(0, 1)).transpose(0, 1) + x


LOADED = """
import sys
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
"""


@pytest.mark.parametrize("make", [Turned, lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)])
def test_a_transposed_input_of_a_product_loads_everywhere(make, tmp_path):
    """ONNX Runtime 1.31 crashes on Cast, Transpose, MatMul: in a process of its own, as anyone loads the file."""
    program = halved(make(), torch.randn(2, 12, 32))
    (tmp_path / "m.onnx").write_bytes(lower(program).SerializeToString())
    done = subprocess.run([sys.executable, "-c", LOADED, str(tmp_path / "m.onnx")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert check_parity(program, lower(program)).kept


def dtypes(program: fxpress.Program, name: str) -> set[torch.dtype]:
    """The dtypes of the results of an op."""
    return {n.meta["val"].dtype for n in program.graph.nodes if n.op == "call_function" and name in str(n.target)}


def test_layers_are_half_and_sums_are_not():
    program = halved(Block(), torch.randn(2, 3, 12, 12))
    assert dtypes(program, "conv2d") == dtypes(program, "linear") == dtypes(program, "matmul") == {torch.float16}
    assert dtypes(program, "softmax") == dtypes(program, "layer_norm") == dtypes(program, "mean") == {torch.float32}
    assert [i.dtype for i in (*program.inputs, *program.outputs)] == ["float32", "float32"]
    stored = program.state_dict()
    assert stored["stem.0.weight"].dtype is torch.float16
    assert stored["norm.weight"].dtype is torch.float32


def test_runtime_agrees_and_the_file_is_half():
    torch.manual_seed(0)
    module, x = Block(), torch.randn(2, 3, 12, 12)
    program = halved(module, x)
    model = lower(program)
    parity = check_parity(program, model)
    assert parity.bound == HALF_BOUND
    assert parity.kept
    assert parity.smallest_reference > 0.01
    reference = module(x)
    assert (program(x) - reference).abs().max() <= 5e-3 * reference.abs().max()
    wide = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    program = halved(wide, torch.randn(2, 256))
    assert lower(program).ByteSize() <= 0.51 * lower(fxpress.capture(wide, torch.randn(2, 256))).ByteSize()


def test_the_input_is_not_changed_by_later_passes():
    """All weights are float16 and the input is not: nobody takes it for a program that was made half by hand."""
    program = halved(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.randn(2, 3, 8, 8))
    assert {p.dtype for p in program.parameters()} == {torch.float16}
    again = run_passes(program, "cleanup")
    assert again.inputs[0].dtype == "float32"
    assert again(torch.randn(2, 3, 8, 8)).dtype is torch.float32


class Loud(nn.Module):
    """`last` reads what `loud` makes large, by `gain`."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.first, self.loud, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.loud.weight.mul_(gain)

    def forward(self, x):
        return self.last(self.loud(torch.relu(self.first(x)))) * 1e-4


@pytest.mark.parametrize(("gain", "half"), [(1.0, True), (1e5, False)])
def test_what_overflows_on_the_data_stays_in_float32(gain, half):
    torch.manual_seed(1)
    module, x = Loud(gain), torch.randn(4, 8)
    program = halved(module, x, [(x,)])
    names = {n.args[1].target: n.meta["val"].dtype for n in program.graph.nodes if n.target is aten.linear.default}
    kinds = set(names.values())
    assert kinds == ({torch.float16} if half else {torch.float16, torch.float32})
    assert torch.isfinite(program(x)).all()
    torch.testing.assert_close(program(x), module(x), rtol=2e-2, atol=1e-6 * gain)
    assert check_parity(program, lower(program)).kept


def test_calibration_data_show_what_the_example_does_not():
    torch.manual_seed(1)
    module, x = Loud(20.0), torch.randn(4, 8)
    quiet = halved(module, x)
    loud = halved(module, x, [(x * 5000,)])
    assert "example inputs alone" in "".join(quiet.log[-1].notes)
    assert any("float16 ends at 65504" in note for note in loud.log[-1].notes)
    assert not any("float16 ends at 65504" in note for note in quiet.log[-1].notes)


def test_weights_and_literals_that_do_not_fit_keep_their_layer_in_float32():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.big, self.faint, self.fine = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            with torch.no_grad():
                self.big.weight[0, 0] = 1e5
                self.faint.weight.mul_(1e-6)

        def forward(self, x):
            x = self.fine(torch.clamp(x, min=1e-9))
            return self.big(x), self.faint(x), x.masked_fill(x < 0, -1e9)

    x = torch.rand(3, 8) * 1e-2 + 1
    program = halved(Odd(), x)
    notes = "\n".join(program.log[-1].notes)
    assert "big stays in float32: its largest weight is 100000" in notes
    assert "faint stays in float32" in notes
    assert "cannot hold its number 1e-09" in notes
    assert "cannot hold its number -1e+09" in notes
    stored = program.state_dict()
    assert (stored["big.weight"].dtype, stored["fine.weight"].dtype) == (torch.float32, torch.float16)
    assert all(torch.isfinite(v).all() for v in program(x))
    assert check_parity(program, lower(program)).kept


def test_recurrent_layers_and_shared_and_lifted_constants():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True)

        def forward(self, tokens):
            hidden, _ = self.lstm(self.words(tokens))
            return (hidden + torch.tensor([0.5])) @ self.words.weight.t()

    program = halved(Words(), torch.randint(0, 20, (2, 7)))
    assert program.state_dict()["words.weight"].dtype is torch.float16
    assert check_parity(program, lower(program)).kept


def test_a_program_without_float32_is_refused():
    class Integers(nn.Module):
        def forward(self, x):
            return x + 1

    with pytest.raises(FxpressError, match="nothing of this program"):
        run_passes(fxpress.capture(Integers(), torch.randint(0, 5, (2, 3))), "to-half")


def test_the_recipe_and_its_report():
    x = torch.randn(2, 3, 12, 12)
    artifact = fxpress.compile(Block(), (x,), recipe="fp16")
    assert artifact.kept
    (stage,) = (s for s in artifact.report["stages"] if s["pass"] == "to-half")
    assert "no faster" in stage["notes"][0]
    assert artifact.report["compiled"]["size_bytes"] < artifact.report["float"]["size_bytes"]
    assert artifact.report["sqnr_db"] > 40
