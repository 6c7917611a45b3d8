"""The captured graph is functional: every in-place spelling gives what eager gives, and leaves no in-place op."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxpress
from fxpress.frontend.aliases import NAMES, canonical
from fxpress.frontend.cost import op_name


class ReluInPlace(nn.Module):
    def forward(self, x):
        y = x * 2
        torch.relu_(y)
        return y + 1


class ReadBeforeWrite(nn.Module):
    def forward(self, x):
        y = x * 2
        before = y.sum(1)
        y.add_(1)
        return y.sum(1) - before


class SliceAssign(nn.Module):
    def forward(self, x):
        y = x * 1.5
        y[:, 1:3] = 7.0
        return y


class SliceAdd(nn.Module):
    def forward(self, x):
        y = x + 0.5
        y[:, 0] += x[:, 1]
        return y * 2


class NestedViews(nn.Module):
    def forward(self, x):
        y = x.clone()
        y[:, 1:][:, :2].mul_(3)
        return y


class ThroughView(nn.Module):
    def forward(self, x):
        y = x * 1.0
        y.t().mul_(torch.arange(4.0).unsqueeze(1))
        return y


class MaskBuffer(nn.Module):
    """As Swin does: a mask filled region by region, independent of the input."""

    def forward(self, x):
        mask = torch.zeros(4, 4)
        for i, rows in enumerate((slice(0, 2), slice(2, 4))):
            mask[rows, :] = i
        return x + mask[0] - mask[3]


class NoGrad(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            weight = x.softmax(1)
        return x * weight


class FillAndMask(nn.Module):
    def forward(self, x):
        y = torch.zeros_like(x)
        y.fill_(2.0)
        y.masked_fill_(x > 0, 5.0)
        return y


class ViewTakenBefore(nn.Module):
    """A view aliases its base: what is written afterwards shows in it."""

    def forward(self, x):
        y = x * 1.0
        part, whole = y[:, 2:], y.view(-1)
        first, second = y.chunk(2, 1)
        y[:, 1:].mul_(2)
        y.add_(1)
        return part + whole.sum() + first - second


class WriteThroughOtherViews(nn.Module):
    def forward(self, x):
        y = x * 1.0
        y.permute(1, 0)[0].fill_(3.0)
        y.view(y.shape[0], 2, 2)[:, 1].add_(1)
        return y


MODULES = [
    ViewTakenBefore, WriteThroughOtherViews, ReluInPlace, ReadBeforeWrite, SliceAssign, SliceAdd, NestedViews, ThroughView, MaskBuffer, NoGrad, FillAndMask,
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("batch", [2, 5])
def test_same_as_eager_and_free_of_writes(module, batch):
    program = fxpress.capture(module().eval(), torch.randn(2, 4)) if module is not ThroughView else fxpress.capture(
        module().eval(), torch.randn(batch, 4), dynamic_batch=False
    )
    x = torch.randn(batch, 4)
    given = x.clone()
    torch.testing.assert_close(program(x), module()(given))
    torch.testing.assert_close(x, given)
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, node.target


def test_alias_ops_get_their_usual_names() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.multiply(x, 2).clip(0, 1).swapaxes(1, 2)
            y = y.clone().subtract_(torch.special.expit(y))
            return torch.concat([y, torch.absolute(y)], 1)

    x = torch.randn(2, 3, 4)
    program = fxpress.capture(Net(), x)
    names = {op_name(n).removeprefix("aten.") for n in program.graph.nodes if n.op == "call_function"}
    assert {"mul", "clamp", "transpose", "sub", "sigmoid", "cat", "abs"} <= names
    assert not names & {"multiply", "clip", "swapaxes", "subtract", "subtract_", "special_expit", "concat", "absolute"}
    torch.testing.assert_close(program(x), Net()(x))


def test_every_alias_has_the_arguments_of_its_canonical_op() -> None:
    for name in NAMES:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            mine, its = ([(a.name, str(a.type)) for a in o._schema.arguments] for o in (op, canonical(op)))
            assert mine == its, op
