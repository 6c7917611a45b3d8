"""The captured graph is functional: every in-place spelling gives what eager gives, and leaves no in-place op."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.errors import CaptureError
from fxpress.frontend.aliases import NAMES, canonical
from fxpress.frontend.capture import program_from_exported
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


def _decode(y):
    """As detectors write it: two augmented assignments on one view."""
    box = y[:, :2]
    box *= 2.0
    box -= 0.5
    return y


def _nested(y):
    box = y[:, :3]
    box[:, 0] = 1.0
    box[:, 1:][:, 0] = 2.0
    return y + box.sum()


def _chunks(y):
    a, b = y.chunk(2, 1)
    a.mul_(2)
    b[:, 1] = 7.0
    c, d = y.chunk(2, 1)
    d.add_(1)
    return y + a.sum() - b.sum() + c.sum()


def _unbound(y):
    for i, row in enumerate(y.unbind(1)[:2]):
        row.mul_(i + 2)
    y.split([1, 3], 1)[1].sub_(1)
    return y


def _out(y):
    result = torch.zeros_like(y)
    torch.mul(y[:, :2], 2, out=result[:, :2])
    torch.add(y[:, 2:], y[:, :2], alpha=3, out=result[:, 2:])
    return result


def _dropout(y):
    z = F.dropout(y, 0.5, False)
    z += 1
    return y + z


def _no_view(y):
    """Flattened across a transposition it is a copy, along the dims it is a view."""
    copy = y.view(-1, 2, 2).transpose(1, 2).flatten(1)
    copy.zero_()
    view = y.view(-1, 2, 2).flatten(1)
    view.mul_(3)
    return y + copy.sum()


def _kept_dtype(y):
    counts = torch.zeros(y.shape, dtype=torch.int32)
    counts[:, 1:] = y[:, 1:]
    half = y.to(torch.float16)
    half.add_(y * 1e-3)
    flags = y.clone()
    flags.gt_(0.1)
    return counts + half * 2, flags


def _logical(y):
    """`&=` is an op of its own in place."""
    chosen = y > -0.5
    chosen &= y < 0.5
    chosen[:, 1:] |= y[:, 1:] > 1
    return chosen


def _owner_written_then_view(y):
    part = y[:, 1:]
    y *= 2
    part += 1
    whole = y.t()
    part[:, 0] = 5.0
    y += 1
    return part, whole.sum(0), y


VIEWS = {
    "narrow": lambda y: y.narrow(1, 1, 2).mul_(3),
    "mT": lambda y: y.view(-1, 2, 2).mT[:, 0].mul_(3),
    "movedim": lambda y: y.view(-1, 2, 2).movedim(2, 0)[0].mul_(3),
    "permute": lambda y: y.view(-1, 2, 2, 1).permute(3, 0, 2, 1)[0, :, 0].mul_(3),
    "unflatten": lambda y: y.unflatten(1, (2, 2))[:, 1].add_(3),
    "squeeze": lambda y: y.unsqueeze(1).unsqueeze(1).squeeze((1, 2)).mul_(3),
    "view_as": lambda y: y.view_as(y).add_(3),
    "expand_as": lambda y: y.expand_as(y).add_(3),
    "detach": lambda y: y.detach()[:, 2:].zero_(),
    "diagonal": lambda y: y.view(-1, 2, 2).diagonal(0, 1, 2).zero_(),
    "reshape": lambda y: y.reshape(-1, 2, 2)[..., 1].fill_(2.0),
    "chain": lambda y: y[:, :2].sigmoid_().mul_(2).sub_(0.5),
    "strided": lambda y: y[:, ::2].neg_(),
    "last": lambda y: y[..., -1].copy_(y[..., 0]),
}
FUNCTIONS = [_decode, _nested, _chunks, _unbound, _out, _dropout, _no_view, _kept_dtype, _logical, _owner_written_then_view, *VIEWS]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f if isinstance(f, str) else f.__name__.strip("_"))
@pytest.mark.parametrize("no_grad", [False, True], ids=["grad", "no_grad"])
def test_whatever_shares_memory_sees_a_write(function, no_grad):
    """Tensors are made inside, so that each batch has its own; the batch is dynamic wherever a model allows it."""

    class Net(nn.Module):
        def forward(self, x):
            y = x * 1.5
            if isinstance(function, str):
                VIEWS[function](y)
                return y
            return function(y)

    with torch.set_grad_enabled(not no_grad):
        program = fxpress.capture(Net(), torch.randn(2, 4))
    for batch in (2, 5):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(program(x), Net()(x), rtol=0, atol=0)
    assert not any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in program.graph.nodes)


def test_what_reads_before_a_write_and_after_it() -> None:
    """A random walk over views, writes and reads of one tensor gives what eager gives."""
    takes = [
        lambda y: y[:, 1:3], lambda y: y[:, 0], lambda y: y.view(-1, 2, 2), lambda y: y.t(), lambda y: y.chunk(2, 1)[1],
        lambda y: y.unsqueeze(1), lambda y: y.narrow(-1, 0, 1), lambda y: y.reshape(y.shape), lambda y: y.flatten(),
    ]  # fmt: skip
    writes = [lambda y: y.mul_(1.25), lambda y: y.add_(0.5), lambda y: y.neg_(), lambda y: y.fill_(0.75)]

    def walk(x: torch.Tensor, seed: int) -> torch.Tensor:
        draw, known = random.Random(seed), [x * 1.0]
        total = torch.zeros(())
        for _ in range(12):
            value = draw.choice(known)
            kind = draw.random()
            if kind < 0.4 and value.ndim == 2 and value.shape[1] == 4:
                known.append(draw.choice(takes)(value))
            elif kind < 0.4 and value.ndim > 1:
                known.append(value[:, 0])
            elif kind < 0.75:
                draw.choice(writes)(value)
            else:
                total = total + value.sum() * draw.random()
        return total + sum(v.sum() for v in known)

    class Net(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.seed = seed

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return walk(x, self.seed)

    for seed in range(25):
        x = torch.randn(3, 4)
        torch.testing.assert_close(fxpress.capture(Net(seed), (x,), dynamic_batch=False)(x), walk(x, seed))


def test_many_writes_into_one_tensor() -> None:
    """As an unrolled loop makes them: neither deep nor slow."""

    class Loop(nn.Module):
        def forward(self, x):
            y = torch.zeros(x.shape[0], 200)
            for i in range(200):
                y[:, i] = x[:, i % 4] * i
                y += 1
            return y

    x = torch.randn(3, 4)
    torch.testing.assert_close(fxpress.capture(Loop(), torch.randn(2, 4))(x), Loop()(x))


def test_an_archive_that_lost_who_shares_memory(tmp_path):
    """torch.export.save keeps the ops, not the storages of its examples."""

    class Net(nn.Module):
        def forward(self, x):
            y = x * 2
            part = y.chunk(2, 1)[0]
            part.add_(1)
            y.view(-1).mul_(3)
            return y

    dim = torch.export.Dim("b", min=1)
    exported = torch.export.export(Net(), (torch.randn(3, 4),), dynamic_shapes=({0: dim},), strict=False)
    torch.export.save(exported, tmp_path / "net.pt2")
    program = program_from_exported(torch.export.load(tmp_path / "net.pt2"))
    x = torch.randn(5, 4)
    assert torch.equal(program(x), Net()(x))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda y: y.unfold(1, 2, 2)[..., 0].mul_(3), "in place through aten.unfold"),
        (lambda y: torch._foreach_add_([y], 1.0), "no functional form"),
    ],
)
def test_what_cannot_be_expressed_is_an_error_with_its_line(function, said):
    class Net(nn.Module):
        def forward(self, x):
            y = x * 1.0
            function(y)
            return y

    with pytest.raises(CaptureError, match=said) as error:
        fxpress.capture(Net(), torch.randn(2, 4))
    assert "test_functionalize.py" in str(error.value)


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


class ByMask(nn.Module):
    """A constant mask, as window attention and upper triangles use them: over one dim, or over two."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)
        self.register_buffer("mask", torch.tensor([True, False, True, True, False]))

    def forward(self, x):
        h = self.a(x).relu()
        triangle = torch.ones(5, 5, dtype=torch.bool).triu(1)
        pairs = (h @ h.mT)[:, triangle]
        return self.b(h[:, self.mask]), pairs


def test_a_constant_mask_is_a_list_of_positions():
    model, x = ByMask().eval(), torch.randn(3, 5, 4)
    program = fxpress.capture(model, torch.randn(2, 5, 4))
    for got, wanted in zip(program(x), model(x)):
        torch.testing.assert_close(got, wanted)
    assert [o.dims for o in program.outputs] == [("batch", 3, 3), ("batch", 10)]
    artifact = fxpress.compile(model, (x,), calibration=[x], prune="macs=0.8")
    assert artifact.kept


def test_values_computed_anew_keep_the_batch_dynamic():
    """Under autocast they are; a BatchNorm behind it must not fix the batch to that of the example."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.b(self.norm(self.a(x)).relu())

    program = fxpress.capture(Net().eval(), torch.randn(2, 3, 6, 6))
    assert program.outputs[0].dims[0] == "batch"
    assert program(torch.randn(5, 3, 6, 6)).shape == (5, 2, 4, 4)
    sizes = [n.meta["val"].shape[0] for n in program.graph.nodes if "batch_norm" in str(n.target)]
    assert len(sizes) == 1
    assert not isinstance(sizes[0], int)
