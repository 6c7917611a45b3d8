"""Importance criteria: what each promises, on every kind of network, whatever batches the data come in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.commands.passes import load_plugins
from fxpress.errors import DataError, FxpressError, OptionError, PruningError
from fxpress.frontend.sources import load_file
from fxpress.passes.base import Context
from fxpress.passes.manager import run_passes
from fxpress.passes.prune.groups import Group, find_groups
from fxpress.passes.prune.importance import registry as table
from fxpress.passes.prune.importance.criteria import Aggregate, Criterion, Normalize, Slices
from fxpress.passes.prune.importance.registry import criteria, register_importance
from fxpress.passes.prune.importance.scores import AGGREGATIONS, NORMALIZATIONS, Importance
from fxpress.passes.prune.masking import oracle_error
from fxpress.passes.prune.rules.table import analyze

WEIGHTS = [c.name for c in criteria().values() if not c.needs_data]
DATA = [c.name for c in criteria().values() if c.needs_data]
GRADIENTS = [c.name for c in criteria().values() if c.reads == "gradients"]


class ConvNet(nn.Module):
    """Two convolutions, with or without BatchNorm, pooled and classified."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, stride=2)
        self.norm1, self.norm2 = (nn.BatchNorm2d(n) if norm else nn.Identity() for n in (12, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted bottleneck on a residual stream, and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 24, 1)
        self.deep, self.norm = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24)
        self.shrink, self.grouped = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 16, 3, groups=4)
        self.head = nn.Linear(16 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.shrink(F.relu6(self.norm(self.deep(F.relu6(self.grow(x))))))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.grouped(x)), 2).flatten(1))


class Transformer(nn.Module):
    """A block with four heads over seven tokens; `batch_first=False` puts the examples into the second dimension."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(6, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x) if self.batch_first else self.embed(x.transpose(0, 1))
        return self.head(self.block(tokens).mean(1 if self.batch_first else 0))


class Recurrent(nn.Module):
    """An LSTM whose hidden size is pruned: its own weights sum over it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0].mean(1))


class Einsum(nn.Module):
    """Attention spelled by einsum, with a constant that one contraction reads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 3 * 24), nn.Linear(24, 5)
        self.table = nn.Parameter(torch.randn(7, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 6)) for t in self.qkv(x).chunk(3, dim=-1))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.out((torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2) + self.table).mean(1))


NETWORKS = {
    "cnn with BatchNorm": (lambda: ConvNet(True), (3, 8, 8)),
    "cnn without BatchNorm": (lambda: ConvNet(False), (3, 8, 8)),
    "depthwise": (Depthwise, (3, 8, 8)),
    "lstm": (Recurrent, (7, 6)),
    "einsum": (Einsum, (7, 6)),
    "transformer": (Transformer, (7, 6)),
    "transformer, batch second": (lambda: Transformer(False), (7, 6)),
}


def captured(name: str) -> fxpress.Program:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return fxpress.capture(model, (torch.randn(2, *shape),))


def examples(program: fxpress.Program, count: int = 48) -> torch.Tensor:
    shape = program.example_inputs[0].shape[1:]
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> fxpress.Program:
    return captured(request.param)


@pytest.fixture(scope="module")
def plain() -> fxpress.Program:
    return captured("cnn without BatchNorm")


def data_for(name: str, program: fxpress.Program) -> object:
    return examples(program).split(16) if name in DATA else None


def scores(program: fxpress.Program, name: str, **options: object) -> dict[str, np.ndarray]:
    """First place of each group -> the importance of its literals."""
    if name in DATA:
        options.setdefault("data", examples(program).split(16))
    analysis = analyze(program)
    groups = find_groups(analysis)
    found = Importance.checked(name, **options).of(analysis, groups)  # type: ignore[arg-type]
    return {str(g.places[0]): found[g.literals] for g in groups}


def with_weights(program: fxpress.Program, **values: object) -> fxpress.Program:
    """A copy in which each function changes the tensor of that name (dots as double underscores)."""
    copy = program.copy()
    for name, change in values.items():
        change(copy.state_dict()[name.replace("__", ".")])  # type: ignore[operator]
    return copy


# -- every criterion, every network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WEIGHTS, *DATA])
def test_every_criterion_plans_for_every_network(network: fxpress.Program, name: str) -> None:
    """The plan meets its budget and the oracle, or the criterion says that it has nothing to say."""
    has_norm = any("batch_norm" in str(n.target) for n in network.graph.nodes)
    options = {"importance": name, "macs": 0.8 if name == "bn-scale" else 0.6, "data": data_for(name, network)}
    if name == "bn-scale" and not has_norm:
        with pytest.raises(OptionError, match="says nothing about any group"):
            fxpress.plan_pruning(network, **options)  # type: ignore[arg-type]
        return
    plan = fxpress.plan_pruning(network, **options)  # type: ignore[arg-type]
    assert plan.removals
    assert plan.macs[1] <= options["macs"] * plan.macs[0]  # type: ignore[operator]
    assert oracle_error(plan.mask(network), plan.apply(network)) <= 1e-9


def test_groups_without_a_norm_are_kept_by_bn_scale_and_named() -> None:
    program = captured("depthwise")
    plan = fxpress.plan_pruning(program, macs=0.8, importance="bn-scale")
    assert any("says nothing about" in note for note in plan.notes)
    assert {r.name for r in plan.removals} >= {"deep.weight", "norm.weight"}
    assert "stem.weight" not in {r.name for r in plan.removals}


@pytest.mark.parametrize("name", DATA)
def test_the_split_into_batches_does_not_matter(network: fxpress.Program, name: str) -> None:
    inputs = examples(network)
    expected = scores(network, name, data=[inputs])
    for size in (7, 40):
        found = scores(network, name, data=inputs.split(size))
        for place, values in expected.items():
            np.testing.assert_allclose(found[place], values, rtol=1e-3, atol=1e-6 * values.max())


def test_memory_does_not_grow_with_the_data(plain: fxpress.Program) -> None:
    """Batches are read one by one, and none is kept."""
    alive: list[int] = []

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            alive.append(-1)

    def batches() -> Iterator[torch.Tensor]:
        for seed in range(20):
            alive.append(1)
            assert sum(alive) <= 4
            yield torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).as_subclass(Counted)

    for name in DATA:
        alive.clear()
        scores(plain, name, data=batches)
        assert len(alive) >= 20


# -- what criteria promise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in (*WEIGHTS, *DATA) if n not in ("random", "bn-scale", "fpgm")])
def test_a_channel_that_is_zero_everywhere_goes_first(plain: fxpress.Program, name: str) -> None:
    program = with_weights(
        plain,
        conv1__weight=lambda w: w[5].zero_(),
        conv1__bias=lambda b: b[5].zero_(),
        conv2__weight=lambda w: w[:, 5].zero_(),
    )
    found = scores(program, name)["conv1.weight[0]"]
    assert found.argmin() == 5
    assert found[5] <= 1e-9 * np.median(found)


def test_a_norm_scale_that_is_zero_goes_first_by_bn_scale() -> None:
    program = with_weights(captured("cnn with BatchNorm"), norm1__weight=lambda w: w[3].zero_())
    found = scores(program, "bn-scale")["conv1.weight[0]"]
    assert found.argmin() == 3
    assert found[3] == 0


def test_a_layer_of_zeros_goes_before_any_other(plain: fxpress.Program) -> None:
    program = with_weights(plain, conv1__bias=lambda b: b.fill_(-1e3))
    for name in ("wanda", "reconstruction"):  # "compensated" finds that the constant outputs need no channel at all
        found = scores(program, name)
        assert (found["conv1.weight[0]"] == 0).all()
        assert found["conv2.weight[0]"].max() > 0


@pytest.mark.parametrize("name", DATA)
def test_a_channel_that_never_fires_goes_first(plain: fxpress.Program, name: str) -> None:
    """Only data tell: its weights are as large as any."""
    program = with_weights(plain, conv1__bias=lambda b: b[2].fill_(-1e3))
    found = scores(program, name)["conv1.weight[0]"]
    assert found.argmin() == 2
    assert found[2] == 0
    assert scores(program, "l2")["conv1.weight[0]"].argmin() != 2


def twins(w: torch.Tensor) -> None:
    w[7] = w[1]


def test_a_duplicated_channel_goes_first_where_others_may_take_over(plain: fxpress.Program) -> None:
    """Its readers' weights differ, so that only least squares sees that one of the two is not needed."""
    program = with_weights(plain, conv1__weight=twins, conv1__bias=twins)
    found = scores(program, "compensated")["conv1.weight[0]"]
    assert set(np.argsort(found)[:2]) == {1, 7}
    others = np.delete(found, [1, 7])
    assert found[[1, 7]].max() < 0.05 * others.min()
    assert scores(program, "reconstruction")["conv1.weight[0]"][[1, 7]].min() > 0.05 * np.median(others)


def test_a_constant_channel_costs_nothing_where_the_bias_may_take_over(plain: fxpress.Program) -> None:
    program = with_weights(plain, conv1__weight=lambda w: w[4].zero_(), conv1__bias=lambda b: b[4].fill_(2.0))
    found = scores(program, "compensated")["conv1.weight[0]"]
    assert found.argmin() == 4
    assert found[4] < 0.01 * np.median(found)
    assert scores(program, "reconstruction")["conv1.weight[0]"].argmax() == 4


def test_what_lies_amid_the_others_goes_first_by_fpgm() -> None:
    model = nn.Sequential(nn.Conv2d(1, 5, 1, bias=False), nn.ReLU(), nn.Conv2d(5, 2, 1, bias=False))
    with torch.no_grad():
        model[0].weight[:, 0, 0, 0] = torch.tensor([1.0, 3.0, 2.0, -4.0, 8.0])
        model[2].weight.fill_(1.0)
    program = fxpress.capture(model.eval(), (torch.randn(2, 1, 4, 4),))
    assert scores(program, "fpgm")["0.weight[0]"].argmin() == 2


@pytest.mark.parametrize("name", ["l1", "l2", "fpgm", "lamp", "wanda", "reconstruction", "compensated"])
@given(exponent=st.integers(-6, 6))
@settings(max_examples=4, deadline=None)
def test_the_scale_of_a_layer_does_not_matter(plain: fxpress.Program, name: str, exponent: int) -> None:
    """A layer twice as large counts like before: normalization makes layers comparable."""
    scaled = with_weights(plain, conv2__weight=lambda w: w.mul_(2.0**exponent), conv2__bias=lambda b: b.mul_(2.0**exponent))
    expected, found = scores(plain, name), scores(scaled, name)
    for place in expected:
        np.testing.assert_allclose(found[place], expected[place], rtol=1e-3)


@pytest.mark.parametrize("name", ["reconstruction", "compensated", *GRADIENTS])
@given(exponents=st.lists(st.integers(-4, 4), min_size=12, max_size=12))
@settings(max_examples=4, deadline=None)
def test_data_criteria_do_not_see_how_a_channel_is_written(plain: fxpress.Program, name: str, exponents: list[int]) -> None:
    """A channel times s, and what reads it divided by s, is the same function (ReLU is homogeneous)."""
    scales = 2.0 ** torch.tensor(exponents)
    written = with_weights(
        plain,
        conv1__weight=lambda w: w.mul_(scales[:, None, None, None]),
        conv1__bias=lambda b: b.mul_(scales),
        conv2__weight=lambda w: w.div_(scales[:, None, None]),
    )
    expected, found = scores(plain, name), scores(written, name)
    for place in expected:
        np.testing.assert_allclose(found[place], expected[place], rtol=1e-3)


# -- against what can be computed directly --------------------------------------------------------------------------


def without(program: fxpress.Program, group: Group, literal: int, inputs: torch.Tensor) -> torch.Tensor:
    """The outputs of the program without one channel of a group, from the oracle."""
    from fxpress.passes.prune.masking import mask_program
    from fxpress.passes.prune.slicing import Cut

    copy = program.copy()
    analysis = analyze(copy)
    keep = np.ones(analysis.atoms.count, dtype=bool)
    keep[group.literals[literal]] = False
    mask_program(Cut(analysis, keep))
    return copy.run_flat((inputs,))[0]


def test_reconstruction_is_the_error_at_the_consumer() -> None:
    """Against the consumer's output computed without the channel: a convolution with padding and stride."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3, stride=2, padding=1)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), conv).eval()
    program, x = fxpress.capture(model, (torch.randn(2, 2, 9, 9),)), torch.randn(1500, 2, 9, 9)
    found = scores(program, "reconstruction", data=x.split(100), normalize="none")["0.weight[0]"]
    with torch.no_grad():
        hidden, whole = model[:2](x), model(x)
        for channel, score in enumerate(found):
            part = torch.zeros_like(hidden)
            part[:, channel] = hidden[:, channel]
            error = (F.conv2d(part, conv.weight, stride=2, padding=1)).square().sum() / whole.square().sum()
            assert score == pytest.approx(float(error), rel=0.1, abs=1e-3)  # four random projections for each example
        assert np.median(found) > 1e-2


def test_hessian_predicts_the_change_of_the_outputs() -> None:
    """In a network that is linear after its only hidden layer the prediction is exact, up to the random projections."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 4)).eval()
    program, x = fxpress.capture(model, (torch.randn(2, 5),)), torch.randn(4000, 5)
    found = scores(program, "hessian", data=x.split(500), normalize="none")["0.weight[0]"]
    analysis = analyze(program)
    (group,) = find_groups(analysis)
    whole = program.run_flat((x,))[0]
    for literal, score in enumerate(found):
        change = (without(program, group, literal, x) - whole).square().sum() / whole.square().sum()
        assert 2 * score == pytest.approx(float(change), rel=0.1)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_gives_the_gradients_of_its_examples(plain: fxpress.Program, reduction: str) -> None:
    """Gates by hand: a factor on the only operand that holds the channel, differentiated example by example."""
    inputs, labels = examples(plain, 20), torch.arange(20) % 5
    model = ConvNet(False).eval()
    model.load_state_dict(plain.state_dict())
    gates = torch.ones(20, 12, requires_grad=True)
    hidden = F.relu(model.conv1(inputs)) * gates[:, :, None, None]
    F.cross_entropy(model.head(F.relu(model.conv2(hidden)).mean((2, 3))), labels, reduction="sum").backward()
    loss = lambda outputs, answers: F.cross_entropy(outputs, answers, reduction=reduction)  # noqa: E731
    for size in (20, 6):
        data = list(zip(inputs.split(size), labels.split(size)))
        for name, expected in (("taylor", gates.grad.abs().mean(0).square()), ("hessian", gates.grad.square().mean(0) / 2)):
            found = scores(plain, name, data=data, loss=loss, normalize="none")["conv1.weight[0]"]
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3)


def test_wanda_is_norm_times_magnitude() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 4)).eval()
    program, x = fxpress.capture(model, (torch.randn(2, 5),)), torch.randn(200, 5)
    found = scores(program, "wanda", data=x.split(50), normalize="none")["0.weight[0]"]
    with torch.no_grad():
        expected = model[:2](x).square().mean(0).sqrt() * model[2].weight.abs().sum(0)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


# -- aggregation and normalization ----------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", AGGREGATIONS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_every_aggregation_and_normalization_plans(
    plain: fxpress.Program, aggregate: Aggregate, normalize: Normalize
) -> None:
    plan = fxpress.plan_pruning(plain, macs=0.6, aggregate=aggregate, normalize=normalize)
    assert plan.macs[1] <= 0.6 * plan.macs[0]


@given(values=st.lists(st.floats(0.01, 100), min_size=2, max_size=9, unique=True), scale=st.floats(0.01, 100))
def test_normalizations_keep_the_order_and_drop_the_scale(values: list[float], scale: float) -> None:
    scores = np.array(values)
    for name, normalize in NORMALIZATIONS.items():
        assert (np.diff(normalize(scores)[np.argsort(scores)]) >= -1e-12).all(), name
        if name not in ("none", "cost"):
            np.testing.assert_allclose(normalize(scores * scale), normalize(scores), rtol=1e-6)


def test_lamp_is_the_share_of_what_is_no_smaller() -> None:
    np.testing.assert_allclose(NORMALIZATIONS["lamp"](np.array([3.0, 1.0, 4.0])), [3 / 7, 1 / 8, 1])


def test_cost_divides_by_what_the_budget_saves(plain: fxpress.Program) -> None:
    raw, per_cost = (scores(plain, "l2", normalize=n) for n in ("none", "cost"))
    factors = {place: per_cost[place] / raw[place] for place in raw}
    assert all(np.ptp(f) < 1e-9 * f.max() for f in factors.values())
    first, second = (float(f[0]) for f in factors.values())
    # conv1 [12, 3, 3, 3] at 8x8 and conv2 [16, 12, 3, 3] at 3x3: MACs that one channel of each saves.
    saved = (3 * 9 * 64 + 16 * 9 * 9, 12 * 9 * 9 + 5)
    assert second / first == pytest.approx(saved[0] / saved[1])
    by_parameters = [fxpress.plan_pruning(plain, params=0.5, normalize=n).removals for n in ("none", "cost")]
    assert by_parameters[0] != by_parameters[1]


# -- errors ---------------------------------------------------------------------------------------------------------


def cross_entropy(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, labels)


X = torch.randn(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"importance": "tailor"}, OptionError, "did you mean taylor"),
        ({"importance": "l2", "data": [X]}, OptionError, "reads only weights"),
        ({"importance": "taylor"}, OptionError, "needs data"),
        ({"importance": "wanda", "data": [X], "loss": cross_entropy}, OptionError, "loss has no effect"),
        ({"importance": "l2", "loss": cross_entropy}, OptionError, "loss has no effect"),
        ({"importance": "taylor", "data": [X], "aggregate": "sum"}, OptionError, "aggregate has no effect"),
        ({"aggregate": "median"}, OptionError, "mean, sum, max, prod"),
        ({"normalize": "median"}, OptionError, "gaussian"),
        ({"importance": "taylor", "data": [X], "loss": cross_entropy}, DataError, "no labels"),
        ({"importance": "taylor", "data": [(X, torch.zeros(3).long())], "loss": cross_entropy}, DataError, "3 labels"),
        ({"importance": "taylor", "data": []}, DataError, "no examples"),
        ({"importance": "taylor", "data": [X[:, :2]]}, DataError, "shape"),
        ({"importance": "taylor", "data": [(X, torch.zeros(4).long())], "loss": lambda y, t: 1.0}, OptionError, "loss gave"),
        ({"importance": "taylor", "data": [(X, torch.zeros(4).long())], "loss": lambda y, t: y.sum() / 0}, DataError, "NaN"),
    ],
)  # fmt: skip
def test_bad_options_say_what_to_do(plain: fxpress.Program, options: dict, error: type[FxpressError], text: str) -> None:
    with pytest.raises(error) as caught:
        fxpress.plan_pruning(plain, macs=0.5, **options)
    assert text in str(caught.value)
    assert caught.value.hint


# -- one's own ------------------------------------------------------------------------------------------------------


@pytest.fixture
def clean_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_REGISTERED", {})


@pytest.mark.usefixtures("clean_table")
def test_one_function_is_a_new_importance(plain: fxpress.Program) -> None:
    @register_importance("largest")
    def largest(slices: Slices) -> torch.Tensor:
        """Magnitude of the largest weight."""
        return slices.values.abs().amax(dim=1)

    assert criteria()["largest"].summary == "Magnitude of the largest weight."
    assert fxpress.plan_pruning(plain, macs=0.5, importance="largest").request.endswith("importance=largest")
    with pytest.raises(OptionError, match="'largest' already"):
        register_importance("largest")(lambda slices: slices.values.sum(dim=1))
    with pytest.raises(OptionError, match="'l2' already"):
        register_importance("l2")(largest)
    with pytest.raises(OptionError, match="reads is 'stars'"):
        register_importance("other", reads="stars")  # type: ignore[arg-type]


@pytest.mark.usefixtures("clean_table")
@pytest.mark.parametrize("result", [None, torch.zeros(3), torch.tensor(float("nan"))])
def test_an_importance_that_gives_nonsense_is_told_so(plain: fxpress.Program, result: torch.Tensor | None) -> None:
    def odd(slices: Slices) -> torch.Tensor | None:
        return result.expand(len(slices.values)) if result is not None and result.ndim == 0 else result

    register_importance("odd")(odd)  # type: ignore[arg-type]
    with pytest.raises(PruningError, match="importance 'odd' gave"):
        fxpress.plan_pruning(plain, macs=0.5, importance="odd")


@pytest.mark.usefixtures("clean_table")
def test_the_example_is_a_plugin(tmp_path: Path) -> None:
    source = Path(__file__).resolve().parents[1] / "examples" / "custom_importance.py"
    copy = tmp_path / "custom_importance.py"  # loaded anew, whatever other tests loaded
    copy.write_text(source.read_text())
    load_plugins([copy])
    assert {"entropy", "variance"} <= set(criteria())
    plans = load_file(copy).main()
    assert [p.request.split(", ")[-1] for p in plans] == ["importance=entropy", "importance=variance"]


def test_every_built_in_criterion_names_its_source() -> None:
    for criterion in criteria().values():
        assert isinstance(criterion, Criterion)
        assert criterion.name == "random" or any(year in str(criterion.function.__doc__) for year in ("19", "20"))


# -- in a pipeline --------------------------------------------------------------------------------------------------


def test_the_pass_takes_the_calibration_data(plain: fxpress.Program) -> None:
    data = [(x,) for x in examples(plain).split(16)]
    context = Context(calibration=data)
    run_passes(plain, "prune{macs=0.5,importance=reconstruction,normalize=max,aggregate=mean}", context)
    expected = fxpress.plan_pruning(
        plain, macs=0.5, importance="reconstruction", normalize="max", aggregate="mean", data=data
    )
    assert context.results["prune"].removals == expected.removals
    with pytest.raises(OptionError, match="needs data"):
        run_passes(plain, "prune{macs=0.5,importance=reconstruction}", Context())
    run_passes(plain, "prune{macs=0.5,importance=l1}", context)  # which has no use for them


def test_a_program_in_training_mode_is_judged_in_evaluation_mode() -> None:
    program = captured("cnn with BatchNorm")
    expected = scores(program, "hessian")
    training = program.copy().train()
    found = scores(training, "hessian")
    assert training.training
    for place in expected:
        np.testing.assert_allclose(found[place], expected[place], rtol=1e-5)
    assert torch.equal(training.state_dict()["norm1.running_mean"], program.state_dict()["norm1.running_mean"])


def test_a_fixed_batch_is_one_example() -> None:
    program = fxpress.capture(ConvNet(True).eval(), (torch.randn(4, 3, 8, 8),), dynamic_batch=False)
    for name in DATA:
        plan = fxpress.plan_pruning(program, macs=0.6, importance=name, data=[torch.randn(4, 3, 8, 8) for _ in range(5)])
        assert plan.removals
