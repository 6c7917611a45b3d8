"""The laws of observers: independent of batching, mergeable, constant memory; and the range rules themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpress.errors import OptionError, QuantizationError
from fxpress.passes.quantize.ranges.histogram import Histogram
from fxpress.passes.quantize.ranges.observers import make_observer
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
