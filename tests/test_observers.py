"""The laws of observers: independent of batching, mergeable, constant memory; and the range rules themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpress.errors import OptionError, QuantizationError
from fxpress.passes.quantize.ranges.channels import ChannelObserver, RangeChoice
from fxpress.passes.quantize.ranges.entropy import most_informative_range
from fxpress.passes.quantize.ranges.histogram import Histogram, thinned
from fxpress.passes.quantize.ranges.observers import make_observer
from fxpress.passes.quantize.ranges.percentile import percentile_range
from fxpress.passes.quantize.ranges.rules import RULES
from fxpress.passes.quantize.spec import NumberFormat, choose_params

U8 = NumberFormat(torch.uint8)
S8 = NumberFormat(torch.int8, symmetric=True, narrow=True)

samples = st.lists(
    st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=4, max_size=4), min_size=1, max_size=12
).map(lambda rows: torch.tensor(rows, dtype=torch.float32))


def observed(name: str, batches: list[torch.Tensor]):
    observer = make_observer(name)
    for batch in batches:
        observer.observe(batch)
    return observer


@pytest.mark.parametrize("name", RULES)
@given(x=samples, cut=st.integers(1, 11))
@settings(deadline=None, max_examples=60)
def test_batching_does_not_matter_and_observers_merge(name, x, cut):
    whole = observed(name, [x])
    single = observed(name, list(x.split(1)))
    first, second = observed(name, [x[:cut]]), make_observer(name)
    if len(x) > cut:
        second.observe(x[cut:])
        first.merge(second)
    want = whole.params(U8)
    for got in (single.params(U8), first.params(U8)):
        # Averages are sums of floats, whose order matters in the last bits; everything else is exact.
        assert got.scale == pytest.approx(want.scale, rel=1e-6 if name == "moving-average" else 0)
        assert abs(got.zero_point - want.zero_point) <= (name == "moving-average")


@given(x=samples, cut=st.integers(1, 11))
@settings(deadline=None, max_examples=60)
def test_histogram_counts_are_exact(x, cut):
    histogram = Histogram(bins=64)
    for part in (x[:cut], x[cut:]):
        if len(part):
            histogram.observe(part)
    width = 2.0**histogram.exponent
    nonzero = x[x != 0].double()
    index = torch.floor(nonzero / width).long() - histogram.first
    assert torch.equal(torch.bincount(index, minlength=len(histogram.counts)), histogram.counts)
    assert histogram.zeros + int(histogram.counts.sum()) == x.numel()
    assert len(histogram.counts) <= 65


def test_memory_does_not_grow():
    histogram = Histogram()
    for i in range(50):
        histogram.observe(torch.randn(4, 1000) * (1 + i))
    assert len(histogram.counts) <= histogram.bins + 1


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_zero_is_exact_and_the_range_is_covered(a, b):
    low, high = min(a, b), max(a, b)
    params = choose_params(low, high, U8)
    assert 0 <= params.zero_point <= 255
    assert params.low <= min(low, 0) + params.scale * 0.51
    assert params.high >= max(high, 0) - params.scale * 0.51
    assert params.scale == float(torch.tensor(params.scale, dtype=torch.float32))


def test_mse_clips_an_outlier_and_keeps_a_flat_range():
    x = torch.rand(100, 10_000)
    x[0, 0] = 3.0
    assert observed("mse", [x]).params(U8).high < 1.5
    flat = torch.linspace(0, 1, 10_000)[None]
    assert observed("mse", [flat]).params(U8).high == pytest.approx(1.0, rel=0.02)


def test_mse_is_no_worse_than_minmax():
    torch.manual_seed(0)
    for x in (torch.randn(9, 9_000), torch.randn(9, 9_000).relu(), torch.randn(9, 9_000).exp(), -torch.rand(1, 999)):
        errors = {}
        for name in ("minmax", "mse"):
            p = observed(name, [x]).params(U8)
            q = torch.clamp(torch.round(x / p.scale) + p.zero_point, 0, 255)
            errors[name] = float((((q - p.zero_point) * p.scale - x) ** 2).mean())
        assert errors["mse"] <= errors["minmax"] * 1.02


def test_moving_average_follows_its_formula():
    observer = observed("moving-average", [torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 3.0]])])
    d = observer.statistics.extremes.decay
    assert observer.params(U8).high == pytest.approx((d * 1 + 3) / (1 + d), rel=1e-5)


def test_degenerate_tensors_have_a_scale():
    for x in (torch.zeros(1, 5), torch.full((1, 5), 1e-40), torch.full((1, 5), -2.0)):
        for name in RULES:
            params = observed(name, [x]).params(U8)
            assert params.scale > 0


def test_bad_values_are_errors():
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        observed("mse", [torch.tensor([[float("nan")]])])
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        observed("minmax", [torch.tensor([[float("inf")]])])
    with pytest.raises(QuantizationError, match="never observed"):
        make_observer("mse").params(U8)
    with pytest.raises(OptionError, match="unknown range rule"):
        make_observer("median")


# -- the rules -----------------------------------------------------------------------------------------------------


def test_percentile_leaves_out_that_share_of_the_values():
    x = torch.rand(20, 5_000)
    x[0, 0], x[1, 1] = 50.0, -50.0
    observer = make_observer("percentile", 99.9)
    observer.observe(x)
    low, high = percentile_range(observer.statistics.histogram, 99.9)
    assert low == pytest.approx(float(torch.quantile(x.flatten(), 0.001)), abs=0.03)
    assert high == pytest.approx(float(torch.quantile(x.flatten(), 0.999)), abs=0.03)
    assert percentile_range(observer.statistics.histogram, 100) == pytest.approx((-50, 50), abs=0.03)


def test_percentile_counts_exact_zeros():
    x = torch.zeros(1, 10_000)
    x[0, :50] = torch.linspace(1, 2, 50)  # half a percent of the values
    assert observed("percentile", [x]).params(U8).high > 1.9
    observer = make_observer("percentile", 99.0)
    observer.observe(x)
    assert observer.params(U8).high < 0.1


def test_entropy_clips_a_long_thin_tail_and_keeps_a_flat_range():
    torch.manual_seed(0)
    x = torch.randn(50, 10_000)
    x[0, :4] = 40.0
    assert observed("entropy", [x]).params(S8).high < 10
    flat = torch.linspace(0, 1, 10_000)[None]
    assert observed("entropy", [flat]).params(U8).high > 0.9


def test_entropy_is_the_least_divergence_of_its_definition():
    """The two loops of Migacz's slides, on a histogram small enough to write them down."""
    torch.manual_seed(1)
    histogram = Histogram(bins=256)
    histogram.observe(torch.randn(1, 20_000).abs().pow(1.5))
    form = NumberFormat(torch.uint8, bits=4)
    centers, counts = histogram.filled()

    def divergence(high: float) -> float:
        inside = [(c, n) for c, n in zip(centers.tolist(), counts.tolist()) if c <= high]
        p = [n for _, n in inside]
        p[-1] += float(counts.sum()) - sum(p)
        levels: dict[int, list[int]] = {}
        for i, (c, _) in enumerate(inside):
            levels.setdefault(min(int(c * 16 / high), 15), []).append(i)
        q = [0.0] * len(p)
        for members in levels.values():
            for i in members:
                q[i] = sum(inside[j][1] for j in members) / len(members)
        return sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q) if a)

    chosen = most_informative_range(histogram, form)[1]
    shares = [histogram.high * 0.96**i for i in range(76) if histogram.high * 0.96**i >= 16 * 2.0**histogram.exponent]
    assert divergence(chosen) == pytest.approx(min(map(divergence, shares)), rel=1e-9)


FORMATS = [
    NumberFormat(dtype, symmetric=symmetric)
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16)
    for symmetric in (False, True)
    if not (symmetric and dtype in (torch.uint8, torch.uint16))
]


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_every_rule_serves_every_format(name, form):
    torch.manual_seed(0)
    x = torch.randn(8, 5_000) * 3 + 1
    p = observed(name, [x]).params(form)
    lowest, highest = form.limits
    assert lowest <= p.zero_point <= highest
    assert not form.symmetric or p.zero_point == 0
    q = torch.clamp(torch.round(x / p.scale) + p.zero_point, lowest, highest)
    error = ((q - p.zero_point) * p.scale - x).pow(2).mean() / x.pow(2).mean()
    assert error < 1e-3


@given(x=samples, cut=st.integers(1, 11))
@settings(deadline=None, max_examples=20)
def test_channels_are_observed_each_on_its_own(x, cut):
    """Dim 1 has four channels; what comes out is what an observer of each channel alone would give."""
    whole, first, second = ChannelObserver("mse"), ChannelObserver("mse"), ChannelObserver("mse")
    whole.observe(x)
    first.observe(x[:cut])
    if len(x) > cut:
        second.observe(x[cut:])
        first.merge(second)
    for channel in range(4):
        alone = observed("mse", [x[:, channel]]).params(U8)
        for observer in (whole, first):
            params = observer.params(U8)
            assert (float(params.scales[channel]), int(params.zero_points[channel])) == (alone.scale, alone.zero_point)


def test_a_format_per_channel_gets_an_observer_per_channel():
    form = NumberFormat(torch.uint8, per_channel=True)
    assert isinstance(RangeChoice("mse", None, form).observer(), ChannelObserver)
    assert not isinstance(RangeChoice("mse", None, form).observer(U8), ChannelObserver)
    with pytest.raises(QuantizationError, match="never observed"):
        ChannelObserver().params(form)
    with pytest.raises(QuantizationError, match="no channels"):
        ChannelObserver().observe(torch.zeros(3))


def test_a_percentile_without_effect_is_an_error():
    for rule in ("auto", "mse", "minmax", "moving-average", "entropy"):
        with pytest.raises(OptionError, match="no effect"):
            make_observer(rule, 99.9)
    for value in (50.0, 101.0, float("nan")):
        with pytest.raises(OptionError, match="percentile is"):
            make_observer("percentile", value)


def test_auto_holds_all_rules_and_uses_the_chosen_one():
    x = torch.randn(10, 2_000)
    observer = observed("auto", [x])
    for rule in RULES:
        observer.chosen = rule
        assert observer.params(U8) == observed(rule, [x]).params(U8)


def test_values_are_read_in_either_layout():
    x = torch.randn(3, 5, 7, 9)
    assert observed("minmax", [x]).params(U8) == observed("minmax", [x.contiguous(memory_format=torch.channels_last)]).params(U8)


def test_large_samples_are_thinned_without_missing_a_channel():
    rows = torch.arange(64 * 64 * 64).float()[None]
    values = thinned(rows)
    assert 2**12 < len(values) <= 2**13
    assert len(set((values // 4096).tolist())) == 64  # all channels of [64, 64, 64]
    small = torch.randn(2, 3, 100)
    assert torch.equal(thinned(small.flatten(1)), small.flatten())
