"""Each rule against the oracle: a tiny network per op or trick, pruned by half, must equal its masked original.

Every probe names the parameter dimensions that must really have shrunk, so that pinning everything would fail, and three
independent programs are compared in float64: the pruned one, the one masked at its consumers, and the original with all
removed weights set to zero (which knows nothing of masks).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.frontend.cost import count_macs
from fxpress.passes.prune.groups import coverage
from fxpress.passes.prune.masking import in_double, oracle_error
from fxpress.passes.prune.plan import PruningPlan
from fxpress.passes.prune.planning import plan_pruning
from fxpress.passes.prune.rules.table import analyze
from fxpress.passes.rewrite import argument
from fxpress.passes.verify import relative_difference

Probe = tuple[nn.Module, tuple[int, ...], tuple[str, ...]]
PROBES: dict[str, Callable[[], Probe]] = {}


class Net(nn.Module):
    """Modules and parameters by name, and a forward given as a function of the net and its input."""

    def __init__(self, forward: Callable[[Net, torch.Tensor], torch.Tensor], **parts: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self._function = forward
        for name, part in parts.items():
            if isinstance(part, nn.Parameter | nn.Module):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._function(self, x)


def probe(function: Callable[[], Probe]) -> Callable[[], Probe]:
    PROBES[function.__name__] = function
    return function


def conv(inputs: int, outputs: int, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


IMAGE = (2, 3, 8, 8)


def between(forward: Callable[[torch.Tensor], torch.Tensor], middle: int, last: int) -> Probe:
    """conv a -> movement of channels -> conv b."""
    net = Net(lambda n, x: n.b(forward(F.relu(n.a(x)))), a=conv(3, middle), b=conv(last, 4))
    return net, IMAGE, ("a.weight[0]", "a.bias[0]", "b.weight[1]")


@probe
def plain() -> Probe:
    return between(lambda x: x, 16, 16)


@probe
def strided_slice() -> Probe:
    return between(lambda x: x[:, ::2], 16, 8)


@probe
def inner_slice() -> Probe:
    return between(lambda x: x[:, 3:13], 16, 10)


@probe
def flip() -> Probe:
    return between(lambda x: x.flip(1), 16, 16)


@probe
def roll() -> Probe:
    return between(lambda x: x.roll(3, 1), 16, 16)


@probe
def roll_and_residual() -> Probe:
    return between(lambda x: x + x.roll(4, 1), 16, 16)


@probe
def gather() -> Probe:
    order = torch.tensor([5, 1, 1, 0, 7, 2, 6, 15, 3])
    net = Net(lambda n, x: n.b(F.relu(n.a(x))[:, n.order]), a=conv(3, 16), b=conv(9, 4), order=order)
    return net, IMAGE, ("a.weight[0]", "b.weight[1]")


@probe
def index_select() -> Probe:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    net = Net(lambda n, x: n.b(F.relu(n.a(x)).index_select(1, n.order)), a=conv(3, 16), b=conv(16, 4), order=order)
    return net, IMAGE, ("a.weight[0]", "b.weight[1]")


@probe
def channel_shuffle_by_view() -> Probe:
    return between(lambda x: x.view(-1, 4, 4, 8, 8).transpose(1, 2).reshape(-1, 16, 8, 8), 16, 16)


@probe
def channel_shuffle_op() -> Probe:
    return between(lambda x: F.channel_shuffle(x, 4), 16, 16)


@probe
def shuffle_of_concat() -> Probe:
    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(n.a(x))
        for block in (n.b1, n.b2, n.b3):
            left, right = x.chunk(2, 1)
            x = torch.cat([left, F.relu(block(right))], 1)
            x = x.view(-1, 2, 8, 8, 8).transpose(1, 2).reshape(-1, 16, 8, 8)
        return n.c(x)

    net = Net(forward, a=conv(3, 16), b1=conv(8, 8), b2=conv(8, 8), b3=conv(8, 8), c=conv(16, 4))
    return net, IMAGE, ("a.weight[0]", "b1.weight[1]", "b3.weight[0]", "c.weight[1]")


@probe
def flatten_nchw() -> Probe:
    net = Net(lambda n, x: n.b(F.relu(n.a(x)).flatten(1)), a=conv(3, 8), b=nn.Linear(8 * 64, 5))
    return net, IMAGE, ("a.weight[0]", "b.weight[1]")


@probe
def flatten_nhwc() -> Probe:
    net = Net(lambda n, x: n.b(F.relu(n.a(x)).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 8), b=nn.Linear(8 * 64, 5))
    return net, IMAGE, ("a.weight[0]", "b.weight[1]")


@probe
def c2f() -> Probe:
    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        parts = list(F.silu(n.a(x)).chunk(2, 1))
        parts += [F.silu(n.m1(parts[-1]))]
        parts += [F.silu(n.m2(parts[-1]))]
        return n.b(torch.cat(parts, 1))

    net = Net(forward, a=conv(3, 16, 1), m1=conv(8, 8), m2=conv(8, 8), b=conv(32, 4, 1))
    return net, IMAGE, ("a.weight[0]", "m1.weight[0]", "m1.weight[1]", "m2.weight[1]", "b.weight[1]")


@probe
def uneven_split() -> Probe:
    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        one, two, three = F.relu(n.a(x)).split([5, 8, 3], 1)
        return n.b(one) + n.c(two) * n.d(three)

    net = Net(forward, a=conv(3, 16), b=conv(5, 4), c=conv(8, 4), d=conv(3, 4))
    return net, IMAGE, ("a.weight[0]", "b.weight[1]", "c.weight[1]", "d.weight[1]", "d.weight[0]")[:4]


@probe
def chunk_into_unequal_parts() -> Probe:
    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        one, two, three = F.relu(n.a(x)).chunk(3, 1)  # 6, 6, 4
        return n.b(one + two) + n.c(three)

    net = Net(forward, a=conv(3, 16), b=conv(6, 4), c=conv(4, 4))
    return net, IMAGE, ("a.weight[0]", "b.weight[1]", "c.weight[1]")


@probe
def pixel_shuffle() -> Probe:
    return between(lambda x: F.pixel_shuffle(x, 2), 32, 8)


@probe
def pixel_unshuffle() -> Probe:
    return between(lambda x: F.pixel_unshuffle(x, 2), 8, 32)


@probe
def patch_merge() -> Probe:
    """Swin: four pixels become channels."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(n.a(x)).permute(0, 2, 3, 1)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return n.b(x)

    return Net(forward, a=conv(3, 8), b=nn.Linear(32, 6)), IMAGE, ("a.weight[0]", "b.weight[1]")


@probe
def padded_shortcut() -> Probe:
    """Option A of CIFAR ResNets."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(n.a(x))
        x = F.relu(n.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return n.c(x)

    net = Net(forward, a=conv(3, 8), b=conv(8, 16, stride=2), c=conv(16, 4))
    return net, IMAGE, ("a.weight[0]", "b.weight[0]", "b.weight[1]", "c.weight[1]")


@probe
def grouped() -> Probe:
    net = Net(lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x))))), a=conv(3, 16), b=conv(16, 24, groups=4), c=conv(24, 4))
    return net, IMAGE, ("a.weight[0]", "b.weight[0]", "b.weight[1]", "c.weight[1]")


@probe
def depthwise_with_multiplier() -> Probe:
    net = Net(lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x))))), a=conv(3, 8), b=conv(8, 24, groups=8), c=conv(24, 4))
    return net, IMAGE, ("a.weight[0]", "b.weight[0]", "c.weight[1]")


@probe
def group_counts_that_cross() -> Probe:
    """Groups of 2 and of 3 on one residual stream of 12: only the common refinement (2, 3, 2) is left."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(n.a(x))
        x = x + F.relu(n.b(x))
        x = x + F.relu(n.c(x))
        return n.d(x)

    net = Net(forward, a=conv(3, 24), b=conv(24, 24, groups=2), c=conv(24, 24, groups=6), d=conv(24, 4))
    return net, IMAGE, ("a.weight[0]", "b.weight[1]", "c.weight[0]", "d.weight[1]")


@probe
def transposed() -> Probe:
    net = Net(lambda n, x: n.b(F.relu(n.a(x))), a=nn.ConvTranspose2d(3, 16, 2, 2), b=nn.ConvTranspose2d(16, 4, 3))
    return net, IMAGE, ("a.weight[1]", "a.bias[0]", "b.weight[0]")


@probe
def grouped_transposed() -> Probe:
    net = Net(
        lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x))))),
        a=conv(3, 16),
        b=nn.ConvTranspose2d(16, 24, 2, 2, groups=4),
        c=conv(24, 4),
    )
    return net, IMAGE, ("a.weight[0]", "b.weight[0]", "b.weight[1]", "c.weight[1]")


@probe
def squeeze_excite() -> Probe:
    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(n.a(x))
        gate = torch.sigmoid(n.expand(F.relu(n.reduce(F.adaptive_avg_pool2d(x, 1)))))
        return n.b(x * gate)

    net = Net(forward, a=conv(3, 16), reduce=conv(16, 8, 1), expand=conv(8, 16, 1), b=conv(16, 4))
    return net, IMAGE, ("a.weight[0]", "reduce.weight[0]", "expand.weight[0]", "b.weight[1]")


@probe
def squeeze_excite_by_linear() -> Probe:
    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(n.a(x))
        gate = torch.sigmoid(n.expand(F.relu(n.reduce(x.mean((2, 3)).squeeze()))))
        return n.b(x * gate.view(x.shape[0], 16, 1, 1).expand_as(x))

    net = Net(forward, a=conv(3, 16), reduce=nn.Linear(16, 8), expand=nn.Linear(8, 16), b=conv(16, 4))
    return net, (3, 3, 8, 8), ("a.weight[0]", "reduce.weight[0]", "expand.weight[0]", "b.weight[1]")


@probe
def one_conv_used_twice() -> Probe:
    net = Net(lambda n, x: n.c(n.b(F.relu(n.b(F.relu(n.a(x)))))), a=conv(3, 16), b=conv(16, 16), c=conv(16, 4))
    return net, IMAGE, ("a.weight[0]", "b.weight[0]", "b.weight[1]", "c.weight[1]")


@probe
def tied_weights() -> Probe:
    net = Net(lambda n, x: F.linear(F.relu(n.a(x)), n.a.weight.t()), a=nn.Linear(12, 24))
    return net, (2, 12), ("a.weight[0]", "a.bias[0]")


@probe
def bare_parameter() -> Probe:
    weight = nn.Parameter(torch.zeros(16, 3, 3, 3))
    net = Net(
        lambda n, x: n.b(F.relu(F.conv2d(x, n.w) + n.shift)),
        w=weight,
        shift=nn.Parameter(torch.zeros(16, 1, 1)),
        b=conv(16, 4),
    )
    return net, IMAGE, ("w[0]", "shift[0]", "b.weight[1]")


@probe
def conv1d() -> Probe:
    net = Net(lambda n, x: n.b(F.relu(n.a(x))), a=nn.Conv1d(3, 16, 3), b=nn.Conv1d(16, 4, 3))
    return net, (2, 3, 20), ("a.weight[0]", "b.weight[1]")


@probe
def conv3d() -> Probe:
    net = Net(lambda n, x: n.b(F.relu(n.n(n.a(x)))), a=nn.Conv3d(3, 16, 3), n=nn.BatchNorm3d(16), b=nn.Conv3d(16, 4, 3))
    return net, (2, 3, 6, 6, 6), ("a.weight[0]", "n.weight[0]", "n.running_var[0]", "b.weight[1]")


@probe
def channel_parameters() -> Probe:
    """Layer scale, PReLU with one slope a channel, a learned bias."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        return n.b(n.act(n.a(x)) * n.scale.view(1, -1, 1, 1) + n.shift[:, None, None])

    parts = {"scale": nn.Parameter(torch.zeros(16)), "shift": nn.Parameter(torch.zeros(16)), "act": nn.PReLU(16)}
    return (
        Net(forward, a=conv(3, 16), b=conv(16, 4), **parts),
        IMAGE,
        ("a.weight[0]", "scale[0]", "shift[0]", "act.weight[0]"),
    )


@probe
def instance_norm() -> Probe:
    net = Net(lambda n, x: n.b(n.n(n.a(x))), a=conv(3, 16), n=nn.InstanceNorm2d(16, affine=True), b=conv(16, 4))
    return net, IMAGE, ("a.weight[0]", "n.weight[0]", "b.weight[1]")


@probe
def group_norm() -> Probe:
    """Whole groups go, with the statistics of the others untouched."""
    net = Net(lambda n, x: n.b(n.n(n.a(x))), a=conv(3, 16), n=nn.GroupNorm(4, 16), b=conv(16, 4))
    return net, IMAGE, ("a.weight[0]", "n.weight[0]", "b.weight[1]")


@probe
def layer_norm_beside() -> Probe:
    """The normalized stream stays, the hidden layer goes."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        return n.o(x + n.down(F.gelu(n.up(n.n(x)))))

    net = Net(forward, n=nn.LayerNorm(12), up=nn.Linear(12, 32), down=nn.Linear(32, 12), o=nn.Linear(12, 4))
    return net, (2, 7, 12), ("up.weight[0]", "down.weight[1]")


@probe
def group_norm_inside() -> Probe:
    """One group: its channels go, and the statistics are those of the others."""
    net = Net(lambda n, x: n.b(n.n(n.a(x))), a=conv(3, 16), n=nn.GroupNorm(1, 16), b=conv(16, 4))
    return net, IMAGE, ("a.weight[0]", "n.weight[0]", "b.weight[1]")


@probe
def layer_norm_stream() -> Probe:
    """The residual stream goes through norms, and its statistics are those of what is kept."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        x = n.i(x)
        return n.o(n.m(x + n.down(F.gelu(n.up(n.n(x))))))

    parts = {"i": nn.Linear(6, 12), "n": nn.LayerNorm(12), "m": nn.LayerNorm(12, eps=1e-3)}
    net = Net(forward, **parts, up=nn.Linear(12, 32), down=nn.Linear(32, 12), o=nn.Linear(12, 4))
    return net, (2, 7, 6), ("up.weight[0]", "down.weight[1]", "i.weight[0]", "n.weight[0]", "m.bias[0]", "o.weight[1]")


@probe
def layer_norm_of_maps() -> Probe:
    """LayerNorm over [C, H, W]."""
    net = Net(lambda n, x: n.b(n.n(n.a(x))), a=conv(3, 16), n=nn.LayerNorm([16, 8, 8]), b=conv(16, 4))
    return net, IMAGE, ("a.weight[0]", "n.weight[0]", "b.weight[1]")


@probe
def layer_norm_channels_last() -> Probe:
    """A norm over channels in the layout [N, H, W, C], without parameters."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.layer_norm(n.a(x).permute(0, 2, 3, 1), (16,))
        return n.b(y.permute(0, 3, 1, 2))

    return Net(forward, a=conv(3, 16), b=conv(16, 4)), IMAGE, ("a.weight[0]", "b.weight[1]")


@probe
def layer_norm_of_concat() -> Probe:
    """Patch merging: four strided neighbours side by side, a norm, and a reduction."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        y = n.a(x).permute(0, 2, 3, 1)
        y = torch.cat([y[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return n.r(n.n(y))

    net = Net(forward, a=conv(3, 16), n=nn.LayerNorm(64), r=nn.Linear(64, 4, bias=False))
    return net, IMAGE, ("a.weight[0]", "n.weight[0]", "r.weight[1]")


@probe
def rms_norm() -> Probe:
    """The default epsilon depends on the dtype and is kept."""
    net = Net(lambda n, x: n.o(n.n(n.i(x))), i=nn.Linear(6, 16), n=nn.RMSNorm(16), o=nn.Linear(16, 4))
    return net, (2, 7, 6), ("i.weight[0]", "n.weight[0]", "o.weight[1]")


@probe
def rms_norm_by_hand() -> Probe:
    """The mean square counts the original positions."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        y = n.i(x)
        return n.o(n.g * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)))

    net = Net(forward, i=nn.Linear(6, 16), g=nn.Parameter(torch.ones(16)), o=nn.Linear(16, 4))
    return net, (2, 7, 6), ("i.weight[0]", "g[0]", "o.weight[1]")


@probe
def layer_norm_by_hand() -> Probe:
    """`mean` and `std` of the stream, unbiased."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        y = n.i(x)
        return n.o((y - y.mean(-1, keepdim=True)) / (y.std(-1, keepdim=True) + 1e-6))

    return Net(forward, i=nn.Linear(6, 16), o=nn.Linear(16, 4)), (2, 7, 6), ("i.weight[0]", "o.weight[1]")


@probe
def variance() -> Probe:
    net = Net(
        lambda n, x: n.o(n.h(x) * n.i(x).var(1, correction=0)[:, None]),
        i=nn.Linear(6, 16),
        h=nn.Linear(6, 8),
        o=nn.Linear(8, 4),
    )
    return net, (2, 6), ("i.weight[0]", "h.weight[0]", "o.weight[1]")


@probe
def standardized_weights() -> Probe:
    """Weights standardized by batch_norm in training mode, as in NFNets: over what is kept of each filter."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        flat = n.w.reshape(1, 16, -1)
        weight = F.batch_norm(flat, None, None, n.g, training=True, momentum=0.0, eps=1e-6).reshape(n.w.shape)
        return n.b(F.conv2d(F.relu(n.a(x)), weight, padding=1))

    parts = {"w": nn.Parameter(torch.randn(16, 16, 3, 3)), "g": nn.Parameter(torch.ones(16))}
    return (
        Net(forward, a=conv(3, 16), b=conv(16, 4), **parts),
        IMAGE,
        ("a.weight[0]", "w[0]", "w[1]", "g[0]", "b.weight[1]"),
    )


@probe
def weight_norm() -> Probe:
    """Inputs of a normalized filter go too: its gain makes up for what its norm loses."""
    norm = torch.nn.utils.parametrizations.weight_norm
    net = Net(lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x))))), a=conv(3, 16), b=norm(conv(16, 16)), c=norm(conv(16, 4)))
    b, c = "b.parametrizations.weight.original", "c.parametrizations.weight.original"
    return net, IMAGE, (f"{b}0[0]", f"{b}1[0]", f"{b}1[1]", f"{c}1[1]")


@probe
def weight_norm_by_position() -> Probe:
    """A gain for each position of the kernel, as in wav2vec 2.0."""
    norm = torch.nn.utils.parametrizations.weight_norm
    middle = norm(nn.Conv1d(16, 16, 3, padding=1, groups=2), dim=2)
    net = Net(lambda n, x: n.c(F.gelu(n.b(n.a(x)))), a=nn.Conv1d(3, 16, 1), b=middle, c=nn.Conv1d(16, 4, 1))
    b = "b.parametrizations.weight.original1"
    return net, (2, 3, 9), ("a.weight[0]", f"{b}[0]", f"{b}[1]", "c.weight[1]")


@probe
def heads_beside_the_batch() -> Probe:
    """nn.MultiheadAttention keeps tokens first and merges heads with the dynamic batch."""
    net = Net(
        lambda n, x: n.c(n.m(n.a(x))), a=nn.Linear(6, 16), m=nn.TransformerEncoderLayer(16, 4, 32), c=nn.Linear(16, 3)
    )
    return net, (2, 5, 6), ("m.self_attn.in_proj_weight[0]", "m.self_attn.out_proj.weight[1]", "m.linear1.weight[0]")


@probe
def negative_and_reflected_padding_of_space() -> Probe:
    return between(lambda x: F.pad(F.pad(x, (-1, 1, 2, -2)), (1, 1, 1, 1), mode="reflect"), 16, 16)


@probe
def bilinear_pooling() -> Probe:
    """The product of two feature axes, flattened, is read by a linear layer."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        return n.c((n.a(x).flatten(2) @ n.b(x).flatten(2).transpose(1, 2)).flatten(1))

    net = Net(forward, a=conv(3, 8), b=conv(3, 6), c=nn.Linear(48, 5))
    return net, IMAGE, ("a.weight[0]", "b.weight[0]", "c.weight[1]")


@probe
def token_mixing() -> Probe:
    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(n.a(x)).flatten(2)  # [b, channels, tokens]
        x = x + n.down(F.gelu(n.up(x)))
        return n.o(x.transpose(1, 2))

    net = Net(forward, a=conv(3, 16), up=nn.Linear(64, 24), down=nn.Linear(24, 64), o=nn.Linear(16, 4))
    return net, IMAGE, ("a.weight[0]", "up.weight[0]", "down.weight[1]", "o.weight[1]")


def attend(n: Net, x: torch.Tensor, heads: int, fused: bool) -> torch.Tensor:
    q, k, v = n.qkv(x).view(x.shape[0], -1, 3, heads, 6).permute(2, 0, 3, 1, 4).unbind(0)
    if fused:
        y = F.scaled_dot_product_attention(q, k, v)
    else:
        y = torch.softmax(q @ k.transpose(-2, -1) * 6**-0.5, -1) @ v
    return n.o(y.transpose(1, 2).reshape(x.shape[0], -1, heads * 6))


@probe
def attention_by_matmul() -> Probe:
    net = Net(lambda n, x: attend(n, x, 4, False), qkv=nn.Linear(10, 72), o=nn.Linear(24, 5))
    return net, (2, 7, 10), ("qkv.weight[0]", "qkv.bias[0]", "o.weight[1]")


@probe
def attention_fused() -> Probe:
    net = Net(lambda n, x: attend(n, x, 4, True), qkv=nn.Linear(10, 72), o=nn.Linear(24, 5))
    return net, (2, 7, 10), ("qkv.weight[0]", "o.weight[1]")


@probe
def grouped_query_attention() -> Probe:
    """Two heads of keys and values serve eight of queries."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        q = n.q(x).view(x.shape[0], -1, 8, 6).transpose(1, 2)
        k, v = (p(x).view(x.shape[0], -1, 2, 6).transpose(1, 2) for p in (n.k, n.v))
        k, v = (t[:, :, None].expand(-1, -1, 4, -1, -1).reshape(x.shape[0], 8, -1, 6) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return n.o(y.transpose(1, 2).flatten(2))

    net = Net(forward, q=nn.Linear(10, 48), k=nn.Linear(10, 12), v=nn.Linear(10, 12), o=nn.Linear(48, 5))
    return net, (2, 7, 10), ("q.weight[0]", "k.weight[0]", "v.weight[0]", "o.weight[1]")


@probe
def mean_over_channels() -> Probe:
    """CBAM's spatial attention: the mean keeps its original count."""
    net = Net(lambda n, x: n.b(n.a(x).mean(1, keepdim=True)), a=conv(3, 16), b=conv(1, 4))
    return net, IMAGE, ("a.weight[0]",)


@probe
def sum_over_channels() -> Probe:
    net = Net(lambda n, x: n.b(F.relu(n.a(x)).sum(1, keepdim=True)), a=conv(3, 16), b=conv(1, 4))
    return net, IMAGE, ("a.weight[0]",)


@probe
def normalized_features() -> Probe:
    net = Net(lambda n, x: n.b(F.normalize(n.a(x), dim=-1)), a=nn.Linear(6, 16), b=nn.Linear(16, 4))
    return net, (2, 6), ("a.weight[0]", "b.weight[1]")


@probe
def maximum_beside() -> Probe:
    """A maximum over channels keeps them; what comes before may go."""
    net = Net(lambda n, x: n.b(n.c(F.relu(n.a(x))).amax(1, keepdim=True)), a=conv(3, 16), c=conv(16, 8), b=conv(1, 4))
    return net, IMAGE, ("a.weight[0]", "c.weight[1]")


@probe
def gated_linear_unit() -> Probe:
    return between(lambda x: F.glu(x, 1), 32, 16)


@probe
def matmul_with_parameter() -> Probe:
    net = Net(
        lambda n, x: torch.addmm(n.c, F.relu(x @ n.w), n.v),
        w=nn.Parameter(torch.zeros(6, 16)),
        v=nn.Parameter(torch.zeros(16, 5)),
        c=nn.Parameter(torch.zeros(5)),
    )
    return net, (2, 6), ("w[1]", "v[0]")


@probe
def repeated_channels() -> Probe:
    return between(lambda x: torch.cat([x.repeat(1, 2, 1, 1), x.repeat_interleave(2, 1)], 1), 8, 32)


@probe
def stack_and_sum() -> Probe:
    net = Net(lambda n, x: n.d(torch.stack([n.a(x), n.b(x)], 1).sum(1)), a=conv(3, 16), b=conv(3, 16), d=conv(16, 4))
    return net, IMAGE, ("a.weight[0]", "b.weight[0]", "d.weight[1]")


@probe
def upsample_and_concat() -> Probe:
    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        small = F.relu(n.b(F.max_pool2d(F.relu(n.a(x)), 2)))
        return n.c(torch.cat([F.interpolate(small, scale_factor=2.0, mode="bilinear"), x], 1))

    return (
        Net(forward, a=conv(3, 16), b=conv(16, 8), c=conv(11, 4)),
        IMAGE,
        ("a.weight[0]", "b.weight[0]", "c.weight[1]"),
    )


@probe
def unknown_op_beside() -> Probe:
    """What an op without a rule touches stays; the rest is pruned."""
    net = Net(lambda n, x: n.c(F.relu(n.b(torch.special.i0e(n.a(x))))), a=conv(3, 16), b=conv(16, 16), c=conv(16, 4))
    return net, IMAGE, ("b.weight[0]", "c.weight[1]")


@probe
def recurrent_beside() -> Probe:
    net = Net(
        lambda n, x: n.o(F.relu(n.h(n.rnn(x)[0]))),
        rnn=nn.LSTM(6, 8, batch_first=True),
        h=nn.Linear(8, 16),
        o=nn.Linear(16, 4),
    )
    return net, (2, 5, 6), ("h.weight[0]", "o.weight[1]")


def recurrent(kind: type[nn.RNNBase], **options: object) -> Probe:
    """A recurrent layer behind and before linear ones: its hidden size goes, in all layers and directions."""
    layer = kind(8, 12, batch_first=True, **options)  # type: ignore[arg-type]
    width = 24 if layer.bidirectional else 12
    net = Net(lambda n, x: n.o(n.rnn(n.i(x))[0]), i=nn.Linear(6, 8), rnn=layer, o=nn.Linear(width, 4))
    last = f"rnn.weight_hh_l{layer.num_layers - 1}"
    return net, (2, 5, 6), ("i.weight[0]", "rnn.weight_ih_l0[0]", "rnn.weight_ih_l0[1]", f"{last}[1]", "o.weight[1]")


@probe
def lstm() -> Probe:
    return recurrent(nn.LSTM)


@probe
def lstm_deep_both_ways() -> Probe:
    return recurrent(nn.LSTM, num_layers=2, bidirectional=True)


@probe
def gru() -> Probe:
    return recurrent(nn.GRU, num_layers=2)


@probe
def rnn_without_bias() -> Probe:
    return recurrent(nn.RNN, bias=False, nonlinearity="relu")


@probe
def gru_last_state() -> Probe:
    net = Net(
        lambda n, x: n.o(n.rnn(x)[1][-1]), rnn=nn.GRU(6, 12, batch_first=True, bidirectional=True), o=nn.Linear(12, 4)
    )
    return net, (2, 5, 6), ("rnn.weight_hh_l0[0]", "rnn.weight_hh_l0_reverse[1]", "o.weight[1]")


@probe
def einsum_attention() -> Probe:
    """Heads and their features by einsum, with an ellipsis in the projections."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("...c,chd->...hd", x, w) for w in (n.q, n.k, n.v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
        return torch.einsum("bhij,bjhd,hdc->bic", scores.softmax(-1), v, n.o)

    weights = {name: nn.Parameter(torch.randn(6, 4, 8)) for name in "qkv"}
    net = Net(forward, **weights, o=nn.Parameter(torch.randn(4, 8, 5)))
    return net, (2, 7, 6), ("q[1]", "q[2]", "v[2]", "o[0]", "o[1]")


@probe
def einsum_implicit() -> Probe:
    net = Net(
        lambda n, x: n.o(torch.einsum("ij,jk", n.i(x), n.w)),
        i=nn.Linear(6, 16),
        w=nn.Parameter(torch.randn(16, 12)),
        o=nn.Linear(12, 3),
    )
    return net, (2, 6), ("i.weight[0]", "w[0]", "w[1]", "o.weight[1]")


@probe
def maximum_over_tokens() -> Probe:
    net = Net(
        lambda n, x: n.o(n.i(x).max(1)[0] + n.h(x).topk(2, 1)[0].sum(1)),
        i=nn.Linear(6, 16),
        h=nn.Linear(6, 16),
        o=nn.Linear(16, 3),
    )
    return net, (2, 7, 6), ("i.weight[0]", "h.weight[0]", "o.weight[1]")


@probe
def sorted_tokens() -> Probe:
    net = Net(lambda n, x: n.o(n.i(x).sort(1)[0]), i=nn.Linear(6, 16), o=nn.Linear(16, 3))
    return net, (2, 7, 6), ("i.weight[0]", "o.weight[1]")


@probe
def unfold() -> Probe:
    net = Net(lambda n, x: n.b(F.unfold(n.a(x), 3, padding=1)), a=conv(3, 8), b=nn.Conv1d(72, 16, 1))
    return net, IMAGE, ("a.weight[0]", "b.weight[1]")


@probe
def fold_back() -> Probe:
    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        return n.c(F.fold(F.relu(n.b(F.unfold(x, 2, stride=2))), (8, 8), 2, stride=2))

    return Net(forward, b=nn.Conv1d(12, 32, 1), c=conv(8, 4)), IMAGE, ("b.weight[0]", "c.weight[1]")


@probe
def weights_from_the_input() -> Probe:
    """A convolution with as many groups as examples: what its rule cannot read stays, the rest is pruned."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        y, batch = n.a(x), x.shape[0]
        weight = (n.r(y.mean((2, 3))).sigmoid() @ n.w).view(batch * 6, 12, 3, 3)
        z = F.conv2d(y.reshape(1, batch * 12, 8, 8), weight, padding=1, groups=batch).view(batch, 6, 8, 8)
        return n.d(F.relu(n.c(z)))

    parts = {"a": conv(3, 12), "r": nn.Linear(12, 4), "c": conv(6, 16), "d": conv(16, 4)}
    return Net(forward, **parts, w=nn.Parameter(torch.randn(4, 6 * 12 * 9))), IMAGE, ("c.weight[0]", "d.weight[1]")


@probe
def attention_weights_needed() -> Probe:
    """nn.MultiheadAttention that returns its weights: batch and heads share a dimension."""
    net = Net(lambda n, x: n.o(n.m(x, x, x)[0]), m=nn.MultiheadAttention(16, 4, batch_first=True), o=nn.Linear(16, 3))
    return net, (2, 7, 16), ("m.in_proj_weight[0]", "m.out_proj.weight[0]", "m.out_proj.weight[1]", "o.weight[1]")


@probe
def sizes_that_are_equal_by_chance() -> Probe:
    """Two heads at batch two: a dimension of heads is no dimension of examples, though both have size 2."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        y = n.a(x).view(-1, 5, 2, 8).permute(2, 0, 1, 3)  # heads, batch, tokens, features
        return n.o(y.flatten(0, 1).relu().unflatten(0, (2, -1)).permute(1, 2, 0, 3).flatten(2))

    return Net(forward, a=nn.Linear(6, 16), o=nn.Linear(16, 3)), (2, 5, 6), ("a.weight[0]", "o.weight[1]")


@probe
def similarity() -> Probe:
    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        return n.o(F.cosine_similarity(n.a(x)[:, :, None], n.b(x)[:, None], dim=-1))

    parts = {"a": nn.Linear(6, 16), "b": nn.Linear(6, 16), "o": nn.Linear(5, 3)}
    return Net(forward, **parts), (2, 5, 6), ("a.weight[0]", "b.weight[0]")


@probe
def tokens_by_index() -> Probe:
    """gather of tokens by data, with the index expanded over the features."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        order = x[..., 0].argsort(1)[:, :3]
        y = n.i(x)
        return n.o(y.gather(1, order[..., None].expand(-1, -1, 16)))

    return Net(forward, i=nn.Linear(6, 16), o=nn.Linear(16, 3)), (2, 7, 6), ("i.weight[0]", "o.weight[1]")


@probe
def causal_mask_by_hand() -> Probe:
    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = n.q(x), n.k(x), n.v(x)
        scores = (q @ k.transpose(1, 2)).masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
        return n.o(scores.softmax(-1) @ v)

    parts = {name: nn.Linear(6, 16) for name in "qkv"}
    return (
        Net(forward, **parts, o=nn.Linear(16, 3)),
        (2, 7, 6),
        ("q.weight[0]", "k.weight[0]", "v.weight[0]", "o.weight[1]"),
    )


@probe
def bilinear() -> Probe:
    net = Net(
        lambda n, x: n.o(n.w(n.a(x), n.b(x))),
        a=nn.Linear(6, 12),
        b=nn.Linear(6, 8),
        w=nn.Bilinear(12, 8, 16),
        o=nn.Linear(16, 3),
    )
    return net, (2, 6), ("a.weight[0]", "b.weight[0]", "w.weight[0]", "w.weight[1]", "w.weight[2]", "o.weight[1]")


@probe
def sampled_at_a_grid_per_channel() -> Probe:
    """Channels moved into the batch, each with places of its own, as deformable layers do."""

    def forward(n, x):
        h, (b, _, height, width) = n.a(x), x.shape
        grid = n.g(h).view(b, 8, 2, height, width).permute(0, 1, 3, 4, 2).tanh()
        moved = F.grid_sample(h.reshape(-1, 1, height, width), grid.reshape(-1, height, width, 2), align_corners=True)
        return n.b(moved.view(b, 8, height, width))

    net = Net(forward, a=conv(3, 8), g=conv(8, 16, 1), b=conv(8, 4))
    return net, IMAGE, ()


@probe
def clamped_by_parameters() -> Probe:
    """A learned threshold for each channel."""
    net = Net(
        lambda n, x: n.b(n.a(x).clamp(min=-n.cap, max=n.cap).clamp_min(n.low)),
        a=nn.Linear(6, 16), b=nn.Linear(16, 4), cap=nn.Parameter(torch.rand(16)), low=nn.Parameter(-torch.rand(16)),
    )  # fmt: skip
    return net, (3, 6), ("a.weight[0]", "a.bias[0]", "cap[0]", "low[0]", "b.weight[1]")


@probe
def viewed_as_another() -> Probe:
    def forward(n, x):
        h = n.a(x)
        return n.b(n.l(h.flatten(2).mT).mT.reshape_as(h))

    net = Net(forward, a=conv(3, 16), l=nn.Linear(16, 16), b=conv(16, 4))
    return net, IMAGE, ("a.weight[0]", "l.weight[0]", "l.weight[1]", "b.weight[1]")


@probe
def sampled_at_a_grid() -> Probe:
    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        grid = torch.tanh(n.g(x)).permute(0, 2, 3, 1)
        return n.b(F.grid_sample(n.a(x), grid, align_corners=False))

    return Net(forward, a=conv(3, 16), g=conv(3, 2), b=conv(16, 4)), IMAGE, ("a.weight[0]", "b.weight[1]")


@probe
def multi_head_attention_module() -> Probe:
    """nn.MultiheadAttention: fused qkv, and heads in a view beside the batch."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        y = n.i(x)
        return n.o(y + n.m(y, y, y, need_weights=False)[0])

    net = Net(forward, i=nn.Linear(6, 16), m=nn.MultiheadAttention(16, 4, batch_first=True), o=nn.Linear(16, 3))
    return (
        net,
        (2, 7, 6),
        ("i.weight[0]", "m.in_proj_weight[0]", "m.in_proj_weight[1]", "m.out_proj.weight[1]", "o.weight[1]"),
    )


@probe
def transformer_encoder_module() -> Probe:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
    net = Net(
        lambda n, x: n.o(n.e(n.i(x))),
        i=nn.Linear(6, 16),
        e=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        o=nn.Linear(16, 3),
    )
    return (
        net,
        (2, 7, 6),
        ("i.weight[0]", "e.layers.1.linear1.weight[0]", "e.layers.0.self_attn.in_proj_weight[0]", "o.weight[1]"),
    )


@probe
def rotary() -> Probe:
    """Rotary embeddings: features i and i + d/2 of a head are one pair, with one frequency."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(7.0), n.frequencies)
        cos, sin = (torch.cat((f, f), -1)[None, None] for f in (angles.cos(), angles.sin()))
        q, k, v = (w(x).view(-1, 7, 4, 8).transpose(1, 2) for w in (n.q, n.k, n.v))
        q, k = (t * cos + torch.cat((-t[..., 4:], t[..., :4]), -1) * sin for t in (q, k))
        return n.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    parts = {name: nn.Linear(6, 32) for name in "qkv"}
    net = Net(forward, **parts, o=nn.Linear(32, 3), frequencies=10.0 ** -torch.arange(4.0))
    return net, (2, 7, 6), ("q.weight[0]", "v.weight[0]", "frequencies[0]", "o.weight[1]")


@probe
def relative_position_bias() -> Probe:
    """A table of biases by constant two-dimensional indices, heads last, as in Swin."""

    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = n.qkv(x).reshape(-1, 9, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * 6**-0.5 @ k.transpose(-2, -1) + n.table[n.index.view(-1)].view(9, 9, -1).permute(2, 0, 1)
        return n.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 9, 24))

    index = torch.arange(9)[:, None] - torch.arange(9)[None] + 8
    net = Net(forward, qkv=nn.Linear(8, 72), o=nn.Linear(24, 3), table=nn.Parameter(torch.randn(17, 4)), index=index)
    return net, (2, 9, 8), ("qkv.weight[0]", "table[1]", "o.weight[1]")


@probe
def pyramid_of_heads() -> Probe:
    """A view(h, -1) and a mean over the heads' features."""
    net = Net(lambda n, x: n.o(n.a(x).view(x.shape[0], 4, -1).mean(1)), a=nn.Linear(6, 32), o=nn.Linear(8, 4))
    return net, (2, 6), ("a.weight[0]", "o.weight[1]")


# -- the proof ----------------------------------------------------------------------------------------------------


def redraw(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5 + 0.1)
        for name, b in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b.copy_(torch.rand(b.shape, generator=generator) + 0.5)


def with_zero_weights(program: fxpress.Program, plan: PruningPlan) -> fxpress.Program:
    """The original with every removed slice of every parameter and buffer set to zero."""
    copy = program.copy()
    tensors = copy.state_dict()
    for r in plan.removals:
        tensors[r.name].index_fill_(r.dim, torch.tensor(r.removed), 0.0)
    return copy


def double_outputs(program: fxpress.Program, x: torch.Tensor) -> torch.Tensor:
    return in_double(program).run_flat((x.double(),))[0]


# Where zero weights say nothing: a weight norm divides by the zero that was put there, and other norms count it.
NO_ZERO_WEIGHTS = {
    "weight_norm",
    "weight_norm_by_position",
    "group_norm",
    "group_norm_inside",
    "heads_beside_the_batch",
    "rms_norm",
    "variance",
    "standardized_weights",
    "transformer_encoder_module",
}


def says_nothing(name: str) -> bool:
    return name in NO_ZERO_WEIGHTS or (name.startswith("layer_norm") and name != "layer_norm_beside")


@pytest.mark.parametrize("name", PROBES)
def test_pruned_equals_masked(name: str) -> None:
    module, shape, shrunk = PROBES[name]()
    module.eval()
    redraw(module)
    program = fxpress.capture(module, (torch.randn(shape, generator=torch.Generator().manual_seed(0)),))
    plan = plan_pruning(program, ratio=0.5)
    before = {n: tuple(t.shape) for n, t in program.state_dict().items()}
    pruned, masked, zeroed = plan.apply(program), plan.mask(program), with_zero_weights(program, plan)
    after = {n: tuple(t.shape) for n, t in pruned.state_dict().items()}

    for place in shrunk:
        parameter, dim = place[:-1].split("[")
        assert after[parameter][int(dim)] < before[parameter][int(dim)], f"{place} was not pruned"
    assert {n: tuple(t.shape) for n, t in program.state_dict().items()} == before
    assert oracle_error(masked, pruned) <= 1e-9
    assert count_macs(pruned) == plan.macs[1] < plan.macs[0] == count_macs(program)
    assert pruned.parameter_count == plan.parameters[1]
    for batch in (1, 2, 5):
        x = torch.randn((batch, *shape[1:]), generator=torch.Generator().manual_seed(batch))
        expected = double_outputs(masked, x)
        assert expected.std() > 0
        assert relative_difference(double_outputs(pruned, x), expected) <= 1e-9
        assert relative_difference(double_outputs(zeroed, x), expected) <= 1e-9 or says_nothing(name)
        # The mask takes something away: agreement with it is not empty.
        assert relative_difference(double_outputs(program, x), expected) > 1e-3


@pytest.mark.parametrize("name", ["weight_norm", "weight_norm_by_position"])
def test_the_gain_makes_up_for_what_a_weight_norm_loses(name: str) -> None:
    """The kept weights do not change: with the removed ones zeroed after the norm, the original gives the same."""
    module, shape, _ = PROBES[name]()
    redraw(module.eval())
    program = fxpress.capture(module, (torch.randn(shape),))
    plan = plan_pruning(program, ratio=0.5)
    pruned = plan.apply(program)
    removed = {(r.name, r.dim): r.removed for r in plan.removals}
    kept = {n.name: _norm_weight(pruned, n) for n in pruned.graph.nodes if "weight_norm" in str(n.target)}
    for node in (n for n in program.graph.nodes if n.name in kept):
        weight = _norm_weight(program, node)
        for dim in range(weight.ndim):
            gone = removed.get((str(node.args[0].target), dim), ())
            weight = weight.index_select(dim, torch.tensor([i for i in range(weight.shape[dim]) if i not in gone]))
        torch.testing.assert_close(kept[node.name], weight, rtol=1e-6, atol=1e-6)


def _norm_weight(program: fxpress.Program, node: torch.fx.Node) -> torch.Tensor:
    v, g = (program.state_dict()[str(a.target)] for a in node.args[:2])
    return torch._weight_norm(v, g, argument(node, "dim"))


@pytest.mark.parametrize("name", PROBES)
def test_every_parameter_is_in_a_group_or_pinned_with_a_reason(name: str) -> None:
    module, shape, _ = PROBES[name]()
    analysis = analyze(fxpress.capture(module.eval(), (torch.randn(shape),)))
    found = coverage(analysis)
    assert found.unexplained == 0
    assert found.grouped + found.pinned == sum(p.numel() for p in module.parameters())
