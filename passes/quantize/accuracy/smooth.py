"""SmoothQuant: move the outliers of activations into weights, which take them better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ....errors import OptionError
from ....frontend.operators import dequantize, quantize
from ....frontend.program import Program, layer_name
from ...base import INTERFACE, VALUES, Change, Context, Pass, register_pass
from ...fuse_batchnorm import scale_inputs
from ...prune.recovery.partial_run import PartialRun
from ...rewrite import aten, constant, is_op
from ..fold import quantize_weight, weight_scales
from ..spec import QuantParams, Target, choose_params
from .products import drop_ones, insert_products
from .scaling import Link, Reader, divide_outputs, find_link, groups_of, input_ranges, multiply_inputs
from .trials import Batch, judge_quantized, required_target, split_samples

_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_FIT, _JUDGE = 64, 32
_KEPT_BYTES = 1 << 25  # of the samples that the error of one layer is measured on
_LEAST = 1e-5  # no factor divides by less, as in the paper


@register_pass
@dataclass(frozen=True)
class Smooth(Pass):
    """Divide channels with outliers where they are made and multiply them where linear layers read them.

    SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): channel j of the input X of linear layers with weights W becomes
    X_j / s_j and W_j s_j, with s_j = max|X_j|^alpha / max|W_j|^(1 - alpha). The division goes into what makes X: the
    weights of a LayerNorm or RMSNorm, a vector that X was multiplied by, or the output channels of another layer, also
    through ops that commute with it (moves, ReLU, a product with another tensor). All layers that read X share s.

    Legal when all that read X are layers or such ops, and the weights belong to one layer alone. `alpha=auto` takes,
    site by site, the alpha with the least error of the quantized layers' outputs on calibration samples, or leaves the
    site alone. `convolutions=true` smooths what convolutions read as well; `insert=true` puts a product of its own
    before linear layers that read what others read too (one more float operation at each such place).
    With `when=helps` the whole program is quantized with and without, and the pass keeps the better.
    """

    name = "smooth"
    preserves = frozenset({VALUES, INTERFACE})

    alpha: float | Literal["auto"] = "auto"
    when: Literal["helps", "always"] = "helps"
    convolutions: bool = False
    insert: bool = False

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise OptionError(f"smooth.alpha is {self.alpha!r}", hint="give a number from 0 to 1, or auto")

    def run(self, program: Program, context: Context) -> Change:
        target = required_target(context)
        trial = program.copy()
        products = insert_products(trial, find_sites(trial, self.convolutions)) if self.insert else []
        links = find_sites(trial, self.convolutions)
        if not links:
            hint = "" if self.insert else " (insert=true makes such places)"
            return Change(0, [f"nothing to smooth: no linear layer alone reads a tensor that can be divided{hint}"])
        samples = split_samples(program, context.calibration, _FIT, _JUDGE, self.name)
        chosen = smooth_sites(trial, links, samples.fit, target, self.alpha)
        inserted = len(products) - drop_ones(trial, products)
        trial.graph_module.recompile()
        told = f"smoothing {len(chosen)} of {len(links)} sites" + _alphas(list(chosen.values()))
        told += f", {inserted} of them by a product of their own" if inserted else ""
        if not chosen:
            return Change(0, [f"{told}: at no site the layers behind it get more exact"])
        if self.when == "helps":
            verdict = judge_quantized(program, trial, samples, context)
            told = verdict.told(told)
            if not verdict.helps:
                return Change(0, [told])
        program.graph_module = trial.graph_module
        return Change(len(chosen), [told])


def _alphas(values: list[float]) -> str:
    return f" with alpha {min(values):g} to {max(values):g}" if values else ""


def find_sites(program: Program, convolutions: bool) -> list[Link]:
    """All links into linear layers; into convolutions too where asked for."""
    found = [find_link(program, n) for n in program.graph.nodes if n.op == "call_function"]
    links = [link for link in found if isinstance(link, Link)]
    return [k for k in links if convolutions or all(is_op(r.node, aten.linear.default) for r in k.readers)]


def smooth_sites(
    program: Program, links: list[Link], batches: list[Batch], target: Target, alpha: float | Literal["auto"]
) -> dict[str, float]:
    """Smooth in place. Returns the alpha of each site that was smoothed, by the name of what makes the tensor."""
    seen = observe_links(program, links, batches)
    chosen = {}
    for link in links:
        noted = seen[link.producer]
        best = best_alpha(program, link, noted, target) if alpha == "auto" else alpha
        if best is None:
            continue
        factors = smoothing(program, link, noted.largest, best)
        divide_outputs(program, link.producer, factors)
        for reader in link.readers:
            multiply_inputs(program, reader, factors)
        chosen[layer_name(link.producer)] = best
    return chosen


def best_alpha(program: Program, link: Link, seen: Seen, target: Target) -> float | None:
    """The alpha with the least error of the readers' outputs; None where no smoothing is better."""

    def error(factors: torch.Tensor) -> float:
        return output_error(program, link, seen.inputs, factors, target)

    errors = {a: error(smoothing(program, link, seen.largest, a)) for a in _ALPHAS}
    best = min(errors, key=errors.__getitem__)
    plain = error(torch.ones(link.channels, dtype=torch.float64))
    return best if errors[best] < plain else None


def smoothing(program: Program, link: Link, largest: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = max|X|^alpha / max|W|^(1 - alpha) per channel, float64; 1 for a channel that is always or everywhere zero."""
    weights = torch.stack([input_ranges(program, r, link.channels) for r in link.readers]).amax(0)
    dead = (largest <= 0) | (weights <= 0)
    factors = largest.clamp_min(_LEAST) ** alpha / weights.clamp_min(_LEAST) ** (1 - alpha)
    return torch.where(dead, 1.0, factors.clamp_min(_LEAST))


# -- what the samples show -----------------------------------------------------------------------------------------


@dataclass
class Seen:
    """Of one site: the largest |x| of each channel, and some inputs of each reader."""

    largest: torch.Tensor
    inputs: list[torch.Tensor]


def observe_links(program: Program, links: list[Link], batches: list[Batch]) -> dict[fx.Node, Seen]:
    """Run the samples and remember, for each link by its producer, what its readers read."""
    tensors = {r.node.args[0] for link in links for r in link.readers}
    run = PartialRun(program, tensors)  # type: ignore[arg-type]
    seen: dict[fx.Node, Seen] = {}
    for batch in batches:
        with torch.no_grad():
            values = run(batch)
        for link in links:
            inputs = [values[r.node.args[0]] for r in link.readers]  # type: ignore[index]
            largest = torch.stack([_largest(r, x) for r, x in zip(link.readers, inputs)]).amax(0)
            if link.producer in seen:
                seen[link.producer].largest = torch.maximum(seen[link.producer].largest, largest)
            else:
                seen[link.producer] = Seen(largest, [_few(x) for x in inputs])
    return seen


def _few(x: torch.Tensor) -> torch.Tensor:
    """As many samples as the memory for one layer holds, at least one."""
    return x[: max(1, _KEPT_BYTES // max(x[:1].nbytes, 1))].clone()


def _channel_dim(reader: Reader, x: torch.Tensor) -> int:
    return x.ndim - 1 if is_op(reader.node, aten.linear.default) else 1


def _largest(reader: Reader, x: torch.Tensor) -> torch.Tensor:
    """The largest |x| of each channel of the link, float64[channels]."""
    features = x.detach().abs().transpose(0, _channel_dim(reader, x)).flatten(1).amax(1).double()
    return features.reshape(-1, reader.repeat).amax(1)


def output_error(
    program: Program, link: Link, inputs: list[torch.Tensor], factors: torch.Tensor, target: Target
) -> float:
    """The squared error of the quantized readers' outputs, smoothed by `factors`, relative to their power."""
    total = 0.0
    for reader, x in zip(link.readers, inputs):
        weight = constant(program, reader.node.args[1])
        assert weight is not None
        compute = _layer(reader.node)
        spread = factors.repeat_interleave(reader.repeat)
        expected = compute(x, weight.detach())
        got = compute(_smoothed(reader, x, spread, target), _scaled(reader, weight.detach(), spread, target))
        total += float((got - expected).square().sum() / expected.square().sum().clamp_min(1e-30))
    return total


def _layer(node: fx.Node) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(input, weight) -> what the layer computes, without its bias."""
    rest: tuple[Any, ...] = node.args[3:]
    options = {k: v for k, v in node.kwargs.items() if k != "bias"}
    return lambda x, weight: node.target(x, weight, None, *rest, **options)  # type: ignore[operator]


def _smoothed(reader: Reader, x: torch.Tensor, factors: torch.Tensor, target: Target) -> torch.Tensor:
    shape = [1] * x.ndim
    shape[_channel_dim(reader, x)] = -1
    divided = (x.double() / factors.reshape(shape)).float()
    params: QuantParams = choose_params(float(divided.min()), float(divided.max()), target.activation)
    return dequantize(quantize(divided, params.scale, params.zero_point, params.dtype), params.scale, params.zero_point)


def _scaled(reader: Reader, weight: torch.Tensor, factors: torch.Tensor, target: Target) -> torch.Tensor:
    multiplied, _ = scale_inputs(weight.double(), factors, torch.zeros_like(factors), groups_of(reader.node))
    scales = weight_scales(multiplied.float(), target.weight, "minmax")
    q = quantize_weight(multiplied.float(), scales, target.weight)
    return q.float() * scales.reshape(-1, *[1] * (weight.ndim - 1))
