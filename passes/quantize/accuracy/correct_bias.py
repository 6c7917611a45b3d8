"""Empirical bias correction: no layer's mean output moves by quantization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ....errors import OptionError
from ....frontend.program import Program
from ...base import INTERFACE, Change, Context, Pass, register_pass
from ...prune.recovery.partial_run import Front, PartialRun, by_depth
from ...rewrite import (
    argument,
    aten,
    call_before,
    constant,
    fake_like,
    is_constant,
    is_op,
    put_constant,
    set_argument,
    update_constant,
)
from ..spec import Target
from .float_twin import FLOAT_TWIN, IntegerLayer, Twins, make_twins
from .trials import Batch, Verdict, judge_outputs, required_target, split_samples

_JUDGE = 32
_FRONT_BYTES = 1 << 28
_LIMIT = 2**30  # of a stored bias: half of int32, so that adding the products cannot overflow


@register_pass
@dataclass(frozen=True)
class CorrectBias(Pass):
    """Shift the bias of each integer layer by what quantization shifted its mean output.

    Nagel et al. 2019 (arXiv 1906.04721), section 4.2, in its empirical form: b' = b + E[y] - E[y_q] per output channel,
    where y is the float layer's output (before its activation) and y_q that of the integer layer in the quantized
    network. Instead of the mean over all samples, the median of the samples' own differences is taken: where a range
    clips a few huge values, their mean difference is nothing that other samples should be shifted by (MobileNetV2:
    11.7 dB by the mean, 21.4 dB by the median, 19.4 dB without). Layers are corrected in order, each behind the
    corrected ones before it; of `samples` calibration samples only their channels' means are held.
    The correction goes into the int32 bias (a layer without one gets one), so it costs nothing. Kept only if the
    outputs on samples that it was not fitted to come closer to the float program's.
    """

    name = "correct-bias"
    preserves = frozenset({INTERFACE})
    reads = frozenset({FLOAT_TWIN})

    samples: int = 256

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise OptionError(f"correct-bias.samples is {self.samples}", hint="give 1 or more; 256 is the default")

    def run(self, program: Program, context: Context) -> Change:
        twins = make_twins(program, context, self.name)
        samples = split_samples(program, context.calibration, self.samples, _JUDGE, self.name)
        trial = program.copy()
        count = correct_biases(make_twins(trial, context, self.name), samples.fit, context)
        trial.graph_module.recompile()
        verdict = Verdict(*judge_outputs(twins.floating, [program, trial], samples.judge))
        if verdict.helps:
            program.graph_module = trial.graph_module
        return Change(count if verdict.helps else 0, [verdict.told(f"correcting the biases of {count} layers")])


def correct_biases(twins: Twins, batches: list[Batch], context: Context) -> int:
    """Correct all layers in place, level by level. Returns how many."""
    target, layers = required_target(context), {layer.node: layer for layer in twins.layers()}
    expected = _means(PartialRun(twins.floating, [k.twin for k in layers.values()]), batches)
    front = Front(twins.program, layers, _FRONT_BYTES)
    done = 0
    for stage, level in enumerate(by_depth(twins.program, layers)):
        front.start(stage, level)
        got = _means(front, batches)
        for node in level:
            shift_bias(twins.program, layers[node], typical(expected[layers[node].twin] - got[node]), target)
        done += len(level)
        if context.progress:
            context.progress(CorrectBias.name, done, len(layers))
    return len(layers)


def typical(shifts: torch.Tensor) -> torch.Tensor:
    """The median over samples of [samples, channels], float64[channels]."""
    ordered, count = shifts.double().sort(0).values, len(shifts)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def _means(run: PartialRun | Front, batches: list[Batch]) -> dict[fx.Node, torch.Tensor]:
    """The mean of each output channel of each wanted node for each sample, float32[samples, channels]."""
    found: dict[fx.Node, list[torch.Tensor]] = {}
    for number, batch in enumerate(batches):
        with torch.no_grad():
            values = run(number, batch) if isinstance(run, Front) else run(batch)
        for node, value in values.items():
            found.setdefault(node, []).append(sample_means(node, value, batch))
    return {node: torch.cat(parts) for node, parts in found.items()}


def sample_means(layer: fx.Node, value: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The mean of each channel for each sample of the batch (as one, where its rows are not the samples')."""
    channels = by_channel(layer, value)
    samples = int(batch[0].shape[0]) if batch[0].ndim else 1
    if channels.shape[1] % samples:
        samples = 1
    return channels.reshape(len(channels), samples, -1).mean(2).t().float()


def by_channel(layer: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """A layer's output as [channels, values], float64."""
    dim = value.ndim - 1 if is_op(layer, aten.linear.default) else 1
    return value.transpose(0, dim).flatten(1).double()


def shift_bias(program: Program, layer: IntegerLayer, shift: torch.Tensor, target: Target) -> None:
    """Add `shift` [channels] to the layer's bias, in integers where the target's biases are stored so."""
    bias = argument(layer.node, "bias")
    if is_op(bias, torch.ops.fxpress.dequantize_channel.default):
        stored, scales = constant(program, bias.args[0]), constant(program, bias.args[1])
        assert stored is not None
        assert scales is not None
        update_constant(program, bias.args[0], _stored_bias(shift, scales, stored))
    elif is_constant(bias):
        old = constant(program, bias)
        assert old is not None
        update_constant(program, bias, (old.detach().double() + shift).to(old.dtype))
    elif bias is None:
        _new_bias(program, layer, shift, target)


def _stored_bias(shift: torch.Tensor, scales: torch.Tensor, old: torch.Tensor | None = None) -> torch.Tensor:
    q = torch.round(shift / scales.double()) + (0 if old is None else old.double())
    return q.clamp(-_LIMIT, _LIMIT).to(torch.int32)


def _new_bias(program: Program, layer: IntegerLayer, shift: torch.Tensor, target: Target) -> None:
    """A bias for a layer without one: in float, or at the scale input x weight; none where the input's scale is not to
    be found."""
    path = f"{str(layer.weight.target).rpartition('.')[0]}.bias".lstrip(".")
    if target.bias is None:
        set_argument(layer.node, "bias", put_constant(program, path, torch.nn.Parameter(shift.float()), layer.node))
        return
    source = layer.node.args[0]
    while isinstance(source, fx.Node) and is_op(source, aten.constant_pad_nd.default):
        source = source.args[0]
    if not is_op(source, torch.ops.fxpress.dequantize.default):
        return
    scales = layer.scales * torch.tensor(source.args[1], dtype=torch.float32)  # type: ignore[union-attr]
    stored = put_constant(program, path, _stored_bias(shift, scales), layer.node)
    scale = put_constant(program, f"{stored.target}_scale", scales, layer.node)
    value = fake_like(layer.node, torch.empty(shift.shape))
    read = call_before(layer.node, torch.ops.fxpress.dequantize_channel.default, stored, scale, 0, value=value)
    set_argument(layer.node, "bias", read)
