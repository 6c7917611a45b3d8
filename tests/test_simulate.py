"""A quantized program computes what ONNX Runtime's integer kernels compute, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import fx, nn

import fxpress
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target
from fxpress.frontend.operators import declare_operators
from fxpress.frontend.program import Program
from fxpress.frontend.simulate import Simulator, kernels_of
from fxpress.frontend.tensor_info import TensorInfo
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager
from fxpress.passes.verify import refresh_values
from fxpress.runtime.session import make_session

declare_operators()
ops = torch.ops.fxpress
aten = torch.ops.aten
# Scales whose ratios are short fractions: many results lie half way between two steps, where the order of the float
# operations decides.
SCALES = [1 / 256, 3 / 512, 1 / 64, 7 / 512, 0.1, 0.05, 0.02, 0.025]


def written(build, inputs: list[torch.Tensor]) -> Program:
    """A program whose graph `build(graph, placeholders)` writes; it gives the output node."""
    graph = fx.Graph()
    places = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    graph.output((build(graph, places),))
    module = fx.GraphModule(nn.Module(), graph)
    for place, value in zip(places, inputs):
        place.meta["val"] = value
    for node in graph.nodes:  # shapes and dtypes, by running it
        if node.op == "call_function":
            arguments = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            node.meta["val"] = node.target(*arguments[0], **arguments[1])
    infos = tuple(TensorInfo(f"x{i}", str(v.dtype).removeprefix("torch."), tuple(v.shape)) for i, v in enumerate(inputs))
    (output,) = [n for n in graph.nodes if n.op == "output"]
    form = output.args[0][0].meta["val"]
    return Program(module, tuple(inputs), infos, (TensorInfo("y", str(form.dtype).removeprefix("torch."), tuple(form.shape)),))


def joined(op, *steps):
    """quantize(op(dequantize(a), dequantize(b))) with (scale, zero point) of a, b and the result."""

    def build(graph: fx.Graph, places: list[fx.Node]) -> fx.Node:
        reals = [graph.call_function(ops.dequantize.default, (p, *step)) for p, step in zip(places, steps)]
        result = graph.call_function(op, tuple(reals))
        return graph.call_function(ops.quantize.default, (result, *steps[-1], torch.uint8))

    return build


def both(program: Program, inputs: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the simulation gives, ONNX Runtime, and the graph as it is written in real numbers."""
    simulator = Simulator(program.graph_module)
    assert simulator.kernels
    (ours,) = simulator.run(*inputs)
    (plain,) = program.graph_module(*inputs)
    (theirs,) = make_session(lower(program)).run(*(x.numpy() for x in inputs))
    return ours.numpy(), theirs, plain.numpy()


@pytest.mark.parametrize("op", [aten.add.Tensor, aten.mul.Tensor])
def test_all_pairs_of_operands_agree_at_scales_with_ties(op):
    values = torch.arange(256, dtype=torch.uint8)
    a, b = (t.reshape(1, -1).contiguous() for t in torch.meshgrid(values, values, indexing="ij"))
    rng = np.random.default_rng(0)
    different = 0
    for _ in range(12):
        sa, sb = (float(np.float32(s)) for s in rng.choice(SCALES, 2))
        za, zb, zy = (int(z) for z in rng.integers(0, 256, 3))
        ratio = rng.choice([0.5, 1, 1.5, 2, 3])
        sy = float(np.float32(ratio * (max(sa, sb) if op is aten.add.Tensor else 64 * sa * sb)))

        program = written(joined(op, (sa, za), (sb, zb), (sy, zy)), [a, b])
        ours, theirs, plain = both(program, [a, b])
        np.testing.assert_array_equal(ours, theirs)
        different += int((plain != theirs).sum())
    assert different > 0  # computed in real numbers it would not agree


@pytest.mark.parametrize("channels", [4, 24, 700], ids=["sums below 2^24", "two parts", "two parts, wide"])
def test_sums_are_exact_however_large(channels):
    """Nearly equal large weights and inputs: the sums reach 700 * 9 * 127 * 255, far beyond float32's integers."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        module[0].weight.copy_(1 + 0.1 * torch.rand_like(module[0].weight))
        module[0].bias.copy_(torch.randn(8))
    data = [(torch.rand(2, channels, 9, 9) + 0.5,)]
    program = fxpress.capture(module, data[0])
    quantized = PassManager("quantize{ranges=minmax}").run(program, Context(load_target("ort-x86"), data))
    x = torch.rand(3, channels, 9, 9) + 0.5
    (theirs,) = make_session(lower(quantized)).run(x.numpy())
    np.testing.assert_array_equal(quantized(x).detach().numpy(), theirs)


class Everything(nn.Module):
    """Strided and grouped convolutions, a residual, a gate, a pool, layers of a matrix with 8-bit and with float output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.group = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.gate, self.hidden, self.last = nn.Conv2d(16, 16, 1), nn.Linear(16, 600), nn.Linear(600, 10)

    def forward(self, x, bias=0.5):
        x = torch.relu(self.stem(x))
        x = x + nn.functional.leaky_relu(self.group(x), 0.1)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = nn.functional.silu(self.gate(torch.cat([x[:, :8], x[:, 8:]], 1)))
        return self.last(torch.relu(self.hidden(x.mean((2, 3))))) + bias


def test_whole_networks_agree_to_the_last_bit():
    torch.manual_seed(0)
    module = Everything().eval()
    data = [(torch.randn(4, 3, 32, 32),) for _ in range(2)]
    program = fxpress.capture(module, data[0][:1])
    quantized = PassManager("cleanup,canonicalize,quantize").run(program, Context(load_target("ort-x86"), data))
    assert len(kernels_of(quantized.graph)) >= 9
    session = make_session(lower(quantized))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 32, 32)
        (theirs,) = session.run(x.numpy())
        np.testing.assert_array_equal(quantized(x).detach().numpy(), theirs)
    assert torch.equal(quantized(x=x), quantized(x))  # by name as by position


def test_float_programs_run_as_they_are():
    torch.manual_seed(0)
    module = Everything().eval()
    x = torch.randn(2, 3, 32, 32)
    program = fxpress.capture(module, x)
    assert not kernels_of(program.graph)
    torch.testing.assert_close(program(x), module(x))


def test_a_saved_program_is_simulated_too(tmp_path):
    torch.manual_seed(0)
    data = [(torch.randn(2, 3, 32, 32),)]
    program = fxpress.capture(Everything().eval(), data[0])
    quantized = PassManager("cleanup,canonicalize,quantize").run(program, Context(load_target("ort-x86"), data))
    quantized.save(tmp_path / "q.pt2")
    loaded = Program.load(tmp_path / "q.pt2")
    refresh_values(loaded)
    assert len(kernels_of(loaded.graph)) == len(kernels_of(quantized.graph))
    assert torch.equal(loaded(data[0][0]), quantized(data[0][0]))
