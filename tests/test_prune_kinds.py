"""The other kinds of pruning by the same plan: single weights, n of m, hidden units, residual blocks; each by its oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.errors import DataError, FxpressError, OptionError, PruningError
from fxpress.frontend.cost import count_macs
from fxpress.passes.base import Context
from fxpress.passes.manager import run_passes
from fxpress.passes.prune.kinds.blocks import find_blocks
from fxpress.passes.prune.kinds.plans import BlockCosts
from fxpress.passes.prune.kinds.weight_uses import weight_uses
from fxpress.passes.prune.masking import oracle_error
from fxpress.passes.prune.plan import PruningPlan
from fxpress.passes.prune.planning import plan_pruning
from fxpress.passes.verify import relative_difference


class Basic(nn.Module):
    """The residual block of ResNet, with an option for a projection."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.down = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.down(x))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.Sequential(Basic(16, 16), Basic(16, 16), Basic(16, 32, 2), Basic(32, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


class TokenBlock(nn.Module):
    """Pre-norm attention and a gated MLP, with layer scale; the GELU is spelled out, with its own sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.gate, self.up, self.down = nn.Linear(width, 48), nn.Linear(width, 48), nn.Linear(48, width)
        self.scale = nn.Parameter(torch.full((width,), 0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.norm2(x)
        gate = self.gate(y)
        gate = 0.5 * gate * (1 + torch.tanh(0.8 * (gate + 0.0447 * gate**3)))
        return x + F.dropout(self.down(gate * self.up(y)), 0.1, self.training) * self.scale


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.blocks = nn.Sequential(TokenBlock(32), TokenBlock(32))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))).mean(1))


class Perceptron(nn.Module):
    """Two hidden layers of linear units, and weights in all spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 40), nn.Linear(40, 24)
        self.norm = nn.BatchNorm1d(40)
        self.table = nn.Parameter(torch.randn(24, 20) * 0.3)
        self.last = nn.Parameter(torch.randn(4, 20) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.second(F.relu(self.norm(self.first(x)))))
        return F.relu(x @ self.table) @ self.last.t()


INPUTS = {ConvNet: (4, 3, 8, 8), Tokens: (4, 5, 8), Perceptron: (4, 12)}


def captured(kind: type[nn.Module], seed: int = 0) -> fxpress.Program:
    torch.manual_seed(seed)
    model = kind()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.2, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return fxpress.capture(model.eval(), (torch.randn(INPUTS[kind]),))


@pytest.fixture(scope="module")
def programs() -> dict[type[nn.Module], fxpress.Program]:
    return {kind: captured(kind) for kind in INPUTS}


def batches(kind: type[nn.Module], count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(INPUTS[kind], generator=generator) for _ in range(count)]


def check(program: fxpress.Program, plan: PruningPlan, tmp_path: Path | None = None) -> fxpress.Program:
    """The oracle, the figures, and that something really changed."""
    pruned, masked = plan.apply(program), plan.mask(program)
    assert oracle_error(masked, pruned) <= 1e-9
    assert relative_difference(pruned.call_example()[0], program.call_example()[0]) > 1e-4
    assert plan.macs == (count_macs(program), count_macs(pruned))
    assert plan.parameters == (program.parameter_count, pruned.parameter_count)
    return pruned


def read_names(program: fxpress.Program) -> set[str]:
    """The parameters and buffers that the graph reads."""
    return {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}


def zeros(program: fxpress.Program, name: str) -> torch.Tensor:
    return program.state_dict()[name] == 0


# -- which parameters are weights ---------------------------------------------------------------------------------


def test_weights_are_found_in_every_spelling(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    found = {u.name: (u.inputs, u.outputs) for u in weight_uses(programs[Perceptron])}
    assert found == {"first.weight": (1, 0), "second.weight": (1, 0), "table": (0, 1), "last": (1, 0)}
    tokens = {u.name for u in weight_uses(programs[Tokens])}
    assert "blocks.0.attn.in_proj_weight" in tokens
    assert not {n for n in tokens if "norm" in n or "bias" in n or "scale" in n}


def test_other_layers_that_hold_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(4, 6, 3)
            self.rnn = nn.GRU(6, 5, batch_first=True)
            self.table = nn.Embedding(7, 5)
            self.mix = nn.Parameter(torch.randn(5, 3))
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))

        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            y, _ = self.rnn(self.up(x).transpose(1, 2))
            return self.normed(torch.einsum("ntc,cd->ntd", y + self.table(index), self.mix))

    program = fxpress.capture(Net().eval(), (torch.randn(2, 4, 6), torch.zeros(2, 8, dtype=torch.long)))
    found = {u.name: u.inputs for u in weight_uses(program)}
    assert found["up.weight"] == 0
    assert found["rnn.weight_ih_l0"] == 1
    assert found["mix"] is None
    assert "table.weight" not in found
    assert any("normed" in n for n in found)
    plan = plan_pruning(program, kind="unstructured", ratio=0.5)
    assert oracle_error(plan.mask(program), plan.apply(program)) <= 1e-9


# -- unstructured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["l1", "l2", "lamp", "random"])
@pytest.mark.parametrize("kind", INPUTS)
def test_unstructured_ratio_is_exact(
    programs: dict[type[nn.Module], fxpress.Program], kind: type[nn.Module], importance: str
) -> None:
    program = programs[kind]
    plan = plan_pruning(program, kind="unstructured", ratio=0.6, importance=importance)
    pruned = check(program, plan)
    weights = {u.name for u in weight_uses(program)}
    count = sum(program.state_dict()[n].numel() for n in weights)
    assert plan.zeros == round(0.6 * count) == sum(int(zeros(pruned, n).sum()) for n in weights)
    for name, tensor in program.state_dict().items():
        if name not in weights:
            assert torch.equal(tensor, pruned.state_dict()[name])


def test_the_smallest_weights_go(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    program = programs[ConvNet]
    plans = [plan_pruning(program, kind="unstructured", ratio=0.5, importance=i) for i in ("l1", "l2")]
    assert plans[0].masks == plans[1].masks
    state = program.state_dict()
    removed = torch.cat([state[m.name][torch.from_numpy(~m.kept)].abs() for m in plans[0].masks])
    kept = torch.cat([state[m.name][torch.from_numpy(m.kept)].abs() for m in plans[0].masks])
    assert removed.max() <= kept.min()
    layers = plan_pruning(program, kind="unstructured", ratio=0.5, scope="layer")
    assert all(m.zeros == round(0.5 * m.kept.size) for m in layers.masks)
    assert {m.zeros for m in layers.masks} != {m.zeros for m in plans[0].masks}


def test_threshold_is_in_units_of_the_importance(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    program = programs[ConvNet]
    linear = plan_pruning(program, kind="unstructured", threshold=0.05, importance="l1")
    square = plan_pruning(program, kind="unstructured", threshold=0.05**2, importance="l2")
    pruned = check(program, linear)
    state = program.state_dict()
    for mask in linear.masks:
        assert np.array_equal(mask.kept, (state[mask.name].abs() >= 0.05).numpy())
        assert torch.equal(zeros(pruned, mask.name), state[mask.name].abs() < 0.05)
    assert {m.name: m.zeros for m in square.masks} == {m.name: m.zeros for m in linear.masks}


def test_max_ratio_and_exclude_hold_for_weights(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    program = programs[ConvNet]
    plan = plan_pruning(program, kind="unstructured", ratio=0.5, max_ratio=0.6, exclude=["layers.0", "he*"])
    assert not [m.name for m in plan.masks if m.name.startswith(("layers.0.", "head"))]
    assert max(m.zeros / m.kept.size for m in plan.masks) <= 0.6
    nothing = plan_pruning(program, kind="unstructured", threshold=1e-30)
    assert nothing.zeros == 0
    assert "no weight goes" in nothing.notes[0]
    everything = plan_pruning(program, kind="unstructured", threshold=1e3)
    assert all(m.zeros == m.kept.size - 1 for m in everything.masks)  # one weight of each stays
    with pytest.raises(PruningError, match="may go"):
        plan_pruning(program, kind="unstructured", ratio=0.9, max_ratio=0.5)


def test_a_shared_weight_is_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(F.relu(self.first(x)))

    program = fxpress.capture(Tied().eval(), (torch.randn(4, 8),))
    plan = plan_pruning(program, kind="unstructured", ratio=0.5)
    assert len(plan.masks) == 1
    assert plan.zeros == 32
    check(program, plan)


# -- n:m ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("3:8", 3, 8)])
def test_n_of_m_along_the_input_dimension(
    programs: dict[type[nn.Module], fxpress.Program], kind: type[nn.Module], pattern: str, n: int, m: int
) -> None:
    program = programs[kind]
    plan = plan_pruning(program, kind="n:m", pattern=pattern)
    pruned = check(program, plan)
    dims = {u.name: u.inputs for u in weight_uses(program)}
    for mask in plan.masks:
        dim = dims[mask.name]
        assert dim is not None
        parts = torch.from_numpy(mask.kept).movedim(dim, -1).reshape(-1, m)
        assert (parts.sum(1) == n).all()
        weights = program.state_dict()[mask.name].movedim(dim, -1).reshape(-1, m).abs()
        assert (weights.masked_fill(parts, 0).amax(1) <= weights.masked_fill(~parts, torch.inf).amin(1)).all()
    dense = {name for name in dims if not zeros(pruned, name).any()}
    for name in dense:
        dim = dims[name]
        assert dim is None or program.state_dict()[name].shape[dim] % m
        assert any(name in note for note in plan.notes)


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "2-4", "2:4:8", "", None, 24])
def test_patterns_that_mean_nothing(programs: dict[type[nn.Module], fxpress.Program], pattern: object) -> None:
    with pytest.raises(OptionError, match="pattern is"):
        plan_pruning(programs[Perceptron], kind="n:m", pattern=pattern)  # type: ignore[arg-type]


def test_a_pattern_that_fits_nowhere(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    with pytest.raises(PruningError, match="no weight can be pruned 2:7"):
        plan_pruning(programs[Tokens], kind="n:m", pattern="2:7")


# -- neurons ------------------------------------------------------------------------------------------------------


def test_hidden_units_go_by_their_outgoing_weights(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    program = programs[Perceptron]
    plan = plan_pruning(program, kind="neurons", ratio=0.5, importance="l1")
    check(program, plan)
    removed = {(r.name, r.dim): r.removed for r in plan.removals}
    outgoing = {("first.weight", 0): "second.weight", ("second.weight", 0): "table", ("table", 1): "last"}
    for (name, dim), reader in outgoing.items():
        weights = program.state_dict()[reader].abs()
        norms = weights.sum(1) if reader == "table" else weights.sum(0)
        count = len(norms) // 2
        assert set(removed[name, dim]) == set(norms.argsort()[:count].tolist())


def test_a_threshold_for_norms_of_units(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    program = programs[Perceptron]
    norms = program.state_dict()["second.weight"].norm(dim=0)
    threshold = float(norms.sort().values[14:16].mean())
    plan = plan_pruning(program, kind="neurons", threshold=threshold, importance="l2", exclude=["table", "last"])
    check(program, plan)
    (removed,) = [r.removed for r in plan.removals if (r.name, r.dim) == ("first.weight", 0)]
    assert removed == tuple(torch.nonzero(norms < threshold).ravel().tolist())


def test_only_hidden_units_of_mlps(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    """Not the stream, nor heads, nor channels of convolutions."""
    program = programs[Tokens]
    plan = plan_pruning(program, kind="neurons", ratio=0.5)
    check(program, plan)
    touched = {r.name.split(".")[2] for r in plan.removals}
    assert touched == {"gate", "up", "down"}
    assert all(r.size == 48 for r in plan.removals)
    with pytest.raises(PruningError, match="no hidden units"):
        plan_pruning(programs[ConvNet], kind="neurons", ratio=0.5)


def test_neurons_by_budget(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    program = programs[Perceptron]
    plan = plan_pruning(program, kind="neurons", params=0.5)
    pruned = check(program, plan)
    assert pruned.parameter_count <= 0.5 * program.parameter_count


# -- blocks -------------------------------------------------------------------------------------------------------


def test_residual_blocks_are_found_and_named(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    assert [b.name for b in find_blocks(programs[ConvNet])] == ["layers.0", "layers.1", "layers.3"]
    names = [b.name for b in find_blocks(programs[Tokens])]
    assert names[0] == "blocks.0.attn"
    assert len(names) == 4  # the sum inside the GELU is no block
    assert find_blocks(programs[Perceptron]) == []


FORWARDS: dict[str, tuple[Callable[[nn.ModuleDict, torch.Tensor], torch.Tensor], int]] = {
    "branch first": (lambda n, x: n["a"](x) + x, 1),
    "scaled branch": (lambda n, x: torch.add(x, n["a"](x), alpha=2), 1),
    "scaled identity": (lambda n, x: torch.add(n["a"](x), x, alpha=2), 0),
    "parallel branches": (lambda n, x: x + n["a"](x) + n["b"](x), 2),
    "both in one": (lambda n, x: (n["a"](x) + n["b"](x)) + x, 1),
    "nested": (lambda n, x: x + n["b"](x + n["a"](x)), 2),
    "broadcast": (lambda n, x: x + n["a"](x).mean(-1, keepdim=True), 1),
    "no identity": (lambda n, x: n["b"](x) + n["a"](x), 0),
    "no parameters": (lambda n, x: x + torch.tanh(x) ** 3, 0),
    "in place": (lambda n, x: x.clone().add_(n["a"](x)), 1),
    "sized by x": (lambda n, x: x + n["a"](x).reshape(x.shape[0], -1), 1),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_what_is_a_block(name: str) -> None:
    forward, count = FORWARDS[name]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
            self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.sigmoid(forward(self.parts, self.stem(x))))

    torch.manual_seed(0)
    program = fxpress.capture(Net().eval(), (torch.randn(4, 8),))
    blocks = find_blocks(program)
    assert len(blocks) == count
    for block in blocks:
        macs, parameters = BlockCosts(program).of([]), BlockCosts(program).of([block])
        plan = PruningPlan(
            (), (), (macs["macs"], parameters["macs"]), (macs["params"], parameters["params"]), blocks=(block,)
        )
        pruned = check(program, plan)
        assert read_names(program) - read_names(pruned) == set(block.tensors)


@pytest.mark.parametrize("importance", ["l1", "l2", "similarity", "change", "output"])
@pytest.mark.parametrize("kind", [ConvNet, Tokens])
def test_blocks_are_removed_by_ratio(
    programs: dict[type[nn.Module], fxpress.Program], kind: type[nn.Module], importance: str
) -> None:
    data = None if importance in ("l1", "l2") else batches(kind)
    plan = plan_pruning(programs[kind], kind="blocks", ratio=0.5, importance=importance, data=data)
    assert len(plan.blocks) == 2
    check(programs[kind], plan)


@pytest.mark.parametrize("importance", ["l1", "l2", "similarity", "change", "output"])
def test_a_block_that_does_nothing_goes_first(importance: str) -> None:
    """Zero in the last weights of a branch: every importance must see that."""
    for kind, tensor, name in (
        (ConvNet, "layers.1.bn2", "layers.1"),
        (Tokens, "blocks.1.scale", "blocks.1"),
    ):
        program = captured(kind)
        state = program.state_dict()
        for n in (tensor, f"{tensor}.weight", f"{tensor}.bias", f"{tensor}.running_mean"):
            if n in state:
                state[n].zero_()
        data = None if importance in ("l1", "l2") else batches(kind)
        plan = plan_pruning(program, kind="blocks", ratio=0.25, importance=importance, data=data)
        assert [b.name.startswith(name) for b in plan.blocks] == [True]
        assert oracle_error(program, plan.apply(program)) < 1e-6


def test_importance_by_data_does_not_depend_on_batches(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    from fxpress.frontend.batches import as_batches
    from fxpress.passes.prune.kinds.block_importance import block_importances

    program = programs[Tokens]
    data, blocks = torch.cat(batches(Tokens)), find_blocks(program)
    for importance in ("similarity", "change", "output"):
        scores = [
            block_importances(program, blocks, importance, as_batches(program, list(data.split(n)))) for n in (2, 5, 12)
        ]
        assert np.allclose(scores[0], scores[1], rtol=1e-5)
        assert np.allclose(scores[0], scores[2], rtol=1e-5)
        assert min(scores[0]) > 0


def test_blocks_that_share_parameters() -> None:
    """As ALBERT's layers, and a head tied to the embedding: what another block still reads stays, and counts once."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 16), nn.Linear(16, 11, bias=False)
            self.head.weight = self.table.weight
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.table(x)
            for layer in (self.a, self.a, self.b):
                y = y + torch.tanh(layer(y))
            return self.head(y)

    torch.manual_seed(0)
    program = fxpress.capture(Shared().eval(), (torch.arange(8).reshape(2, 4),))
    assert [set(b.tensors) for b in find_blocks(program)] == [set(), set(), {"b.weight", "b.bias"}]
    assert len({b.name for b in find_blocks(program)}) == 3
    for ratio in (0.34, 0.67, 1.0):
        check(program, plan_pruning(program, kind="blocks", ratio=ratio))


def test_block_budgets(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    program = programs[ConvNet]
    for budget in ("macs", "params"):
        plan = plan_pruning(program, kind="blocks", **{budget: 0.8})  # type: ignore[arg-type]
        pruned = check(program, plan)
        reached = {"macs": count_macs(pruned) / count_macs(program)}
        reached["params"] = pruned.parameter_count / program.parameter_count
        assert reached[budget] <= 0.8
        assert reached[budget] >= 0.79 or any("blocks are removed whole" in n for n in plan.notes)
    with pytest.raises(PruningError, match="cannot be reached by removing residual blocks"):
        plan_pruning(program, kind="blocks", macs=0.05)
    plan = plan_pruning(program, kind="blocks", ratio=0.99, exclude=["layers.0"])
    assert [b.name for b in plan.blocks] == ["layers.1", "layers.3"]
    with pytest.raises(PruningError, match="no residual block"):
        plan_pruning(programs[Perceptron], kind="blocks", ratio=0.5)


# -- options ------------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"kind": "filters", "ratio": 0.5}, "kind is 'filters'"),
    ({"kind": "unstructured"}, "either ratio or threshold"),
    ({"kind": "unstructured", "ratio": 0.5, "threshold": 0.1}, "either ratio or threshold"),
    ({"kind": "unstructured", "ratio": 1.5}, "ratio is 1.5"),
    ({"kind": "unstructured", "threshold": -1}, "threshold is -1"),
    ({"kind": "unstructured", "threshold": 0.1, "scope": "layer"}, "scope has no effect"),
    ({"kind": "unstructured", "ratio": 0.5, "scope": "network"}, "scope is 'network'"),
    ({"kind": "unstructured", "macs": 0.5}, "macs has no effect on kind=unstructured"),
    ({"kind": "unstructured", "ratio": 0.5, "round_to": 8}, "round_to has no effect"),
    ({"kind": "unstructured", "ratio": 0.5, "data": [torch.zeros(1)]}, "data has no effect"),
    ({"kind": "unstructured", "ratio": 0.5, "importance": "fpgm"}, "does not score single weights"),
    ({"kind": "unstructured", "ratio": 0.5, "exclude": ["nobody*"]}, "matches nothing"),
    ({"kind": "n:m", "pattern": "2:4", "ratio": 0.5}, "ratio has no effect on kind=n:m"),
    ({"kind": "blocks", "ratio": 0.5, "pattern": "2:4"}, "pattern has no effect on kind=blocks"),
    ({"kind": "blocks", "ratio": 0.5, "macs": 0.5}, "exactly one budget"),
    ({"kind": "blocks", "ratio": 0.5, "importance": "bn-scale"}, "does not score blocks"),
    ({"kind": "blocks", "ratio": 0.5, "data": [torch.randn(4, 3, 8, 8)]}, "reads only weights"),
    ({"kind": "blocks", "macs": 0.0}, "macs is 0.0"),
    ({"kind": "blocks", "ratio": 0.01}, "less than half a block"),
    ({"kind": "neurons", "ratio": 0.5, "pattern": "2:4"}, "pattern has no effect on kind=neurons"),
    ({"kind": "neurons", "ratio": 0.5, "threshold": 0.5}, "exactly one budget"),
    ({"kind": "neurons", "threshold": "much"}, "threshold is 'much'"),
    ({"ratio": 0.5, "threshold": 0.5}, "threshold has no effect on kind=channels"),
    ({"macs": 0.5, "pattern": "2:4"}, "pattern has no effect on kind=channels"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[m for _, m in BAD_OPTIONS])
def test_options_without_effect_are_errors(
    programs: dict[type[nn.Module], fxpress.Program], options: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        plan_pruning(programs[ConvNet], **options)  # type: ignore[arg-type]
    assert caught.value.hint


def test_importance_of_blocks_that_needs_data(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    with pytest.raises(DataError, match="needs data"):
        plan_pruning(programs[ConvNet], kind="blocks", ratio=0.5, importance="similarity")
    with pytest.raises(FxpressError):
        plan_pruning(programs[ConvNet], kind="blocks", ratio=0.5, importance="change", data=[torch.zeros(4, 5)])


def test_quantized_programs_are_refused(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    fused = run_passes(programs[ConvNet], "fuse-batchnorm")
    quantized = fxpress.quantize(fused, batches(ConvNet))
    for options in ({"kind": "unstructured", "ratio": 0.5}, {"kind": "n:m", "pattern": "2:4"}, {"kind": "blocks", "ratio": 0.5}):
        with pytest.raises(PruningError, match="quantized"):
            plan_pruning(quantized, **options)  # type: ignore[arg-type]


# -- plans --------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, object]] = {
    "unstructured": {"kind": "unstructured", "ratio": 0.5},
    "n:m": {"kind": "n:m", "pattern": "2:4"},
    "neurons": {"kind": "neurons", "ratio": 0.5},
    "blocks": {"kind": "blocks", "ratio": 0.25},
    "channels": {"macs": 0.7},
}


@pytest.mark.parametrize("kind", KINDS)
def test_plans_of_every_kind_are_kept_and_replayed(
    programs: dict[type[nn.Module], fxpress.Program], kind: str, tmp_path: Path
) -> None:
    plan = plan_pruning(programs[Tokens], **KINDS[kind])  # type: ignore[arg-type]
    plan.save(tmp_path / "plan.json")
    again, other = PruningPlan.load(tmp_path / "plan.json"), captured(Tokens, seed=9)
    assert again == plan
    check(other, again)
    if kind != "channels":
        assert f"kind={kind}" in repr(again)


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_kinds_combine_in_one_plan(programs: dict[type[nn.Module], fxpress.Program], first: str, second: str) -> None:
    program = programs[Tokens]
    plan = plan_pruning(program, **KINDS[first])  # type: ignore[arg-type]
    pruned = plan.apply(program)
    later = plan_pruning(pruned, **KINDS[second])  # type: ignore[arg-type]
    twice, merged = later.apply(pruned), plan.merge(later)
    once = check(program, merged)
    assert list(once.state_dict()) == list(twice.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values()))


def test_damaged_masks_are_refused(programs: dict[type[nn.Module], fxpress.Program], tmp_path: Path) -> None:
    plan = plan_pruning(programs[ConvNet], kind="unstructured", ratio=0.5)
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    good = dict(data["masks"][0])
    for key, value in (("kept", "no base64!"), ("kept", "AAAA"), ("shape", [2, 2]), ("shape", [0]), ("shape", [10**6, 10**6]), ("name", 3)):
        data["masks"][0] = {**good, key: value}
        (tmp_path / "bad.json").write_text(json.dumps(data))
        with pytest.raises(PruningError, match="is not a pruning plan"):
            PruningPlan.load(tmp_path / "bad.json")


def test_plans_for_another_model_are_refused(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    for options in (KINDS["unstructured"], KINDS["blocks"]):
        plan = plan_pruning(programs[ConvNet], **options)  # type: ignore[arg-type]
        for use in (plan.apply, plan.mask):
            with pytest.raises(PruningError, match="this model") as caught:
                use(programs[Tokens])
            assert caught.value.hint


def test_plans_say_what_makes_a_runtime_faster(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    program = programs[ConvNet]
    sparse = plan_pruning(program, kind="unstructured", ratio=0.5)
    assert "makes nothing faster" in repr(sparse)
    assert f"{sparse.zeros:,} of" in repr(sparse)
    blocks = plan_pruning(program, kind="blocks", ratio=0.99)
    assert "their MACs and time go" in repr(blocks)
    assert "round_to" in repr(plan_pruning(program, macs=0.7))
    assert "layers.0, layers.1" in repr(blocks)
    both = blocks.merge(plan_pruning(blocks.apply(program), kind="unstructured", ratio=0.5))
    assert len(both.effects) == 2


# -- passes -------------------------------------------------------------------------------------------------------


def test_every_kind_is_a_pass(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    for text in (
        "prune{kind=unstructured,ratio=0.5},verify-pruning",
        "prune{kind=n:m,pattern=2:4},verify-pruning",
        "prune{kind=neurons,threshold=0.3},verify-pruning",
        "prune{kind=blocks,ratio=0.5,exclude=[blocks.0]},verify-pruning",
    ):
        result = run_passes(programs[Tokens], text)
        assert any("equal to the masked original" in n for n in result.log[-1].notes)


def test_blocks_by_calibration_data_in_a_pipeline(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    context = Context(calibration=[(b,) for b in batches(ConvNet)])
    result = run_passes(programs[ConvNet], "prune{kind=blocks,ratio=0.3,importance=similarity}", context)
    assert len(context.results["prune"].blocks) == 1
    assert count_macs(result) < count_macs(programs[ConvNet])


def test_two_prune_passes_leave_one_plan(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    context, program = Context(), programs[ConvNet]
    text = "prune{macs=0.7},verify-pruning,prune{kind=blocks,ratio=0.3},prune{kind=unstructured,ratio=0.5},verify-pruning"
    result = run_passes(program, text, context)
    plan = context.results["prune"]
    assert plan.removals
    assert plan.blocks
    assert plan.masks
    assert plan.macs == (count_macs(program), count_macs(result))
    again = check(program, plan)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), result.state_dict().values()))
    assert any("merged with the plan" in n for n in result.log[-2].notes)


def test_prune_passes_around_a_pass_that_renames_parameters(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    context = Context()
    result = run_passes(programs[ConvNet], "prune{macs=0.7},fuse-batchnorm,prune{kind=unstructured,ratio=0.5},verify-pruning", context)
    assert any("not merged" in n for n in result.log[-2].notes)
    assert not context.results["prune"].removals


# -- zeros survive what comes after -------------------------------------------------------------------------------


def share_of_zeros(program: fxpress.Program, names: set[str]) -> float:
    """The share of zeros among the values of the weights whose layer is one of `names`, float or quantized."""
    found = [t for n, t in program.state_dict().items() if n.rpartition(".")[0] in names and t.ndim > 1]
    assert found
    return float(sum((t == 0).sum() for t in found) / sum(t.numel() for t in found))


@pytest.mark.parametrize("kind", ["unstructured", "n:m"])
def test_zeros_survive_fusion_and_quantization(programs: dict[type[nn.Module], fxpress.Program], kind: str) -> None:
    program = programs[ConvNet]
    sparse = plan_pruning(program, exclude=["stem"], **KINDS[kind]).apply(program)  # type: ignore[arg-type]
    layers = {f"layers.{i}.conv{j}" for i in range(4) for j in (1, 2)}
    before = share_of_zeros(sparse, layers)
    assert before >= 0.5 if kind == "n:m" else before > 0.4
    fused = run_passes(sparse, "cleanup,fuse-batchnorm")
    assert share_of_zeros(fused, layers) == before
    quantized = fxpress.quantize(fused, batches(ConvNet))
    stored = [t for t in quantized.state_dict().values() if t.dtype == torch.int8 and t.ndim > 1]
    wanted = [t for n, t in fused.state_dict().items() if t.ndim > 1]
    assert len(stored) == len(wanted)
    for a, b in zip(sorted(stored, key=lambda t: t.numel()), sorted(wanted, key=lambda t: t.numel())):
        assert a.numel() == b.numel()
        assert int((a == 0).sum()) >= int((b == 0).sum())


def test_zeros_survive_recovery(programs: dict[type[nn.Module], fxpress.Program]) -> None:
    from fxpress.passes.prune.recovery.recover import recover

    program = programs[ConvNet]
    plan = plan_pruning(program, macs=0.7)
    plan = plan.merge(plan_pruning(plan.apply(program), kind="unstructured", ratio=0.5))
    pruned = plan.apply(program)
    recovered = recover(pruned, batches(ConvNet), reference=program, plan=plan)
    for mask in plan.masks:
        assert torch.equal(zeros(recovered, mask.name), zeros(pruned, mask.name))
        assert zeros(pruned, mask.name).any()
