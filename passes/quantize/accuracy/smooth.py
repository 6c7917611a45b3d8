"""SmoothQuant: move the outliers of activations into weights, which take them better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ....errors import OptionError
from ....frontend.cost import count_macs
from ....frontend.operators import dequantize, quantize
from ....frontend.program import Program, layer_name
from ...base import INTERFACE, VALUES, Change, Context, Pass, register_pass
from ...fuse_batchnorm import scale_inputs
from ...prune.recovery.partial_run import PartialRun
from ...rewrite import aten, constant, is_op
from ..fold import quantize_weight, weight_scales
from ..spec import Target, choose_params
from .products import drop_ones, insert_products
from .scaling import Link, Reader, divide_outputs, find_link, groups_of, input_ranges, multiply_inputs
from .trials import Batch, judge_quantized, required_target, split_samples

_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_FIT, _LEAST_FIT = 64, 8  # samples to fit to; half as many judge
_WORK = 5e10  # multiplications that one run of the samples may take, the least number of them aside
_WORTH_A_PRODUCT = 10**0.2  # an error 2 dB less at the layers behind it
# Smoothed channels reach as far as one another, so that any of them may be cut off by what calibration did not see.
_LEAST_TOKENS = 256
_TOKENS = 512  # rows that the error of a linear layer is measured on
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
    site alone. `convolutions=true` smooths what convolutions read as well. `insert=true` puts a product of its own
    before linear layers that read what others read too (one more float operation at each such place); `insert=auto`
    does so behind normalizations, where outliers are made, and keeps the products that gain 2 dB at their layers.
    With `when=helps` the whole program is quantized with and without, and the pass keeps the better; what fewer than
    256 tokens were seen of is left alone.
    """

    name = "smooth"
    preserves = frozenset({VALUES, INTERFACE})
    writes_weights = False

    alpha: float | Literal["auto"] = "auto"
    when: Literal["helps", "always"] = "helps"
    convolutions: bool = False
    insert: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise OptionError(f"smooth.alpha is {self.alpha!r}", hint="give a number from 0 to 1, or auto")

    def run(self, program: Program, context: Context) -> Change:
        target = required_target(context)
        trial = program.copy(share_weights=True)
        products = self._insert(trial)
        links = find_sites(trial, self.convolutions)
        if not links:
            hint = "" if self.insert is True else " (insert=true makes such places)"
            return Change(0, [f"nothing to smooth: no linear layer alone reads a tensor that can be divided{hint}"])
        fit = min(_FIT, max(_LEAST_FIT, int(_WORK / max(count_macs(program), 1))))
        samples = split_samples(program, context.calibration, fit, fit // 2, self.name)
        dear = frozenset(products if self.insert == "auto" else ())
        least = _LEAST_TOKENS if self.when == "helps" else 1
        chosen = smooth_sites(trial, links, samples.fit, target, self.alpha, dear, least)
        inserted = len(products) - drop_ones(trial, products)
        trial.graph_module.recompile()
        told = f"smoothing {len(chosen)} of {len(links)} sites" + _alphas(list(chosen.values()))
        told += f", {inserted} of them by a product of their own" if inserted else ""
        if not chosen:
            return Change(0, [f"{told}: at no site the layers behind it get more exact, on {least} tokens or more"])
        if self.when == "helps":
            verdict = judge_quantized(program, trial, samples, context)
            told = verdict.told(told)
            if not verdict.helps:
                return Change(0, [told])
        program.graph_module = trial.graph_module
        return Change(len(chosen), [told])

    def _insert(self, program: Program) -> list[fx.Node]:
        """Products to take factors where no other place can."""
        if self.insert is False:
            return []
        links = find_sites(program, self.convolutions)
        return insert_products(program, links, behind_norms=self.insert == "auto")


def _alphas(values: list[float]) -> str:
    return f" with alpha {min(values):g} to {max(values):g}" if values else ""


def find_sites(program: Program, convolutions: bool) -> list[Link]:
    """All links into linear layers; into convolutions too where asked for."""
    found = [find_link(program, n) for n in program.graph.nodes if n.op == "call_function"]
    links = [link for link in found if isinstance(link, Link)]
    return [k for k in links if convolutions or all(is_op(r.node, aten.linear.default) for r in k.readers)]


def smooth_sites(
    program: Program,
    links: list[Link],
    batches: list[Batch],
    target: Target,
    alpha: float | Literal["auto"],
    dear: frozenset[fx.Node] = frozenset(),
    least_tokens: int = 1,
) -> dict[str, float]:
    """Smooth in place; where the producer is among `dear`, only if it gains much, and nowhere on fewer tokens than
    `least_tokens`. Returns the alpha of each site that was smoothed, by the name of what makes the tensor."""
    seen = observe_links(program, links, batches)
    chosen = {}
    for link in links:
        noted = seen[link.producer]
        if noted.tokens < least_tokens:
            continue
        worth = _WORTH_A_PRODUCT if link.producer in dear else 1.0
        best = best_alpha(program, link, noted, target, worth) if alpha == "auto" else alpha
        if best is None:
            continue
        factors = smoothing(program, link, noted.largest, best)
        divide_outputs(program, link.producer, factors)
        for reader in link.readers:
            multiply_inputs(program, reader, factors)
        chosen[layer_name(link.producer)] = best
    return chosen


def best_alpha(program: Program, link: Link, seen: Seen, target: Target, worth: float = 1.0) -> float | None:
    """The alpha with the least error of the readers' outputs; None where no smoothing is `worth` times better."""
    readers = [_Reading(program, r, x) for r, x in zip(link.readers, seen.inputs)]

    def error(factors: torch.Tensor) -> float:
        return sum(r.error(factors, target) for r in readers)

    errors = {a: error(smoothing(program, link, seen.largest, a)) for a in _ALPHAS}
    best = min(errors, key=errors.__getitem__)
    plain = error(torch.ones(link.channels, dtype=torch.float64))
    return best if errors[best] * worth < plain else None


def smoothing(program: Program, link: Link, largest: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = max|X|^alpha / max|W|^(1 - alpha) per channel, float64; 1 for a channel that is always or everywhere zero."""
    weights = torch.stack([input_ranges(program, r, link.channels) for r in link.readers]).amax(0)
    dead = (largest <= 0) | (weights <= 0)
    factors = largest.clamp_min(_LEAST) ** alpha / weights.clamp_min(_LEAST) ** (1 - alpha)
    return torch.where(dead, 1.0, factors.clamp_min(_LEAST))


# -- what the samples show -----------------------------------------------------------------------------------------


@dataclass
class Seen:
    """Of one site: the largest |x| of each channel, some inputs of each reader, and of how many tokens (or places of a
    map) that is."""

    largest: torch.Tensor
    inputs: list[torch.Tensor]
    tokens: int = 0


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
                seen[link.producer] = Seen(largest, [_few(r, x) for r, x in zip(link.readers, inputs)])
            seen[link.producer].tokens += inputs[0].numel() // inputs[0].shape[_channel_dim(link.readers[0], inputs[0])]
    return seen


def _few(reader: Reader, x: torch.Tensor) -> torch.Tensor:
    """As many samples as the memory for one layer holds, at least one; of what a linear layer reads, tokens from all
    over them."""
    few = x[: max(1, _KEPT_BYTES // max(x[:1].nbytes, 1))]
    if is_op(reader.node, aten.linear.default):
        tokens = few.flatten(0, -2)
        few = tokens[:: -(-len(tokens) // _TOKENS)]
    return few.clone()


def _channel_dim(reader: Reader, x: torch.Tensor) -> int:
    return x.ndim - 1 if is_op(reader.node, aten.linear.default) else 1


def _largest(reader: Reader, x: torch.Tensor) -> torch.Tensor:
    """The largest |x| of each channel of the link, float64[channels]."""
    features = x.detach().abs().transpose(0, _channel_dim(reader, x)).flatten(1).amax(1).double()
    return features.reshape(-1, reader.repeat).amax(1)


class _Reading:
    """One reader of a link with some of its inputs, and what it makes of them in float."""

    def __init__(self, program: Program, reader: Reader, x: torch.Tensor) -> None:
        weight = constant(program, reader.node.args[1])
        assert weight is not None
        self.reader, self.x, self.weight = reader, x.float(), weight.detach().float()
        self.compute = _layer(reader.node)
        self.expected = self.compute(self.x, self.weight)
        self.power = self.expected.square().sum().clamp_min(1e-30)

    def error(self, factors: torch.Tensor, target: Target) -> float:
        """The squared error of the quantized layer's outputs, smoothed by `factors`, relative to their power."""
        spread = factors.float().repeat_interleave(self.reader.repeat)
        got = self.compute(self._smoothed(spread, target), self._scaled(spread, target))
        return float((got - self.expected).square().sum() / self.power)

    def _smoothed(self, factors: torch.Tensor, target: Target) -> torch.Tensor:
        shape = [1] * self.x.ndim
        shape[_channel_dim(self.reader, self.x)] = -1
        divided = self.x / factors.reshape(shape)
        params = choose_params(float(divided.min()), float(divided.max()), target.activation)
        q = quantize(divided, params.scale, params.zero_point, params.dtype)
        return dequantize(q, params.scale, params.zero_point)

    def _scaled(self, factors: torch.Tensor, target: Target) -> torch.Tensor:
        multiplied, _ = scale_inputs(self.weight, factors, torch.zeros_like(factors), groups_of(self.reader.node))
        scales = weight_scales(multiplied, target.weight, "minmax")
        q = quantize_weight(multiplied, scales, target.weight)
        return q.float() * scales.reshape(-1, *[1] * (self.weight.ndim - 1))


def _layer(node: fx.Node) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(input, weight) -> what the layer computes, without its bias."""
    rest: tuple[Any, ...] = node.args[3:]
    options = {k: v for k, v in node.kwargs.items() if k != "bias"}
    return lambda x, weight: node.target(x, weight, None, *rest, **options)  # type: ignore[operator]
