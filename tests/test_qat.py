"""Fake quantization: its arithmetic and gradients, that it trains, and that it folds into what it simulated."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

import fxpress
from fxpress.backends.targets import load_target
from fxpress.demo import DigitNet, load_digits
from fxpress.errors import OptionError, QuantizationError
from fxpress.frontend.learned_steps import backward, gradient_scale
from fxpress.frontend.operators import declare_operators, dequantize, quantize
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager, op_counts
from fxpress.passes.quantize.fake_quant import FakeQuantize
from fxpress.passes.rewrite import find
from fxpress.runtime.layers import check_layers
from fxpress.training.distill import Distillation
from fxpress.training.distill_terms import SoftLabels
from fxpress.training.objectives import Batch, CrossEntropy
from fxpress.training.options import AdamW, TrainingOptions
from fxpress.training.qat import Simulation, train_simulated

TARGET = load_target("ort-x86")
FUSED = "cleanup,canonicalize,fuse-batchnorm"
KEPT = "cleanup,canonicalize,fuse-batchnorm{keep=true}"
OBSERVED = "annotate,observe{ranges=mse},calibrate"


class Net(nn.Module):
    """Stem with ReLU6, depthwise with SiLU, a gate, a padded shortcut, concat, max pool, pool, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.SiLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.wide = nn.Conv2d(8, 12, 3, 1, 1)
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depthwise(x)
        x = x + y * self.gate(y)
        shortcut = F.pad(x, (0, 0, 0, 0, 2, 2))
        x = torch.cat([torch.relu(self.norm(self.wide(x)) + shortcut), x], 1)
        return self.head(F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1).flatten(1))


def data(count: int = 4, size: int = 8) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(size, 3, 16, 16, generator=generator),) for _ in range(count)]


def captured(module: nn.Module | None = None) -> fxpress.Program:
    torch.manual_seed(0)
    module = module or Net()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, -1.5, 1.5)
            nn.init.normal_(m.bias)
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return fxpress.capture(module.eval(), torch.randn(2, 3, 16, 16))


def run(program: fxpress.Program, pipeline: str, target=TARGET) -> fxpress.Program:
    return PassManager(pipeline).run(program, Context(target=target, calibration=data()))


def faked(module: nn.Module | None = None, options: str = "", prepare: str = KEPT) -> fxpress.Program:
    return run(captured(module), f"{prepare},{OBSERVED},fake-quantize{options}")


def train(program: fxpress.Program, steps: int = 8, rate: float = 0.05) -> fxpress.Program:
    """A few steps with labels drawn at random: enough to move everything."""
    generator = torch.Generator().manual_seed(1)
    parameters = [p for p in program.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    program.train()
    for _ in range(steps):
        x = torch.randn(16, 3, 16, 16, generator=generator)
        loss = F.cross_entropy(program(x), torch.randint(5, (16,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return program.eval()


# -- the operator --------------------------------------------------------------------------------------------------


@given(
    scale=st.floats(2.0**-13, 16, width=32),
    zero_point=st.integers(0, 255),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=60)
def test_it_is_dequantize_of_quantize_to_the_last_bit(scale, zero_point, seed):
    declare_operators()
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * scale * 200
    x[:20] = (torch.arange(20) - 10 + 0.5) * scale  # ties
    want = dequantize(quantize(x, scale, zero_point, torch.uint8), scale, zero_point)
    got = torch.ops.fxpress.fake_quantize(x, torch.tensor(scale), torch.tensor(float(zero_point)), 0, 255)
    assert torch.equal(got, want)


def straight_through(x, scale, zero_point, qmin, qmax):
    """The same function from differentiable parts: rounding passes gradients, clamping stops them."""
    z = zero_point + (zero_point.round() - zero_point).detach()
    v = x / scale
    c = torch.minimum(torch.maximum(v, qmin - z), qmax - z)
    return (c + (c.round() - c).detach()) * scale


@pytest.mark.parametrize("axis", [None, 0])
def test_gradients_are_those_of_lsq(axis):
    declare_operators()
    torch.manual_seed(0)
    x = (torch.randn(6, 5, 4, dtype=torch.float64) * 3).requires_grad_(True)
    shape = [] if axis is None else [6]
    scale = torch.full(shape, 0.3, dtype=torch.float64).mul_(torch.rand(shape) + 0.5).requires_grad_(True)
    zero_point = torch.tensor(3.2 if axis is None else 0.0, dtype=torch.float64, requires_grad=axis is None)
    out = torch.ops.fxpress.fake_quantize(x, scale, zero_point, -4, 7, axis)
    weights = torch.randn_like(out)
    inputs = [x, scale, zero_point] if axis is None else [x, scale]
    got = torch.autograd.grad((out * weights).sum(), inputs)
    reference = straight_through(x, scale if axis is None else scale.reshape(-1, 1, 1), zero_point, -4, 7)
    assert torch.allclose(out, reference)
    want = torch.autograd.grad((reference * weights).sum(), inputs)
    balance = gradient_scale(x, scale, 7.0 if axis is None or axis == 0 else 4.0, axis)
    assert torch.allclose(got[0], want[0])
    size = scale.detach()
    assert torch.allclose(got[1] * size, torch.tanh(want[1] * balance / size))
    if axis is None:
        assert torch.allclose(got[2] * 11, torch.tanh(want[2] * balance / (size**2 * 11)))
    assert backward.__doc__


@pytest.mark.parametrize(("qmin", "qmax"), [(0, 15), (-7, 7), (0, 255), (-32768, 32767)])
def test_the_limits_themselves_are_inside(qmin, qmax):
    """The largest weight of a channel is at its limit, where the scale comes from it: it must go on learning."""
    declare_operators()
    beyond = torch.tensor([qmin - 0.01, qmin, 0.3, qmax, qmax + 0.01]) * torch.tensor([1 + 1e-4, 1, 1, 1, 1 + 1e-4])
    x = beyond.clone().requires_grad_(True)
    torch.ops.fxpress.fake_quantize(x, torch.ones(()), torch.zeros(()), qmin, qmax).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_the_gradient_scale_counts_values_of_one_example_or_one_channel():
    activation, weight = torch.zeros(8, 4, 5, 5), torch.zeros(6, 3, 2, 2)
    assert gradient_scale(activation, torch.ones(()), 255, None) == pytest.approx((100 * 255) ** -0.5)
    assert gradient_scale(weight, torch.ones(6), 127, 0) == pytest.approx((12 * 127) ** -0.5)
    assert gradient_scale(weight, torch.ones(1), 127, 0) == pytest.approx((72 * 127) ** -0.5)


# -- the program ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prepare", "target"), [(FUSED, "ort-x86"), (KEPT, "ort-x86"), (KEPT, "ort-arm"), (KEPT, "ort-x86-avx2")]
)
def test_untrained_it_folds_into_what_calibration_alone_gives(prepare, target):
    """BatchNorm kept or not: the integers are the same. So are they on every kind of number."""
    table, program = load_target(target), captured()
    fake = run(program, f"{prepare},{OBSERVED},fake-quantize{{weights=minmax}}", table)
    assert ("aten.batch_norm.default" in op_counts(fake)) == (prepare == KEPT)
    folded = run(fake, "fold-fake-quantize", table)
    calibrated = run(program, f"{FUSED},{OBSERVED},fold", table)
    assert op_counts(folded) == op_counts(calibrated)
    (x,) = data(1)[0]
    assert torch.equal(folded(x), calibrated(x))


def simulated_values(fake: fxpress.Program, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each fake quantization of an activation gives, by the name of the float program's node."""
    found: dict[str, torch.Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            site = (n.meta.get("custom") or {}).get("fake_quantized", {}).get("site")
            if site:
                found[site["layer"]] = value.detach()
            return value

    Watch(fake.graph_module).run(x)
    return found


def integer_steps(folded: fxpress.Program, x: torch.Tensor, simulated: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By how many steps each tensor of the integer program differs from the simulated one, fed the simulated inputs."""
    steps: dict[str, torch.Tensor] = {}

    class Forced(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.target is torch.ops.fxpress.quantize.default:
                layer = n.meta["custom"]["layer"]
                want = quantize(simulated[layer], *n.args[1:])
                steps[layer] = (value.int() - want.int()).abs()
                return want
            return value

    Forced(folded.graph_module).run(x)
    return steps


@pytest.mark.parametrize(
    ("prepare", "options"), [(FUSED, ""), (KEPT, "{learn_zero_points=true}"), (KEPT, "{learn_scales=false}")]
)
def test_trained_it_folds_into_what_it_simulated(prepare, options):
    plain = dataclasses.replace(TARGET, stem_blocks=False)  # which would quantize x elsewhere
    fake = train(run(captured(), f"{prepare},{OBSERVED},fake-quantize{options}", plain), rate=0.01)
    folded = run(fake, "fold-fake-quantize", plain)
    (x,) = data(1, 16)[0]
    simulated = simulated_values(fake, x)
    steps = integer_steps(folded, x, simulated)
    assert steps.keys() == simulated.keys()
    for layer, differences in steps.items():
        assert differences.max() <= 1, layer
        assert (differences == 0).float().mean() > 0.98, layer
    largest = fake(x).abs().max()
    assert (fake(x) - folded(x)).abs().max() < 0.02 * largest
    parity = check_layers(folded, (x,))
    assert parity.max_steps <= 1
    assert parity.kept


def test_everything_is_trained():
    fake = faked(options="{learn_zero_points=true}")
    before = {n: t.clone() for n, t in fake.state_dict().items()}
    train(fake)
    still = {n for n, t in fake.state_dict().items() if torch.equal(t, before[n])}
    assert not [n for n, _ in fake.named_parameters() if n in still and not n.endswith((".bias", ".shift"))]
    moved = {n for n in before if n not in still}
    assert {"stem.0.weight", "stem.0.weight_log_change", "stem.1.running_mean", "stem.1.weight", "wide.weight"} <= moved
    assert any(n.endswith(".shift") for n in moved)
    names = dict(fake.named_parameters())
    assert "fake_quantize.sigmoid.log_change" not in names, "a range that is known beforehand is not learned"
    assert "fake_quantize.relu.shift" not in names, "what a ReLU cuts off must stay the smallest number"


def test_the_range_of_an_absorbed_activation_stays_within_its_bound():
    fake = faked()
    with torch.no_grad():
        dict(fake.named_parameters())["fake_quantize.hardtanh.log_change"].fill_(1.0)
    folded = run(fake, "fold-fake-quantize")
    assert "aten.hardtanh.default" not in op_counts(folded)
    nodes = {(n.meta.get("custom") or {}).get("layer"): n for n in folded.graph.nodes}
    assert nodes["hardtanh"].args[1] == pytest.approx(6 / 255)


@pytest.mark.parametrize("change", [-200.0, 200.0])
def test_scales_that_training_throws_far_away_leave_finite_numbers(change):
    fake = faked()
    with torch.no_grad():
        for name, parameter in fake.named_parameters():
            if name.endswith("log_change") and ("wide" in name or "relu" in name):
                parameter.fill_(change)
    (x,) = data(1)[0]
    assert torch.isfinite(fake(x)).all()
    assert torch.isfinite(run(fake, "fold-fake-quantize")(x)).all()


def test_a_changed_layer_keeps_its_change_and_no_batchnorm():
    """What was remembered is only put back into the layer that fusing left."""
    program = run(captured(), KEPT)
    with torch.no_grad():
        dict(program.named_parameters())["wide.weight"].mul_(1.5)
    fake = run(program, f"{OBSERVED},fake-quantize")
    assert op_counts(fake)["aten.batch_norm.default"] == 2
    (x,) = data(1)[0]
    error = (fake(x) - program(x)).pow(2).mean() / program(x).pow(2).mean()
    assert error < 0.01


def test_shared_weights_and_parts_of_a_split():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(2, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(torch.relu(self.conv(x) * 4))
            first, second = x.split([2, 1], 1)
            return torch.tanh(self.last(first) + second).mean((2, 3))

    fake = faked(Shared())
    parameters = [p for p in fake.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.05)
    fake.train()
    for (x,) in data():
        optimizer.zero_grad()
        fake(x).pow(2).sum().backward()
        optimizer.step()
    folded = run(fake.eval(), "fold-fake-quantize")
    (x,) = data(1)[0]
    assert torch.allclose(folded(x), fake(x), atol=0.02)
    assert check_layers(folded, (x,)).kept


class SharedConv(nn.Module):
    """A convolution that is used twice, each time with a BatchNorm of its own, as in the heads of detectors."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1, bias=bias)
        self.one, self.two, self.head = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        near, far = torch.relu(self.one(self.conv(x))), torch.relu(self.two(self.conv(F.avg_pool2d(x, 2))))
        return self.head(near.mean((2, 3)) + far.mean((2, 3)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["tensorrt", "openvino"])
def test_a_norm_that_was_never_fused_stays(name, bias):
    target = load_target(name)
    fake = train(run(captured(SharedConv(bias)), f"{KEPT},{OBSERVED},fake-quantize", target), steps=4)
    folded = run(fake, "fold-fake-quantize", target)
    x = data()[0][0]
    assert len(list(find(folded, torch.ops.aten.batch_norm.default))) == 2, "as in quantize"
    assert torch.allclose(folded(x), fake(x), atol=0.02 * float(fake(x).detach().abs().max()))


def test_saved_and_loaded_it_trains_and_folds(tmp_path):
    fake = train(faked(), 2)
    fake.save(tmp_path / "fake.pt2")
    loaded = fxpress.Program.load(tmp_path / "fake.pt2")
    (x,) = data(1)[0]
    assert torch.equal(loaded(x), fake(x))
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in fake.named_parameters()}
    assert torch.equal(run(loaded, "fold-fake-quantize")(x), run(fake, "fold-fake-quantize")(x))
    train(loaded, 2)
    assert not torch.equal(loaded(x), fake(x))


def test_one_scale_per_layer():
    table = dataclasses.replace(TARGET, weight=dataclasses.replace(TARGET.weight, per_channel=False))
    program = captured()
    fake = train(run(program, f"{KEPT},{OBSERVED},fake-quantize", table))
    assert "aten.batch_norm.default" not in op_counts(fake)
    assert dict(fake.named_parameters())["wide.weight_log_change"].shape == (1,)
    folded = run(fake, "fold-fake-quantize", table)
    (x,) = data(1)[0]
    assert torch.allclose(folded(x), fake(x), atol=0.05)


# -- what it is for ------------------------------------------------------------------------------------------------


def test_few_bits_are_regained_by_training():
    """2-bit weights and 3-bit activations, after calibration alone and after a short training: ten points at least."""
    digits = load_digits()
    torch.manual_seed(0)
    labelled = (digits.inputs, digits.labels)
    program = fxpress.capture(DigitNet(width=12), digits.inputs[:2])
    program = fxpress.finetune(program, labelled, TrainingOptions(epochs=4, optimizer=AdamW(1e-2)))
    context = Context(target=TARGET, calibration=[(x,) for x in digits.inputs[:256].split(32)])
    narrow = "fake-quantize{weight_bits=2,activation_bits=3}"
    fake = PassManager(f"{KEPT},{OBSERVED},{narrow}").run(program, context)

    def accuracy(p: fxpress.Program) -> float:
        return float((p.run_flat((digits.held_out_inputs,))[0].argmax(1) == digits.held_out_labels).float().mean())

    calibrated = accuracy(fake)
    trained = accuracy(fxpress.finetune(fake, labelled, TrainingOptions(epochs=2, optimizer=AdamW(3e-3))))
    assert trained > calibrated + 0.1
    assert trained > accuracy(program) - 0.15


def captured_digits() -> tuple[fxpress.Program, tuple[torch.Tensor, torch.Tensor], list[tuple[torch.Tensor]]]:
    """A small network that reads digits, after one epoch; data to train it on and to calibrate it."""
    digits = load_digits()
    labelled = (digits.inputs[:512], digits.labels[:512])
    torch.manual_seed(0)
    program = fxpress.capture(DigitNet(width=12), digits.inputs[:2])
    program = fxpress.finetune(program, labelled, TrainingOptions(optimizer=AdamW(1e-2)))
    return program, labelled, [(x,) for x in digits.inputs[:128].split(32)]


def test_train_quantized_gives_integers_that_the_runtime_computes():
    program, labelled, calibration = captured_digits()
    seen = []
    int8 = fxpress.train_quantized(
        program, labelled, TrainingOptions(epochs=2), calibration=calibration, on_epoch=lambda p, n: seen.append(n)
    )
    assert seen == [0, 1]
    assert int8.state_dict()["stem.0.weight"].dtype is torch.int8
    assert [r.name for r in int8.log][-2:] == ["qat", "fold-fake-quantize"]
    assert check_layers(int8, (labelled[0][:16],)).kept


def norm_modes(program: fxpress.Program) -> set[bool]:
    return {n.args[5] for n in program.graph.nodes if "batch_norm" in str(n.target)}


class Written(nn.Module):
    """Weights that are computed, a product with a bias, and padding beside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        self.plain, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.plain(F.pad(torch.relu(self.conv(x)), (1, 1, 1, 1)))))
        return torch.addmm(self.bias, x.mean((2, 3)), self.weight)


def test_train_quantized_quantizes_what_quantize_does():
    program, batches = captured(Written()), data()
    trained = fxpress.train_quantized(program, (batches[0][0], torch.arange(8) % 5), calibration=batches)

    def integers(p: fxpress.Program) -> list[list[int]]:
        return [list(t.shape) for t in p.state_dict().values() if t.dtype == torch.int8]

    assert integers(trained) == integers(fxpress.quantize(program, batches))
    assert len(integers(trained)) == 3


def test_norms_freeze_at_their_step_and_train_again_afterwards():
    program, labelled, calibration = captured_digits()
    context = Context(target=TARGET, calibration=calibration)
    fake = PassManager(f"{KEPT},{OBSERVED},fake-quantize").run(program, context)
    modes = []

    def spy(program: fxpress.Program, batch: Batch) -> torch.Tensor:
        modes.append((batch.step, norm_modes(program)))
        return CrossEntropy()(program, batch)

    options = TrainingOptions(epochs=2, batch_size=128)
    trained = train_simulated(fake, labelled, options, None, Simulation(freeze=0.75), objective=spy).program
    assert modes == [(i, {i < 6}) for i in range(8)]
    assert norm_modes(trained) == {False}
    assert norm_modes(trained.train()) == {True}, "what is returned trains like any other"
    assert norm_modes(fake.train()) == {True}


def test_norms_freeze_at_their_share_of_what_is_trained_on():
    """Held-out examples make the training shorter; one that stops before the freeze point gets new statistics."""
    program, labelled, calibration = captured_digits()
    fake = PassManager(f"{KEPT},{OBSERVED},fake-quantize").run(program, Context(target=TARGET, calibration=calibration))
    shares = []

    def spy(program: fxpress.Program, batch: Batch) -> torch.Tensor:
        if program.training and norm_modes(program) == {False}:
            shares.append(batch.done)
        return CrossEntropy()(program, batch)

    options = TrainingOptions(epochs=4, batch_size=64, hold_out=0.5)
    train_simulated(fake, labelled, options, None, Simulation(freeze=0.75), objective=spy)
    assert shares[0] == 0.75
    early = TrainingOptions(epochs=4, hold_out=0.5, patience=1, optimizer=AdamW(1e-9), keep="last")
    with pytest.raises(OptionError, match="calibration data"):
        train_simulated(fake, labelled, early, None, Simulation(freeze=0.9))


def test_the_bound_on_a_scale_teaches_no_weight():
    """At first the scale is at its bound, max |W| / 127: the gradient of the weights is that of a fixed scale."""
    learned, fixed = faked(options="{weights=minmax}"), faked(options="{weights=minmax,learn_scales=false}")
    (x,) = data(1)[0]
    gradients = []
    for program in (learned, fixed):
        weights = {n: p for n, p in program.named_parameters() if n.endswith(".weight")}
        loss = program(x).square().sum()
        gradients.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())))))
    assert len(gradients[0]) > 1
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name


def test_scales_are_not_learned_from_a_scaled_loss():
    options, examples = TrainingOptions(precision="float16"), (torch.randn(8, 3, 16, 16), torch.zeros(8).long())
    with pytest.raises(OptionError, match="scaled up for float16"):
        train_simulated(faked(), examples, options, None)


def test_norms_that_were_never_frozen_get_new_statistics():
    program, labelled, calibration = captured_digits()
    context = Context(target=TARGET, calibration=calibration)
    fake = PassManager(f"{KEPT},{OBSERVED},fake-quantize").run(program, context)
    options = TrainingOptions(epochs=1, batch_size=128)
    runs = [
        train_simulated(fake, labelled, options, calibration, Simulation(freeze=None, reestimate=anew)).program
        for anew in (False, None)
    ]
    (plain, anew) = (r.state_dict() for r in runs)
    changed = {n for n in plain if not torch.equal(plain[n], anew[n])}
    assert changed == {n for n in plain if "running" in n}
    with pytest.raises(OptionError, match="calibration data"):
        train_simulated(fake, labelled, options, None, Simulation(freeze=None))


def test_distillation_and_simulation_compose():
    program, labelled, calibration = captured_digits()
    teaching = Distillation(program, program, [SoftLabels()], labels=0.1)
    int8 = fxpress.train_quantized(program, labelled, calibration=calibration, objective=teaching)
    agreement = (int8(labelled[0]).argmax(1) == program(labelled[0]).argmax(1)).float().mean()
    assert agreement > 0.9


# -- what can go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "error", "message"),
    [
        ("fold-fake-quantize", QuantizationError, "not fake-quantized"),
        (f"{FUSED},annotate,fake-quantize", QuantizationError, "no observers"),
        (f"{FUSED},annotate,observe{{ranges=mse}},fake-quantize", QuantizationError, "seen no data"),
        (f"{FUSED},{OBSERVED},fake-quantize{{weight_bits=1}}", OptionError, "weight_bits is 1"),
        (f"{FUSED},{OBSERVED},fake-quantize{{activation_bits=9}}", OptionError, "activation_bits is 9"),
        (f"{FUSED},{OBSERVED},fake-quantize{{full_width=[wide]}}", OptionError, "full_width has no effect"),
        (f"{FUSED},{OBSERVED},fake-quantize{{weight_bits=4,full_width=[nobody]}}", OptionError, "full_width: 'nobody'"),
        (f"{FUSED},{OBSERVED},fake-quantize{{learn_scales=false,learn_zero_points=true}}", OptionError, "no effect"),
        (f"{FUSED},{OBSERVED},fake-quantize{{activation_bits=4}},fold-fake-quantize", QuantizationError, "simulates"),
    ],
)
def test_mistakes_are_explained(pipeline, error, message):
    with pytest.raises(error, match=message) as caught:
        run(captured(), pipeline)
    assert "hint:" in str(caught.value)


def test_folding_for_another_target_is_refused():
    with pytest.raises(QuantizationError, match="simulates ort-x86, not ort-arm"):
        run(faked(), "fold-fake-quantize", load_target("ort-arm"))


def test_a_target_is_needed():
    with pytest.raises(QuantizationError, match="target"):
        PassManager([FakeQuantize()]).run(captured(), Context())


def limits_of(fake: fxpress.Program) -> dict[str, tuple[int, int]]:
    """The integer limits of each fake-quantized tensor, by the name of what it quantizes."""
    nodes = find(fake, torch.ops.fxpress.fake_quantize.default)
    return {str(n.args[0].target if n.args[0].op == "get_attr" else n.args[0].name): n.args[3:5] for n in nodes}


def test_named_layers_keep_the_width_of_the_target():
    narrow = limits_of(faked(options="{weight_bits=4,activation_bits=4}"))
    ends = limits_of(faked(options="{weight_bits=4,activation_bits=4,full_width=[wide]}"))
    assert set(narrow) == set(ends)
    changed = {name for name in narrow if narrow[name] != ends[name]}
    assert "wide.weight" in changed
    assert ends["wide.weight"] == (-127, 127)
    (activation,) = changed - {"wide.weight"}  # what the layer reads
    assert (narrow[activation], ends[activation]) == ((0, 15), (0, 255))


def test_narrow_weights_fold_into_the_storage_of_the_target():
    fake = faked(options="{weight_bits=4}")
    folded = run(fake, "fold-fake-quantize")
    (x,) = data(1)[0]
    assert folded.state_dict()["wide.weight"].abs().max() <= 7
    assert torch.allclose(folded(x), fake(x), atol=0.05)
    assert check_layers(folded, (x,)).kept
