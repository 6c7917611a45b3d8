"""Masks of attention: those that hide nothing go, the others never make denormal numbers, and neither changes a result."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpress
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target
from fxpress.passes.base import Context
from fxpress.passes.manager import op_counts, run_passes
from fxpress.passes.quantize.masks import shield_masks
from fxpress.runtime.session import make_session

BATCH, TOKENS, WIDTH = 3, 12, 32
SOFTMAX = "aten.softmax.int"
ATTENTION = "aten.scaled_dot_product_attention.default"


def seen(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) > 0.4


def scores(q, k):
    return q @ k.transpose(-2, -1) / 4


def lowest(mask):
    return (1.0 - mask[:, None, None].float()) * torch.finfo(torch.float32).min


def swin_mask(q):
    group = q.new_zeros(TOKENS)
    group[4:] = 1
    return (group[:, None] - group[None]).masked_fill(group[:, None] != group[None], -100.0)


# Name -> how tokens are mixed, and the mask that the caller gives (None: the model knows).
MIXERS = {
    "bool mask": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m[:, None, None]), seen(BATCH, TOKENS)),
    "hidden rows": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), seen(BATCH, 1, TOKENS, TOKENS) & seen(TOKENS, 1)),
    "float mask": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=0.3), torch.randn(BATCH, 1, TOKENS, TOKENS) * 9),
    "causal": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, is_causal=True), None),
    "filled": (lambda q, k, v, m: scores(q, k).masked_fill(~m[:, None, None], -math.inf).softmax(-1) @ v, seen(BATCH, TOKENS)),
    "chosen": (lambda q, k, v, m: torch.where(m[:, None, None], scores(q, k), -1e9).softmax(-1) @ v, seen(BATCH, TOKENS)),
    "lowest": (lambda q, k, v, m: (scores(q, k) + lowest(m)).softmax(-1) @ v, seen(BATCH, TOKENS)),
    "blind to zero": (lambda q, k, v, m: scores(q, k).masked_fill(~m, -math.inf).softmax(-1).nan_to_num(0.0) @ v, seen(BATCH, 1, TOKENS, TOKENS) & seen(TOKENS, 1)),
    "constant": (lambda q, k, v, m: (scores(q, k) + swin_mask(q)).softmax(-1) @ v, None),
}  # fmt: skip
for _, given in MIXERS.values():
    if given is not None and given.dtype is torch.bool and given.ndim == 2:
        given[:, 0] = True


class Mixer(nn.Module):
    """Four heads over tokens."""

    def __init__(self, mix) -> None:
        super().__init__()
        self.mix, self.qkv, self.out = mix, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask=None):
        """[n, tokens, width], mask as the mixer wants it -> [n, tokens, width]."""
        q, k, v = self.qkv(x).reshape(x.shape[0], TOKENS, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.out(self.mix(q, k, v, mask).transpose(1, 2).flatten(2))


def captured(name, sharp: float = 1.0):
    torch.manual_seed(0)
    mix, mask = MIXERS[name]
    module = Mixer(mix).eval()
    with torch.no_grad():
        module.qkv.weight *= sharp
    inputs = (torch.randn(BATCH, TOKENS, WIDTH), *([] if mask is None else [mask]))
    return run_passes(fxpress.capture(module, inputs), "cleanup,canonicalize"), inputs


@pytest.mark.parametrize("sharp", [1.0, 12.0])
@pytest.mark.parametrize("name", MIXERS)
def test_a_shielded_softmax_is_the_same_function(name, sharp):
    """In PyTorch and in ONNX Runtime, whatever the spread of the scores; rows that see nothing give zeros."""
    program, inputs = captured(name, sharp)
    shielded = program.copy()
    assert shield_masks(shielded) == 1
    wanted, (got,) = program(*inputs), shielded.run_flat(inputs)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    (there,) = make_session(lower(shielded)).run(*(x.numpy() for x in inputs))
    torch.testing.assert_close(torch.from_numpy(there), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_no_softmax_makes_denormal_numbers(name):
    program, inputs = captured(name, 12.0)
    shield_masks(program)
    (node,) = [n for n in program.graph.nodes if str(n.target) == SOFTMAX]
    program.graph.output_node().args = ((node,),)
    (weights,) = torch.fx.Interpreter(program.graph_module).run(*inputs, enable_io_processing=False)
    assert float(weights.nan_to_num(1.0).min()) > 1e3 * torch.finfo(torch.float32).tiny


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def later() -> torch.Tensor:
    return torch.full((8, 8), -1e4).triu(1)


def test_what_needs_no_shield_has_none():
    """No mask, a bias that only dampens, another dim, weights that are read for themselves, numbers of half precision."""
    q = torch.randn(2, 4, 8, 16)
    bias = torch.linspace(-20, 3, 64).view(8, 8)
    for mix in (
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: (scores(x, x) + bias).softmax(-1) @ x,
        lambda x: x.softmax(1),
        lambda x: (scores(x, x) + later()).softmax(-1).log(),  # of what is hidden: -inf
        lambda x: ((scores(x, x) + later()).softmax(-1) > 0).sum(-1),
        lambda x: (scores(x, x).half() + later().half()).softmax(-1, dtype=torch.float32) @ x,
    ):
        program = run_passes(fxpress.capture(Calls(mix), q), "cleanup")
        before = op_counts(program)
        assert shield_masks(program) == 0
        assert op_counts(program) == before


@pytest.mark.parametrize("name", MIXERS)
def test_masked_networks_are_quantized(name):
    program, inputs = captured(name)
    artifact = fxpress.compile(program, calibration=[inputs] * 2)
    assert artifact.kept
    assert artifact.report["parity"]["layer_max_steps"] <= 1
    assert artifact.report["parity"]["output_within_1_step"] == 1
    integer = fxpress.quantize(program, [inputs])
    wanted = program(*inputs)
    assert 10 * torch.log10(wanted.square().sum() / (integer(*inputs) - wanted).square().sum()) > 30
    other = run_passes(program, "quantize", Context(load_target("tensorrt"), [inputs]))
    assert ("aten.amax.default" in op_counts(integer)) > ("aten.amax.default" in op_counts(other))


def test_dynamically_quantized_networks_are_shielded_too():
    program, inputs = captured("bool mask")
    target = load_target("ort-x86")
    made = run_passes(program, "quantize-dynamic", Context(target))
    assert "aten.amax.default" in op_counts(made)
    plain = run_passes(program, "quantize-dynamic", Context(dataclasses.replace(target, shields_masks=False)))
    torch.testing.assert_close(made(*inputs), plain(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kept", "masks"), [(torch.ones(1, 1, 1, 8, dtype=torch.bool), 0), (torch.zeros(8, 8), 0), (torch.ones(8, 8), 1)])
def test_a_mask_that_hides_nothing_goes(kept, masks):
    class Asks(nn.Module):
        """As models do that make a mask where none is given."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", kept)

        def forward(self, x):
            mask = self.kept.expand(x.shape[0], 1, 8, 8)
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x = torch.randn(3, 2, 8, 16)
    program = run_passes(fxpress.capture(Asks(), x), "cleanup")
    (attention,) = [n for n in program.graph.nodes if str(n.target) == ATTENTION]
    assert len(attention.all_input_nodes) - 1 == masks or len(set(attention.all_input_nodes)) == 1 + masks
    assert ("kept" in program.state_dict()) == bool(masks)
    torch.testing.assert_close(program(x), Asks()(x))


@pytest.mark.parametrize("target", ["ort-x86", "openvino", "ort-arm"])
def test_the_form_attention_gives_zeros_to_queries_that_see_nothing(target):
    """As attention does: softmax alone would give NaN, or the mean of all."""
    torch.manual_seed(0)
    mask = torch.zeros(TOKENS, TOKENS).masked_fill(~(seen(TOKENS, TOKENS) & seen(TOKENS, 1)), -math.inf)
    for hides in (lambda m: mask, lambda m: m.float().log()):
        module = Mixer(lambda q, k, v, m, h=hides: F.scaled_dot_product_attention(q, k, v, attn_mask=h(m))).eval()
        inputs = torch.randn(BATCH, TOKENS, WIDTH), seen(BATCH, 1, TOKENS, TOKENS) & seen(TOKENS, 1)
        program = run_passes(fxpress.capture(module, inputs), "cleanup,canonicalize")
        context = Context(load_target(target), [inputs])
        pipeline = "quantize{ranges=minmax}" if target == "openvino" else "quantize{ranges=minmax,forms=[attention]}"
        quantized = run_passes(program, pipeline, context)
        wanted = program(*inputs)
        error = (quantized(*inputs) - wanted).square().sum()
        assert 10 * torch.log10(wanted.square().sum() / error) > 25


def test_a_mask_may_depend_on_the_size_of_the_batch():
    module = Calls(lambda x: (scores(x, x) + x.new_full((8, 8), -1.0 * x.shape[0])).softmax(-1) @ x)
    program = run_passes(fxpress.capture(module, torch.randn(3, 4, 8, 16)), "cleanup")
    assert shield_masks(program) == 0


def test_a_bias_that_is_to_be_learned_stays():
    """Zeros for now."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(8, 8))

        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, attn_mask=self.bias)

    program = run_passes(fxpress.capture(Biased(), torch.randn(2, 4, 8, 16)), "cleanup")
    assert "bias" in dict(program.named_parameters())
