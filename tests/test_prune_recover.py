"""Recovery after pruning: laws of the least squares, of BatchNorm re-estimation, and of what may be asked."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.errors import DataError, OptionError, PruningError
from fxpress.passes.base import Context
from fxpress.passes.manager import run_passes
from fxpress.passes.processor import has_bfloat16
from fxpress.passes.prune.plan import PruningPlan
from fxpress.passes.prune.recovery.least_squares import Moments, solve
from fxpress.passes.prune.recovery.linear_layers import linear_layer
from fxpress.passes.prune.recovery.pairing import pair_programs
from fxpress.passes.prune.recovery.partial_run import PartialRun
from fxpress.passes.prune.recovery.reconstruct import reconstruct
from fxpress.passes.prune.recovery.shuffle import cut_and_mix, flip_and_shift, shuffled
from fxpress.passes.prune.recovery.targets import targets
from fxpress.passes.prune.removals import Removal
from fxpress.passes.verify import follow_weights, in_double, relative_difference
from fxpress.runtime.session import make_session


def random_images(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Smooth noise: neighbouring pixels and channels are related, as in pictures."""
    noise = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return (F.avg_pool2d(noise, 3, 1, 1) * 2 + 0.3 * noise + 0.2).to(dtype)


def redrawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and statistics that are not the trivial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
            if parameter.ndim == 1:
                parameter.add_(0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


class Residual(nn.Module):
    """A stem, a residual block with BatchNorm, a downsampling block with a projection, a classifier."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        make = nn.BatchNorm2d if norm else nn.Identity
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=not norm), make(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=not norm), make(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=not norm), make(24)
        self.short, self.bn4 = nn.Conv2d(16, 24, 1, stride=2, bias=not norm), make(24)
        self.head = nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = F.relu(self.bn3(self.conv3(x)) + self.bn4(self.short(x)))
        return self.head(x.mean((2, 3)))


class Token(nn.Module):
    """A pre-norm transformer block over [n, 10, 16], two heads, MLP width 48."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def captured(module: nn.Module, example: torch.Tensor) -> fxpress.Program:
    return fxpress.capture(redrawn(module), (example,))


def error_of(program: fxpress.Program, reference: fxpress.Program, x: torch.Tensor) -> float:
    (got,), (expected,) = program.run_flat((x,)), reference.run_flat((x,))
    return float((got - expected).square().mean() / expected.var(0).mean())


def doubled(program: fxpress.Program) -> fxpress.Program:
    copy = in_double(program)
    follow_weights(copy)
    return copy


# -- a layer is the regression that it is said to be -----------------------------------------------------------------

LAYERS = [
    (nn.Linear(5, 7), (4, 5)),
    (nn.Linear(5, 7, bias=False), (2, 3, 5)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 11)),
    (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0)), (2, 4, 7, 8)),
    (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 7, 8)),
    (nn.Conv2d(4, 6, 3, padding="valid", groups=2), (2, 4, 7, 8)),
    (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 8)),
    (nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 5, 6)),
    (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (2, 4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 5, 6)),
    (nn.ConvTranspose2d(4, 6, (3, 2), stride=(1, 3), dilation=2, padding=3), (2, 4, 5, 6)),
    (nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 3, 2)),
    (nn.BatchNorm2d(4), (3, 4, 5, 5)),
    (nn.BatchNorm1d(4), (3, 4)),
]


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=[str(m) for m, _ in LAYERS])
def test_rows_times_matrix_is_the_layer(module: nn.Module, shape: tuple[int, ...]) -> None:
    program = captured(module, torch.randn(shape))
    (node,) = [n for n in program.graph.nodes if linear_layer(program, n) is not None]
    layer = linear_layer(program, node)
    assert layer is not None
    x = torch.randn(shape)
    weight = program.state_dict()[str(layer.weight.target)]
    got = layer.rows(x) @ layer.matrix(weight).to(layer.rows(x).dtype)
    if layer.bias is not None:
        bias = program.state_dict()[str(layer.bias.target)]
        got = got + bias.reshape(got.shape[0], 1, -1)
    torch.testing.assert_close(got.float(), layer.outputs(program(x)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weights(layer.matrix(weight)), weight, rtol=0, atol=0)


def test_matmul_and_addmm_with_constant_weights() -> None:
    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.zeros(5, 6)), nn.Parameter(torch.zeros(6, 4))
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x @ self.first, self.second)

    program = captured(Spelled(), torch.randn(3, 5))
    layers = [layer for n in program.graph.nodes if (layer := linear_layer(program, n)) is not None]
    assert [str(layer.weight.target) for layer in layers] == ["first", "second"]
    values = PartialRun(program, [n for layer in layers for n in (layer.source, layer.node)])((torch.randn(9, 5),))
    for layer in layers:
        weight = program.state_dict()[str(layer.weight.target)]
        expected = layer.outputs(values[layer.node]) - (0 if layer.bias is None else program.state_dict()["bias"])
        torch.testing.assert_close(layer.rows(values[layer.source]) @ layer.matrix(weight), expected)


# -- least squares -------------------------------------------------------------------------------------------------


def test_moments_give_the_ridge_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(6, 3, generator=generator, dtype=torch.float64) + 0.7
    whole, parts = Moments(1, 6, 3), Moments(1, 6, 3)
    whole.add(x[None], y[None])
    for rows, outputs in zip(x.split(13), y.split(13)):
        parts.add(rows[None], outputs[None])
    torch.testing.assert_close(whole.gram, parts.gram)
    damping, centered = 0.1 * 200 * (x - x.mean(0)).square().mean(), x - x.mean(0)
    expected = torch.linalg.solve(
        centered.T @ centered + damping * torch.eye(6, dtype=torch.float64), centered.T @ (y - y.mean(0))
    )
    found = solve(whole, None, ridge=0.1, shift=True)
    torch.testing.assert_close(found.matrix[0], expected)
    torch.testing.assert_close(found.shift[0], y.mean(0) - x.mean(0) @ expected)
    assert found.after < found.before


def test_noise_is_not_fitted() -> None:
    """Targets that have nothing to do with the rows: the held-out rows see it."""
    generator = torch.Generator().manual_seed(0)
    fit, held = Moments(1, 30, 20), Moments(1, 30, 20)
    for moments, count in ((fit, 60), (held, 400)):
        x, y = (torch.randn(1, count, n, generator=generator, dtype=torch.float64) for n in (30, 20))
        moments.add(x, y)
    chosen, free = (solve(fit, h, r, shift=True).matrix for h, r in ((held, None), (None, 1e-9)))
    assert chosen.norm() < 0.2 * free.norm()


# -- what recovery must keep and restore ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["least-squares", "batchnorm"])
def test_nothing_pruned_nothing_changed(method: str) -> None:
    program = captured(Residual(), random_images(4))
    plan = fxpress.plan_pruning(program, macs=1.0)
    assert not plan.removals
    recovered = fxpress.recover(plan.apply(program), [random_images(40)], reference=program, plan=plan, method=method)
    x = random_images(8, seed=5)
    (got,), (expected,) = recovered.run_flat((x,)), program.run_flat((x,))
    assert relative_difference(got, expected) < 1e-6


def test_redundant_channels_are_made_up_for() -> None:
    """Linear all through, and the second half of the hidden channels are mixtures of the first half."""
    module = redrawn(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3)))
    with torch.no_grad():
        mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
        module[0].weight[4:] = torch.einsum("ij,jchw->ichw", mix, module[0].weight[:4])
        module[0].bias[4:] = mix @ module[0].bias[:4] + 1.0
    program = fxpress.capture(module, (random_images(2),))
    removals = [Removal(n, d, 8, (4, 5, 6, 7)) for n, d in (("0.weight", 0), ("0.bias", 0), ("1.weight", 1))]
    plan = PruningPlan(tuple(removals), (), (0, 0), (0, 0))
    pruned, test = plan.apply(program), random_images(16, seed=9)
    recovered = fxpress.recover(pruned, random_images(64).split(16), reference=program, plan=plan)
    assert relative_difference(pruned(test), program(test)) > 0.1
    assert relative_difference(recovered(test), program(test)) < 1e-5


def test_redundant_units_are_made_up_for_to_rounding() -> None:
    module = redrawn(nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4)))
    with torch.no_grad():
        module[0].weight[7:] = module[0].weight[:3] * 2 - module[0].weight[3:6]
        module[0].bias[7:] = 0.3
    program = fxpress.capture(module, (torch.randn(2, 6),))
    removals = [Removal(n, d, 10, (7, 8, 9)) for n, d in (("0.weight", 0), ("0.bias", 0), ("1.weight", 1))]
    plan = PruningPlan(tuple(removals), (), (0, 0), (0, 0))
    pruned = plan.apply(program)
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))
    recovered = fxpress.recover(pruned, x.split(20), reference=program, plan=plan)
    assert relative_difference(pruned(x), program(x)) > 0.1
    assert relative_difference(recovered(x), program(x)) < 1e-6


MODELS = {
    "batchnorm": (Residual(), random_images(4)),
    "no batchnorm": (Residual(norm=False), random_images(4)),
    "transformer": (nn.Sequential(Token(), Token()), torch.randn(4, 10, 16)),
    "depthwise": (
        nn.Sequential(
            nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 8, 1)
        ),
        random_images(4),
    ),
    "transposed": (
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 4, 3, stride=2, padding=1)),
        random_images(4),
    ),
    "batchnorm first": (
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
                      nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)),
        random_images(4),
    ),
}  # fmt: skip


def data_like(example: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    if example.ndim == 4:
        return random_images(count, seed)
    return torch.randn(count, *example.shape[1:], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_recovered_is_closer_on_new_data(name: str) -> None:
    module, example = MODELS[name]
    program = captured(module, example)
    plan = fxpress.plan_pruning(program, ratio=0.4)
    pruned = plan.apply(program)
    before = {n: p.clone() for n, p in pruned.named_parameters()}
    recovered = fxpress.recover(pruned, data_like(example, 200, 1).split(50), reference=program, plan=plan)
    test = data_like(example, 50, 2)
    assert error_of(recovered, program, test) < 0.7 * error_of(pruned, program, test)
    assert all(torch.equal(p, before[n]) for n, p in pruned.named_parameters())  # the argument is not changed
    onnx_model = fxpress.to_onnx(recovered)
    (got,) = make_session(onnx_model).run(test.numpy())
    assert relative_difference(torch.from_numpy(got), recovered(test)) < 1e-4


def test_fused_or_not_makes_no_difference_of_kind() -> None:
    """Recovery needs no BatchNorm: after fusion it finds the same function."""
    program = captured(Residual(), random_images(4))
    fused = run_passes(program, "fuse-batchnorm")
    data, test = random_images(200, 1).split(50), random_images(50, 2)
    errors = []
    plan = fxpress.plan_pruning(program, ratio=0.4)
    for reference in (program, fused):
        own = fxpress.plan_pruning(reference, ratio=0.4) if reference is fused else plan
        pruned = own.apply(reference)
        recovered = fxpress.recover(pruned, data, reference=reference, plan=own)
        errors.append(error_of(recovered, reference, test) / error_of(pruned, reference, test))
    assert max(errors) < 0.5


# -- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["least-squares", "batchnorm"])
def test_however_the_data_are_batched(method: str) -> None:
    program = doubled(captured(Residual(), random_images(4)))
    plan = fxpress.plan_pruning(program, ratio=0.4)
    x = random_images(60, 1, torch.float64)
    results = [
        fxpress.recover(plan.apply(program), x.split(size), reference=program, plan=plan, method=method).state_dict()
        for size in (60, 7, 1)
    ]
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-8)


def test_labels_are_ignored() -> None:
    program = captured(Residual(), random_images(4))
    plan = fxpress.plan_pruning(program, ratio=0.4)
    x, labels = random_images(40, 1), torch.arange(40)
    plain, labelled = (
        fxpress.recover(plan.apply(program), data, reference=program, plan=plan)
        for data in (x.split(20), list(zip(x.split(20), labels.split(20))))
    )
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), labelled.parameters()))


@pytest.mark.parametrize("cache_bytes", [0, 200_000])
def test_memory_does_not_grow_with_the_data(cache_bytes: int) -> None:
    """While the data are read, neither batches nor activations of earlier batches are alive, but for a bounded cache."""
    program = captured(Residual(), random_images(4))
    plan = fxpress.plan_pruning(program, ratio=0.4)
    sizes: dict[int, int] = {}

    class Data:
        """Counts what is alive at the end of each sweep."""

        def __init__(self, count: int) -> None:
            self.count = count

        def __iter__(self) -> Iterator[tuple[torch.Tensor]]:
            for number in range(self.count):
                yield (random_images(8, number),)
            alive = sum(o.nbytes for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter))
            sizes[self.count] = max(sizes.get(self.count, 0), alive)

    for count in (4, 16):
        result = reconstruct(pair_programs(plan.apply(program), program, plan), Data(count), cache_bytes=cache_bytes)
    assert result.sweeps == 4
    activations = 8 * 16 * 12 * 12 * 4  # of one layer and batch
    assert sizes[16] - sizes[4] < cache_bytes + activations


def test_what_is_kept_between_sweeps_changes_nothing() -> None:
    program = captured(Residual(), random_images(4))
    plan = fxpress.plan_pruning(program, ratio=0.4)
    data = [(b,) for b in random_images(60, 1).split(10)]
    results = []
    for cache_bytes in (0, 300_000, 2**29):  # nothing, some of the batches, all of them
        pruned = plan.apply(program)
        reconstruct(pair_programs(pruned, program, plan), data, cache_bytes=cache_bytes)
        results.append(list(pruned.parameters()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_statistics_are_those_of_the_data() -> None:
    program = captured(Residual(), random_images(4))
    plan = fxpress.plan_pruning(program, ratio=0.4)
    x = random_images(50, 1)
    recovered = fxpress.recover(plan.apply(program), x.split(20), reference=program, plan=plan, method="batchnorm")
    norms = [n for n in recovered.graph.nodes if str(n.target) == "aten.batch_norm.default"]
    values = PartialRun(recovered, [n.args[0] for n in norms])((x,))
    state = recovered.state_dict()
    changed = {n.args[0] for n in norms} - {n.args[0] for n in norms if str(n.args[3].target) == "bn1.running_mean"}
    for norm in norms:
        if norm.args[0] in changed:  # bn1 reads the stem, of which channels went, but bn1 sees the sum over the rest
            mean, variance = (state[str(norm.args[i].target)] for i in (3, 4))
            seen = values[norm.args[0]].transpose(0, 1).flatten(1)
            torch.testing.assert_close(mean, seen.mean(1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(variance, seen.var(1), rtol=1e-4, atol=1e-5)


# -- targets --------------------------------------------------------------------------------------------------------


class Moved(nn.Module):
    """A layer whose output is moved about, scaled and normalized before it joins a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 8), nn.BatchNorm2d(8)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        y = self.layer(x).view(x.shape[0], 4, 5, 8).roll((1, 2), (1, 2)).permute(0, 3, 1, 2)
        return stream - self.norm(y) * self.gamma


def test_a_residual_is_taken_back_through_what_follows_a_layer() -> None:
    program = fxpress.capture(redrawn(Moved()), (torch.randn(2, 20, 6), torch.randn(2, 8, 4, 5)))
    (node,) = [n for n in program.graph.nodes if str(n.target) == "aten.linear.default"]
    target = targets(node)[0]
    assert str(target.node.target) == "aten.sub.Tensor"
    batch = (torch.randn(3, 20, 6), torch.randn(3, 8, 4, 5))
    values = PartialRun(program, [node, target.node, *target.needed])(batch)
    wanted = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    change = target.take_back(program, wanted, values)
    assert change.shape == values[node].shape
    with torch.no_grad():
        program.graph_module.layer.weight.zero_()  # the layer now gives its bias everywhere
        base = program(*batch)
        state = program.state_dict()
        scale = state["gamma"] * state["norm.weight"] / (state["norm.running_var"] + 1e-5).sqrt()
    moved = change.float().view(3, 4, 5, 8).roll((1, 2), (1, 2)).permute(0, 3, 1, 2)
    torch.testing.assert_close(-moved * scale.view(-1, 1, 1), wanted.float(), rtol=1e-4, atol=1e-4)
    assert base.shape == wanted.shape


# -- what is left alone, and mistakes --------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + self.down(F.relu(self.up(x)))
        return self.head(x)


def test_shared_weights_are_left_alone_and_named() -> None:
    program = captured(Tied(), torch.randn(4, 8))
    plan = fxpress.plan_pruning(program, ratio=0.5)
    pruned = plan.apply(program)
    recovered = fxpress.recover(pruned, torch.randn(100, 8).split(50), reference=program, plan=plan)
    assert torch.equal(recovered.state_dict()["down.weight"], pruned.state_dict()["down.weight"])
    assert not torch.equal(recovered.state_dict()["head.weight"], pruned.state_dict()["head.weight"])
    assert any("shared" in note for note in recovered.log[-1].notes)


def test_mistakes_are_named() -> None:
    program = captured(Residual(), random_images(4))
    other = captured(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)), random_images(4))
    plan = fxpress.plan_pruning(program, ratio=0.4)
    pruned, data = plan.apply(program), [random_images(8)]
    with pytest.raises(PruningError):
        fxpress.recover(pruned, data, reference=other, plan=plan)
    with pytest.raises(PruningError):
        fxpress.recover(pruned, data, reference=program, plan=fxpress.plan_pruning(program, ratio=0.2))
    with pytest.raises(PruningError):
        fxpress.recover(program, data, reference=pruned, plan=plan)
    with pytest.raises(DataError):
        fxpress.recover(pruned, [], reference=program, plan=plan)
    with pytest.raises(DataError):
        fxpress.recover(pruned, [torch.randn(4, 1, 12, 12)], reference=program, plan=plan)
    with pytest.raises(OptionError):
        fxpress.recover(pruned, data, reference=program, plan=plan, method="magic")
    with pytest.raises(OptionError):
        fxpress.recover(pruned, data, reference=program, plan=plan, ridge=-1.0)
    with pytest.raises(OptionError):
        fxpress.recover(pruned, data, reference=program, plan=plan, method="batchnorm", ridge=0.1)
    with pytest.raises(OptionError):
        fxpress.recover(pruned, data, reference=program, plan=plan, augment="flip-shift")
    with pytest.raises(OptionError):
        fxpress.recover(pruned, data, reference=program, plan=plan, epochs=-1)
    with pytest.raises(OptionError):
        fxpress.prune_and_recover(program, data, macs=0.5, params=0.5)
    with pytest.raises(OptionError):
        fxpress.prune_and_recover(program, data, macs=0.5, steps=0)
    if not has_bfloat16():
        with pytest.raises(OptionError, match="no instructions"):
            fxpress.recover(pruned, data, reference=program, plan=plan, epochs=1, bfloat16=True)


# -- training towards the reference, and steps ---------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["none", "flip-shift", "flip-shift-cutmix"])
def test_training_goes_on_where_least_squares_ends(augment: str) -> None:
    program = captured(Residual(), random_images(4))
    plan = fxpress.plan_pruning(program, ratio=0.4)
    data, test = random_images(200, 1).split(64), random_images(50, 2)
    solved, trained, again = (
        fxpress.recover(plan.apply(program), data, reference=program, plan=plan, **options)
        for options in ({}, *[{"epochs": 12, "learning_rate": 2e-3, "augment": augment}] * 2)
    )
    assert error_of(trained, program, test) < error_of(solved, program, test)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters()))
    assert all(p.grad is None for p in trained.parameters())


def test_training_that_does_harm_is_undone() -> None:
    program = captured(Residual(), random_images(4))
    plan = fxpress.plan_pruning(program, ratio=0.2)
    data = random_images(40, 1).split(20)
    solved, trained = (
        fxpress.recover(plan.apply(program), data, reference=program, plan=plan, **options)
        for options in ({}, {"epochs": 1, "learning_rate": 100.0})
    )
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), solved.parameters()))
    assert "stay as they were" in trained.log[-1].notes[-1]


@pytest.mark.parametrize("learning_rate", [3e-3, 3e-2])
def test_training_never_makes_the_outputs_worse(learning_rate: float) -> None:
    program = captured(Tied(), torch.randn(4, 8))
    plan = fxpress.plan_pruning(program, ratio=0.5)
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    solved, trained = (
        fxpress.recover(plan.apply(program), x.split(50), reference=program, plan=plan, **options)
        for options in ({}, {"epochs": 10, "learning_rate": learning_rate})
    )
    assert error_of(trained, program, x) <= error_of(solved, program, x)


def test_transformers_are_trained() -> None:
    module, example = MODELS["transformer"]
    program = captured(module, example)
    plan = fxpress.plan_pruning(program, ratio=0.4)
    data, test = data_like(example, 200, 1).split(50), data_like(example, 100, 2)
    solved, trained = (
        fxpress.recover(plan.apply(program), data, reference=program, plan=plan, epochs=e) for e in (0, 20)
    )
    assert error_of(trained, program, test) < 0.85 * error_of(solved, program, test)


def test_mini_batches_hold_each_example_once() -> None:
    program = captured(Residual(), random_images(4))
    x = torch.arange(50.0).view(50, 1, 1, 1).expand(50, 3, 12, 12)
    for limit in (2**28, 3000):
        generator = torch.Generator().manual_seed(0)
        drawn = [b[0][:, 0, 0, 0] for b in shuffled(program, ((b,) for b in x.split(7)), 8, generator, limit)]
        assert sorted(torch.cat(drawn).tolist()) == list(range(50))
        assert torch.cat(drawn).tolist() != list(range(50))


def test_images_are_mirrored_and_moved_each_in_its_own_way() -> None:
    x = torch.arange(16.0).view(1, 1, 1, 16).expand(64, 2, 16, 16)
    moved, labels = flip_and_shift((x, torch.arange(64)), torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    assert torch.equal(labels, torch.arange(64))
    rows = moved[:, 0, 8]
    steps = rows.diff(dim=1)
    assert ((steps == 0) | (steps == 1)).all(1).logical_xor(((steps == 0) | (steps == -1)).all(1)).all()
    assert {float(v) for v in rows[:, 8]} <= {float(v) for v in range(5, 11)}
    assert len({tuple(r.tolist()) for r in rows}) > 4


def test_steps_lead_to_the_budget_with_one_plan() -> None:
    program = captured(Residual(), random_images(4))
    data, test = random_images(200, 1).split(50), random_images(50, 2)
    results = {n: fxpress.prune_and_recover(program, iter(data), macs=0.5, steps=n) for n in (1, 3)}
    for recovered, plan in results.values():
        assert 0.4 < plan.macs[1] / plan.macs[0] <= 0.5
        assert [p.shape for p in plan.apply(program).parameters()] == [p.shape for p in recovered.parameters()]
        assert error_of(recovered, program, test) < 0.5 * error_of(plan.apply(program), program, test)
    choose = functools.partial(fxpress.plan_pruning, importance="l1")
    _, plan = fxpress.prune_and_recover(program, data, params=0.6, steps=2, choose=choose, method="batchnorm")
    assert 0.5 < plan.parameters[1] / plan.parameters[0] <= 0.6


# -- the pass -------------------------------------------------------------------------------------------------------


def test_the_pass_follows_prune() -> None:
    program = captured(Residual(), random_images(4))
    data = [(b,) for b in random_images(100, 1).split(50)]
    test = random_images(50, 2)
    pruned, recovered = (
        run_passes(program, text, Context(calibration=data))
        for text in ("prune{ratio=0.4}", "prune{ratio=0.4},recover,fuse-batchnorm")
    )
    assert error_of(recovered, program, test) < 0.7 * error_of(pruned, program, test)
    with pytest.raises(OptionError):
        run_passes(program, "recover", Context(calibration=data))
    with pytest.raises(OptionError):
        run_passes(program, "prune{ratio=0.4},recover")


def test_cutmix_pastes_rectangles_of_other_images() -> None:
    """Constant images show where each pixel came from: every image has its own value, and at most one other in a box."""
    x = torch.arange(64.0)[:, None, None, None].expand(64, 3, 16, 24).contiguous()
    mixed, labels = cut_and_mix((x, torch.arange(64)), torch.Generator().manual_seed(0))
    assert torch.equal(labels, torch.arange(64))
    pasted = mixed != x
    assert 0.3 < pasted.flatten(1).any(1).float().mean() < 0.7
    for image, foreign in zip(mixed, pasted):
        assert torch.equal(foreign[0], foreign[1])
        assert len(image[foreign].unique()) <= 1
        rows, columns = foreign[0].any(1), foreign[0].any(0)
        assert torch.equal(foreign[0], rows[:, None] & columns[None])
    assert 0.1 < pasted.float().mean() < 0.35


def test_operands_in_lists_are_losses_too() -> None:
    """einsum and recurrent layers are given lists of tensors; what is summed over there is found all the same."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.rnn, self.out = nn.Linear(6, 16), nn.LSTM(16, 12, batch_first=True), nn.Linear(8, 4)
            self.weight = nn.Parameter(torch.randn(12, 8) * 0.3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.einsum("btc,cd->btd", self.rnn(self.into(x))[0], self.weight))

    torch.manual_seed(0)
    program = fxpress.capture(Net().eval(), torch.randn(2, 5, 6))
    plan = fxpress.plan_pruning(program, ratio=0.4)
    data, test = torch.randn(200, 5, 6), torch.randn(50, 5, 6)
    pruned = plan.apply(program)
    recovered = fxpress.recover(pruned, data.split(50), reference=program, plan=plan)
    assert error_of(recovered, program, test) < error_of(pruned, program, test)
