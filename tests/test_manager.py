"""The manager believes no pass: each declaration is checked, and what a pass did is recorded."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fxpress
from fxpress.backends.targets import load_target
from fxpress.errors import PassError, PipelineError
from fxpress.passes.base import INTERFACE, VALUES, Context
from fxpress.passes.manager import PassManager, op_counts, run_passes
from fxpress.passes.rewrite import call_after, find
from fxpress.passes.verify import relative_difference

aten = torch.ops.aten


@dataclass(frozen=True)
class Scale(fxpress.Pass):
    """Multiply every relu by a factor, while declaring that values are preserved."""

    name = "test-scale"
    preserves = frozenset({VALUES, INTERFACE})
    factor: float = 1.0

    def run(self, program, context):
        for node in find(program, aten.relu.default):
            scaled = call_after(node, aten.mul.Tensor, node, self.factor)
            node.replace_all_uses_with(scaled, delete_user_cb=lambda u, s=scaled: u is not s)
        return fxpress.Change(1, ["scaled"])


@dataclass(frozen=True)
class Flatten(fxpress.Pass):
    """Change the shape of the output."""

    name = "test-flatten"
    preserves = frozenset({INTERFACE})

    def run(self, program, context):
        (last,) = program.output_nodes()
        flat = call_after(last, aten.flatten.using_ints, last, 0)
        last.replace_all_uses_with(flat, delete_user_cb=lambda u: u is not flat)
        return fxpress.Change(1)


@dataclass(frozen=True)
class Broken(fxpress.Pass):
    """Leave a graph that cannot run."""

    name = "test-broken"

    def run(self, program, context):
        for node in find(program, aten.relu.default):
            node.target = aten.conv2d.default
        return fxpress.Change(1)


@pytest.fixture
def program():
    return fxpress.capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.ones(2, 3))


def test_a_true_declaration_passes_and_is_recorded(program):
    result = run_passes(program, [Scale(1.0)])
    record = result.log[-1]
    assert (record.name, record.changes, record.notes) == ("test-scale", 1, ["scaled"])
    assert record.seconds > 0
    assert record.peak_rss_mb > 10
    assert "aten.mul.Tensor" not in op_counts(program), "the argument must not change"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Scale(1.01), "preserves values, but the outputs changed by 1.00e-02"),
        (Flatten(), "preserves the interface, but"),
        (Broken(), "cannot run"),
    ],
)
def test_a_false_declaration_is_caught(program, item, message):
    with torch.no_grad():
        for p in program.parameters():
            p.fill_(0.5)
    with pytest.raises(PassError) as error:
        run_passes(program, [item])
    assert message in str(error.value)


@dataclass(frozen=True)
class Quiet(fxpress.Pass):
    """Changes weights, or the graph, and says that it changed nothing."""

    name = "test-quiet"
    preserves = frozenset({"values", "interface"})
    graph: bool = False

    def run(self, program, context):
        if self.graph:
            for node in program.graph.nodes:
                if node.target is aten.relu.default:
                    node.target = aten.abs.default
        else:
            with torch.no_grad():
                for parameter in program.parameters():
                    parameter.mul_(0.5)
        return fxpress.Change()


@pytest.mark.parametrize("graph", [True, False])
def test_what_a_pass_does_counts_not_what_it_says(graph):
    torch.manual_seed(0)
    program = fxpress.capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3))
    with pytest.raises(PassError, match="preserves values, but"):
        run_passes(program, [Quiet(graph)])


def test_declarations_that_cannot_be_read_are_refused():
    class Plain(fxpress.Pass):
        name = "test-plain"

    @dataclass(frozen=True)
    class Open(fxpress.Pass):
        name = "test-open"
        limit: float

    @dataclass(frozen=True)
    class Misspelt(fxpress.Pass):
        name = "test-misspelt"
        preserves = frozenset({"value"})

    for cls, words in ((Plain, "is no dataclass"), (Open, "'limit' .* has no default"), (Misspelt, "preserves 'value'")):
        with pytest.raises(PipelineError, match=words) as caught:
            fxpress.register_pass(cls)
        assert "hint:" in str(caught.value)


def test_dump_writes_the_graph_and_the_difference(program, tmp_path):
    PassManager([Scale(1.0)], dump=tmp_path).run(program)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00-input.txt", "01-test-scale.txt"]
    text = (tmp_path / "01-test-scale.txt").read_text()
    assert "aten.mul.Tensor: 0 -> 1" in text
    assert "%relu = aten.relu.default" in text


def test_a_failure_leaves_a_reproducer(program, tmp_path):
    fxpress.register_pass(Broken)
    with pytest.raises(PassError) as error:
        PassManager([Broken()], repro=tmp_path / "crash.repro").run(program)
    assert any("crash.repro" in note for note in error.value.__notes__)
    with zipfile.ZipFile(tmp_path / "crash.repro") as bundle:
        facts = json.loads(bundle.read("repro.json"))
        bundle.extract("program.pt2", tmp_path)
    assert facts["pipeline"] == "test-broken"
    replayed = fxpress.Program.load(tmp_path / "program.pt2")
    with pytest.raises(PassError, match="cannot run"):
        run_passes(replayed, facts["pipeline"])


def test_programs_in_float64_are_followed():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    program = fxpress.capture(module, torch.randn(2, 3, 5, 5))
    program.graph_module.double()
    program.example_inputs = tuple(x.double() for x in program.example_inputs)
    fused = run_passes(program, "cleanup,fuse-batchnorm")
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(fused(x), module.double()(x), rtol=1e-12, atol=1e-12)


class Amplifier(nn.Module):
    """The logistic map at its chaotic end doubles every rounding error at each turn."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        x = self.layer(x).sigmoid()
        for _ in range(18):
            x = 4 * x * (1 - x)
        return x


def test_a_network_that_amplifies_rounding_is_no_fault_of_the_pass():
    torch.manual_seed(0)
    module = Amplifier().eval()
    program = fxpress.capture(module, torch.randn(2, 4, 6, 6))
    fused = run_passes(program, "fuse-batchnorm")
    assert relative_difference(fused.call_example()[0], program.call_example()[0]) > 1e-3, "or the test shows nothing"
    with pytest.raises(PassError, match="preserves values"):
        run_passes(program, [Wrong()])


@dataclass(frozen=True)
class Wrong(fxpress.Pass):
    """Change one weight, while declaring that values are preserved."""

    name = "test-wrong"
    preserves = frozenset({VALUES})

    def run(self, program, context):
        with torch.no_grad():
            next(iter(program.parameters())).mul_(1.5)
        return fxpress.Change(1)


def test_a_size_may_be_written_in_another_way():
    """[batch, batch, 4] by way of a matrix of pairs: batch**2 // batch is batch."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x):
            n = x.shape[0]
            return self.linear((x[:, None] - x[None]).reshape(n, n, 8))

    program = fxpress.capture(Pairs(), torch.randn(3, 8))
    dynamic = run_passes(program, "cleanup,canonicalize,quantize-dynamic", Context(load_target("ort-x86")))
    assert dynamic(torch.randn(5, 8)).shape == (5, 5, 4)
