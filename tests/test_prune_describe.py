"""Groups, blocks and pinned axes as `inspect` shows them: what is coupled, through which ops, and what is not, and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.commands import inspect as cli_inspect
from fxpress.passes.prune.describe import Coupling, alike, couplings, pinned_alike
from fxpress.passes.prune.groups import find_groups, find_pinned
from fxpress.passes.prune.rules.table import analyze


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, 24, 3, padding=1), nn.Conv2d(24, width, 1)
        self.bn = nn.BatchNorm2d(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.hardswish(self.bn(self.conv1(x))))


class Net(nn.Module):
    """A stream of 16 channels through three blocks, then heads of attention over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.blocks = nn.Sequential(Block(16), Block(16), Block(16))
        self.qkv, self.proj = nn.Linear(16, 72), nn.Linear(24, 5)
        self.token = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x)).flatten(2).transpose(1, 2) + self.token
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(y)


@pytest.fixture(scope="module")
def program() -> fxpress.Program:
    torch.manual_seed(0)
    return fxpress.capture(Net().eval(), (torch.randn(2, 3, 4, 4),))


@pytest.fixture(scope="module")
def found(program: fxpress.Program) -> list[Coupling]:
    analysis = analyze(program)
    return couplings(analysis, find_groups(analysis))


def test_couplings_name_writers_readers_and_ops(found: list[Coupling]) -> None:
    by_writer = {c.written_by[0]: c for c in found}
    stream = next(c for c in found if "stem" in c.written_by)
    assert set(stream.written_by) == {"stem", "token", *(f"blocks.{i}.conv2" for i in range(3))}
    assert set(stream.read_by) == {"qkv", *(f"blocks.{i}.conv1" for i in range(3))}
    assert stream.through == ("add", "flatten", "transpose")
    assert not stream.own
    hidden = by_writer["blocks.1.conv1"]
    assert (len(hidden), hidden.read_by, hidden.own) == (24, ("blocks.1.conv2",), ("blocks.1.bn",))
    assert hidden.through == ("batch_norm", "hardswish")
    heads = [c for c in found if c.written_by == ("qkv",)]
    assert {(len(c), c.each) for c in heads} >= {(4, 18)}
    assert all(c.read_by in (("proj",), ()) for c in heads)


def test_what_differs_only_in_its_number_is_one_form(found: list[Coupling]) -> None:
    forms = alike(found)
    (hidden,) = [form for form in forms if form[0].written_by == ("blocks.0.conv1",)]
    assert len(hidden) == 3
    assert sum(map(len, forms)) == len(found)


def test_pinned_axes_come_with_reason_and_source(program: fxpress.Program) -> None:
    pinned = find_pinned(analyze(program))
    kinds = pinned_alike(pinned)
    assert sum(map(len, kinds)) == len(pinned)
    windows = [k for k in kinds if "slides a window" in k[0].reason.text]
    assert {len({p.reason.source for p in kind}) for kind in windows} == {1}
    assert any("test_prune_describe.py" in str(kind[0].reason.source) for kind in windows)


@pytest.mark.parametrize("everything", [False, True])
def test_tables(
    program: fxpress.Program, found: list[Coupling], everything: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    cli_inspect.show_groups(found, everything)
    pinned = find_pinned(analyze(program))
    cli_inspect.show_pinned(pinned, everything)
    blocks = cli_inspect.block_rows(program)
    cli_inspect.show_blocks(blocks, everything)
    text = capsys.readouterr().err
    assert f"groups that can be pruned: {len(found)}" in text
    assert text.count("batch_norm, hardswish") == (3 if everything else 1)
    assert ("blocks.2.conv1.weight[3]" in text) == everything
    assert "residual blocks that can be left out: 3" in text
    assert ("blocks.0 to blocks.2" in text) == (not everything)
    assert [b["name"] for b in blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(b["macs"] > 0 and b["parameters"] == 24 * 16 * 10 + 24 * 3 + 16 for b in blocks)
