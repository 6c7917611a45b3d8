"""cleanup, canonicalize and fuse-batchnorm: what each does, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxpress
from fxpress.frontend.program import delete_attribute
from fxpress.passes.manager import op_counts, run_passes

aten = torch.ops.aten


def random_norms(module: nn.Module) -> nn.Module:
    """Statistics and affine parameters that are not the identity, so that fusing wrongly shows."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                if m.running_mean is not None:
                    m.running_mean.normal_()
                    m.running_var.uniform_(0.2, 2.0)
                if m.affine:
                    m.weight.normal_(1.0, 0.5)
                    m.bias.normal_()
    return module.eval()


def count(program, name: str) -> int:
    return sum(v for k, v in op_counts(program).items() if name in k)


# -- fuse-batchnorm -----------------------------------------------------------------------------------------------

FUSABLE = {
    "conv1d": (nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9)),
    "conv2d": (nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)), (2, 4, 7, 7)),
    "conv3d": (nn.Sequential(nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3)), (2, 2, 5, 5, 5)),
    "grouped": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), (2, 4, 7, 7)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "transposed1d": (nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 5)),
    "linear": (nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7)), (3, 5)),
    "before conv": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), (2, 4, 7, 7)),
    "before grouped": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1, groups=2, bias=False)), (2, 4, 7, 7)),
    "before linear": (nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 7)), (3, 5)),
    "no affine": (nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("name", FUSABLE)
def test_batchnorm_is_fused(name):
    torch.manual_seed(0)
    module, shape = FUSABLE[name]
    random_norms(module)
    program = fxpress.capture(module, torch.randn(shape))
    fused = run_passes(program, "fuse-batchnorm")
    assert count(fused, "batch_norm") == 0
    assert not any("running" in n for n in fused.state_dict())
    x = torch.randn(shape)
    torch.testing.assert_close(fused(x), module(x), rtol=1e-4, atol=1e-5)


class SharedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x * 2)


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


REFUSED = {
    "padded": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), (2, 4, 7, 7), "pads with zeros"),
    "same": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same")), (2, 4, 7, 7), "pads with zeros"),
    "shared": (SharedConv(), (2, 4, 5, 5), "shared with another layer"),
    "read twice": (ReadTwice(), (2, 4, 5, 5), "also read elsewhere"),
    "batch statistics": (
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), (2, 4, 5, 5), "statistics of the batch",
    ),
    "tokens": (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(7)), (2, 7, 5), "another dimension"),
    "relu between": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), (2, 4, 5, 5), "does not come from a conv"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_batchnorm_is_left_alone_with_a_reason(name):
    module, shape, reason = REFUSED[name]
    random_norms(module)
    program = fxpress.capture(module, torch.randn(shape))
    fused = run_passes(program, "fuse-batchnorm")
    assert count(fused, "batch_norm") == 1
    assert reason in " ".join(fused.log[-1].notes)


def test_training_mode_is_refused():
    program = fxpress.capture(random_norms(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))), torch.randn(2, 2, 3, 3))
    fused = run_passes(program.train(), "fuse-batchnorm")
    assert count(fused, "batch_norm") == 1


# -- cleanup ------------------------------------------------------------------------------------------------------


class Untidy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x):
        self.linear(x)  # dead
        x = nn.functional.dropout(x, 0.3, self.training)
        x = x.contiguous().to(torch.float32) + 0
        x = (x * 1).view(x.shape)
        return self.linear(x) + (self.table * 2 - 1).exp()


def test_cleanup_removes_what_does_nothing():
    module = Untidy().eval()
    program = fxpress.capture(module, torch.randn(2, 4))
    clean = run_passes(program, "cleanup")
    assert op_counts(clean) == {"aten.linear.default": 1, "aten.add.Tensor": 1}
    assert not any(n.startswith("unused") for n in clean.state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(clean(x), module(x))


def test_constants_whose_nodes_are_called_like_module_methods():
    """The node of aten.to is called "to", which is a method of every module."""

    class Casts(nn.Module):
        def forward(self, x):
            return x * torch.arange(4).to(torch.float32)

    clean = run_passes(fxpress.capture(Casts(), torch.randn(2, 4)), "cleanup")
    x = torch.randn(3, 4)
    torch.testing.assert_close(clean(x), Casts()(x))


class KeepsCasts(nn.Module):
    def forward(self, x):
        return (x.to(torch.float64) + 1).to(torch.float32) * 2 + x.new_ones(4).int()


def test_cleanup_keeps_what_matters():
    program = fxpress.capture(KeepsCasts(), torch.randn(2, 4))
    clean = run_passes(program, "cleanup")
    x = torch.randn(3, 4)
    torch.testing.assert_close(clean(x), KeepsCasts()(x))
    assert count(clean, "aten.to") + count(clean, "_to_copy") >= 2


def test_cleanup_keeps_randomness():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand(4)

    clean = run_passes(fxpress.capture(Noisy(), torch.randn(2, 4)), "cleanup{max_fold_mb=1}")
    x = torch.zeros(2, 4)
    assert not torch.equal(clean(x), clean(x))


# -- canonicalize -------------------------------------------------------------------------------------------------


class ManyMeans(nn.Module):
    def forward(self, x):
        a = nn.functional.avg_pool2d(x, 6)
        b = x.mean((2, 3), keepdim=True)
        c = x.mean([-1, -2])
        return a + b, c


class Clamps(nn.Module):
    def forward(self, x):
        return nn.functional.relu6(x) + x.clamp(0, 3) + x.clamp(min=0) + x.clamp(max=1) + torch.clamp_min(x, 0)


@pytest.mark.parametrize(
    ("module", "expected"),
    [(ManyMeans(), {"adaptive_avg_pool2d": 3, "mean": 0, ".avg_pool2d": 0}), (Clamps(), {"hardtanh": 2, "relu.": 2, "clamp": 1})],
)
def test_canonical_forms(module, expected):
    program = fxpress.capture(module, torch.randn(2, 3, 6, 6))
    canonical = run_passes(program, "canonicalize")
    assert {k: count(canonical, k) for k in expected} == expected
    x = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(canonical(x), module(x))


def test_pool_that_is_not_global_stays():
    program = fxpress.capture(nn.AvgPool2d(3, padding=1), torch.randn(2, 3, 3, 3))
    assert count(run_passes(program, "canonicalize"), ".avg_pool2d") == 1


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN, nn.LSTM])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True, "num_layers": 2}])
def test_recurrent_layers_are_not_unrolled_to_know_their_shapes(kind, options):
    """Sizes and strides are those of torch; a long sequence costs a check no more than a short one."""
    layer, x = kind(4, 6, **options).eval(), torch.randn(3, 5, 4)
    program = fxpress.capture(layer, (x,), dynamic_batch=False)
    assert sum("aten" in str(n.target) for n in program.graph.nodes) < 10, "one node"
    checked = fxpress.run_passes(program, "cleanup")
    outputs = [n.meta["val"] for n in checked.output_nodes()]
    for value, real in zip(outputs, pytree.tree_leaves(checked(x)), strict=True):
        assert tuple(value.shape) == tuple(real.shape)
        assert value.is_contiguous() == real.is_contiguous()


def test_plain_constants_keep_their_module():
    """torch.export stores lifted constants as attributes, which are neither parameters nor buffers."""
    module = nn.Module()
    module.add_module("inner", nn.Module())
    module.inner.register_buffer("gone", torch.zeros(1))
    module.inner.constant = torch.ones(4)
    delete_attribute(module, "inner.gone")
    assert torch.equal(module.inner.constant, torch.ones(4))
    module.inner.register_buffer("last", torch.zeros(1))
    del module.inner.constant
    delete_attribute(module, "inner.last")
    assert not hasattr(module, "inner")
