"""SmoothQuant: outliers move from activations into weights, the function stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxpress
from fxpress.backends.targets import load_target
from fxpress.errors import DataError, OptionError, QuantizationError
from fxpress.passes.base import Context
from fxpress.passes.manager import run_passes
from fxpress.passes.quantize.accuracy.products import drop_ones, insert_products
from fxpress.passes.quantize.accuracy.smooth import find_sites, smoothing

TARGET = load_target("ort-x86")
WIDTH = 16


class Block(nn.Module):
    """A transformer block before which LayerNorm, RMSNorm by hand, or a gate makes what linear layers read."""

    def __init__(self, outlier: float = 60.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.gate, self.down = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        with torch.no_grad():
            for norm in (self.norm1, self.norm2):
                norm.weight[3] = outlier
            for layer in (self.q, self.k, self.v, self.up, self.gate):
                layer.weight[:, 3] /= outlier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class PostNorm(nn.Module):
    """The LayerNorm's output is also what is added: no factor can move."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return y + self.linear(y)


class HandNorm(nn.Module):
    """RMSNorm written out: the vector of weights takes the factor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))


def data(count: int = 8) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, WIDTH, generator=generator),) for _ in range(count)]


def captured(module: nn.Module) -> fxpress.Program:
    torch.manual_seed(0)
    return run_passes(fxpress.capture(module.eval(), data()[0]), "cleanup,canonicalize")


def context() -> Context:
    return Context(target=TARGET, calibration=data())


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


def test_sites_of_a_block():
    program = captured(Block())
    sites = {k.producer.name: len(k.readers) for k in find_sites(program, convolutions=False)}
    # q, k, v read the first norm; gate and up the second; down reads a product that `up` can scale.
    assert sorted(sites.values()) == [1, 2, 3]


def test_it_saves_what_outliers_spoil():
    torch.manual_seed(0)
    program = captured(Block())
    plain, smooth = (run_passes(program, text, context()) for text in ("quantize", "smooth,quantize"))
    x = data()[1][0]
    assert sqnr(program(x), smooth(x)) > sqnr(program(x), plain(x)) + 6
    assert "dB without" in next(r for r in smooth.log if r.name == "smooth").notes[0]


def test_the_function_stays():
    program = captured(Block())
    for text in ("smooth{alpha=0.5,when=always}", "smooth{when=always}"):
        smooth = run_passes(program, text, context())
        x = data()[2][0]
        assert smooth.log[-1].changes
        assert float((smooth(x) - program(x)).detach().abs().max()) < 1e-4 * float(program(x).detach().abs().max())


def test_a_norm_with_another_reader_is_left_alone():
    record = run_passes(captured(PostNorm()), "smooth{insert=false}", context()).log[-1]
    assert record.changes == 0
    assert "nothing to smooth" in record.notes[0]


def loud(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.norm.weight[3] = 60.0
        module.linear.weight[:, 3] /= 60.0
    return module


def test_a_product_is_not_inserted_for_little():
    record = run_passes(captured(PostNorm()), "smooth", context()).log[-1]
    assert record.changes == 0
    assert "at no site" in record.notes[0]


def test_products_are_inserted_behind_normalizations_only():
    class Curved(nn.Module):
        """What a softplus makes is read by a linear layer and added."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.softplus(self.norm(x))
            return y + self.linear(y)

    program = captured(loud(Curved()))
    assert "nothing to smooth" in run_passes(program, "smooth", context()).log[-1].notes[0]
    assert run_passes(program, "smooth{insert=true}", context()).log[-1].changes == 1


@pytest.mark.parametrize("insert", ["true", "auto"])
def test_a_product_can_be_inserted_for_it(insert):
    program = captured(loud(PostNorm()))
    smooth = run_passes(program, f"smooth{{insert={insert}}}", context())
    assert "1 of them by a product of their own" in smooth.log[-1].notes[0]
    assert len([n for n in smooth.graph.nodes if "mul" in str(n.target)]) == 1
    x = data()[1][0]
    assert float((smooth(x) - program(x)).detach().abs().max()) < 1e-4 * float(program(x).detach().abs().max())


def test_products_that_change_nothing_are_taken_out_again():
    program = captured(PostNorm())
    products = insert_products(program, [])
    assert len(products) == 1
    assert drop_ones(program, products) == 1
    assert not [n for n in program.graph.nodes if "mul" in str(n.target)]


def test_a_written_out_norm_is_a_site():
    program = captured(HandNorm())
    smooth = run_passes(program, "smooth{alpha=0.5,when=always}", context())
    assert smooth.log[-1].changes == 1
    assert not torch.equal(smooth.state_dict()["weight"], program.state_dict()["weight"])


def test_without_outliers_it_is_off_or_better():
    program = captured(Block(outlier=1.0))
    result = run_passes(program, "smooth", context())
    note = result.log[-1].notes[0]
    same = all(torch.equal(a, b) for a, b in zip(result.parameters(), program.parameters()))
    assert same == (result.log[-1].changes == 0)
    assert same == (note.startswith("left alone") or "at no site" in note)


def test_the_formula():
    program = captured(HandNorm())
    (link,) = find_sites(program, convolutions=False)
    weights = program.state_dict()["linear.weight"].abs().amax(0).double()
    largest = torch.rand(WIDTH, dtype=torch.float64) + 0.1
    expected = largest**0.7 / weights**0.3
    assert torch.allclose(smoothing(program, link, largest, 0.7), expected)
    assert smoothing(program, link, torch.zeros(WIDTH, dtype=torch.float64), 0.7).tolist() == [1.0] * WIDTH


def test_wrong_use():
    program = captured(HandNorm())
    with pytest.raises(OptionError, match="alpha"):
        run_passes(program, "smooth{alpha=2}", context())
    with pytest.raises(DataError, match="smooth"):
        run_passes(program, "smooth", Context(target=TARGET))
    with pytest.raises(QuantizationError, match="target"):
        run_passes(program, "smooth", Context(calibration=data()))


def test_few_tokens_say_too_little():
    """A channel that calibration saw little of may reach further: smoothed, it would be cut off."""
    program = captured(Block())
    record = run_passes(program, "smooth", Context(target=TARGET, calibration=data(4))).log[-1]
    assert record.changes == 0
    assert "at no site" in record.notes[0]
    assert run_passes(program, "smooth{when=always}", Context(target=TARGET, calibration=data(4))).log[-1].changes > 0
