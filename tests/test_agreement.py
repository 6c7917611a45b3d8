"""A captured program that does not give what its module gives is refused, and only such a one."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.errors import CaptureError
from fxpress.frontend import capture as capturing
from fxpress.frontend.agreement import check_same, draws_random
from fxpress.frontend.capture import notes_of


class Net(nn.Module):
    def forward(self, x):
        return {"scores": (x @ x.mT).softmax(-1), "best": x.argmax(-1), "none": None}


@pytest.fixture
def program():
    return fxpress.capture(Net(), torch.randn(2, 5, 6))


def test_the_modules_own_results_agree(program):
    (x,) = program.example_inputs
    check_same(program, Net()(x), lambda: pytest.fail("run again"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r | {"scores": r["scores"] + 0.01}, "output 0 differs by 0.01"),
        (lambda r: r | {"scores": r["scores"].where(r["scores"] > 0.2, torch.nan)}, "output 0 differs by inf"),
        (lambda r: r | {"scores": r["scores"][:, :4]}, r"output 0 has the shape \[2, 5, 5\] instead of \[2, 4, 5\]"),
        (lambda r: r | {"best": r["best"] + 1}, "100% of output 1 differ"),
        (lambda r: {"scores": r["scores"]}, "2 tensors instead of 1"),
    ],
)
def test_others_do_not(program, change, said):
    other = change(Net()(*program.example_inputs))
    with pytest.raises(CaptureError, match=said):
        check_same(program, other, lambda: other)


def test_a_rule_that_changes_values_is_found_by_capture(monkeypatch):
    """If a write were lost, as one through a view that nobody knows would be."""

    def wrong(graph_module):
        for node in graph_module.graph.nodes:
            if node.target is torch.ops.aten.add.Tensor:
                node.target = torch.ops.aten.sub.Tensor
        graph_module.recompile()

    class Sum(nn.Module):
        def forward(self, x):
            return x + x.mean()

    monkeypatch.setattr(capturing, "functionalize", wrong)
    with pytest.raises(CaptureError, match="does not compute what the module computes"):
        fxpress.capture(Sum(), torch.randn(2, 3))


def test_what_is_random_or_counts_its_calls_is_captured():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    class Dropped(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training) * 2

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    for module in (Noisy(), Dropped(), Counting()):
        program = fxpress.capture(module, torch.randn(2, 3))
        assert program.outputs[0].dims == ("batch", 3)


@pytest.mark.parametrize(
    ("function", "random"),
    [
        (lambda x: torch.rand_like(x), True),
        (lambda x: F.dropout(x, 0.5, True), True),
        (lambda x: F.dropout(x, 0.5, False), False),
        (lambda x: F.rrelu(x, training=False), False),
        (lambda x: F.scaled_dot_product_attention(x, x, x), False),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), True),
        (lambda x: x + torch.bernoulli(x.sigmoid()), True),
    ],
)
def test_who_draws_random_numbers(function, random):
    class Draw(nn.Module):
        def forward(self, x):
            return function(x)

    assert draws_random(fxpress.capture(Draw(), torch.randn(2, 5, 6))) == random


def test_recurrent_layers_draw_nothing():
    assert not draws_random(fxpress.capture(nn.LSTM(6, 4, 2, dropout=0.5, batch_first=True), torch.randn(2, 5, 6)))


def test_what_is_random_is_pruned_and_says_that_it_was_not_compared():
    class Sampled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 32), nn.Linear(32, 16), nn.Linear(8, 4)

        def forward(self, x):
            mean, spread = self.b(self.a(x).relu()).chunk(2, 1)
            return self.c(mean + torch.randn_like(mean) * spread.exp())

    pruned = fxpress.run_passes(fxpress.capture(Sampled(), torch.randn(4, 12)), "cleanup,prune{ratio=0.5}")
    assert pruned.state_dict()["a.weight"].shape[0] == 16
    assert any("draws random numbers" in n for record in pruned.log for n in record.notes)


def test_the_inputs_that_a_model_writes_into_stay_the_users():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(2) + 1

    x = torch.ones(2, 3)
    program = fxpress.capture(InPlace(), x)
    assert torch.equal(x, torch.ones(2, 3))
    assert torch.equal(program(x), torch.full((2, 3), 3.0))


def test_half_precision_is_judged_as_such():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).half()
    assert fxpress.capture(model, torch.randn(4, 64).half()).outputs[0].dims == ("batch", 8)


class Stateful(nn.Module):
    """It counts its calls, keeps an average, and even halves its own weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
        y = self.layer(x)
        self.mean.mul_(0.9).add_(y.mean(0) * 0.1)
        return y - self.mean, self.calls * 1.0


@pytest.mark.parametrize("share", [False, True])
def test_state_is_that_of_the_module_as_it_was_given(share):
    module, x = Stateful(), torch.randn(4, 3)
    before = {n: v.clone() for n, v in module.state_dict().items()}
    program = fxpress.capture(module, x, share_weights=share)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        want = module(x)
    if not share:  # with it, this call has halved the weights of both
        for got, wanted in zip(program(x), want):
            torch.testing.assert_close(got, wanted)
    (note,) = notes_of(program)
    assert all(name in note for name in ("layer.weight", "calls", "mean"))


def test_what_a_hook_left_on_a_module_is_copied_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(3, 8, 3)), nn.ReLU())
    x = torch.randn(2, 3, 9)
    torch.testing.assert_close(fxpress.capture(module, x)(x), module(x))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda: torch.jit.script(nn.Linear(3, 3)), "a ScriptModule cannot be traced"),
        (lambda: Holding(threading.Lock()), "the module cannot be copied: TypeError"),
    ],
)
def test_what_cannot_be_traced_or_copied_is_an_error(module, said):
    with pytest.raises(CaptureError, match=said):
        fxpress.capture(module(), torch.randn(2, 3))


class Holding(nn.Module):
    def __init__(self, thing):
        super().__init__()
        self.thing = thing

    def forward(self, x):
        return x * 2


@pytest.mark.parametrize("function", [lambda x: x[x.sum(1) > 0], lambda x: x.sum(1).nonzero() * 2])
def test_sizes_that_depend_on_data_are_an_error_with_the_line(function):
    class Chosen(nn.Module):
        def forward(self, x):
            return function(x)

    with pytest.raises(CaptureError, match="a size depends on data") as error:
        fxpress.capture(Chosen(), torch.randn(4, 3))
    assert "test_agreement.py" in str(error.value)


def test_inputs_that_require_gradients_are_only_examples():
    program = fxpress.capture(nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True))
    assert not program.example_inputs[0].requires_grad


class Autocast(nn.Module):
    def __init__(self, widen):
        super().__init__()
        self.a, self.b, self.widen = nn.Linear(6, 32), nn.Linear(32, 3), widen

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(self.a(x).relu())
            y = y * torch.sigmoid(y)
        return y.float() if self.widen else y


@pytest.mark.parametrize("widen", [False, True])
def test_what_is_under_autocast_has_the_dtype_of_its_weights(widen):
    module, x = Autocast(widen).eval(), torch.randn(4, 6)
    program = fxpress.capture(module, x)
    assert program.outputs[0].dtype == "float32"
    assert program(x).dtype == torch.float32
    torch.testing.assert_close(program(x), module(x).float(), rtol=0.05, atol=0.02)
    assert "bfloat16 under autocast" in notes_of(program)[0]
    assert fxpress.compile(module, (x,), calibration=[x]).kept


class Paired(nn.Module):
    def forward(self, a, b):
        u, v = torch.cat([a, b]).chunk(2, 0)
        return (u - v).abs()


def test_what_a_batch_may_be_is_said_in_the_users_words():
    with pytest.raises(CaptureError, match=r"it needs .*batch.* == 2") as error:
        fxpress.capture(Paired(), (torch.randn(4, 6), torch.randn(4, 6)))
    assert "L['" not in error.value.message
    assert "capture.py" not in str(error.value)


def test_a_first_size_of_one_that_is_no_batch():
    class Fixed(nn.Module):
        def forward(self, scale, x):
            return scale.view(1, 6) * x

    with pytest.raises(CaptureError, match="not with a batch of two") as error:
        fxpress.capture(Fixed(), (torch.randn(1, 6), torch.randn(4, 6)))
    assert "dynamic_batch=False" in str(error.value)
    program = fxpress.capture(Fixed(), (torch.randn(1, 6), torch.randn(4, 6)), dynamic_batch=False)
    assert program.outputs[0].dims == (4, 6)
    with pytest.raises(CaptureError, match="fails on the example inputs"):
        fxpress.capture(Fixed(), (torch.randn(1, 5), torch.randn(4, 6)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_layers_inside_a_model_are_fused_and_pruned(dtype):
    """The checks of passes compute in float64, and allow what the weights' own dtype rounds."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            block = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
            torch.manual_seed(0)
            block[1].running_mean.normal_()
            block[1].running_var.uniform_(0.5, 2)
            self.block, self.out = block.to(dtype), nn.Linear(16, 3)

        def forward(self, x):
            return self.out(self.block(x.to(dtype)).float().mean((2, 3)))

    program = fxpress.capture(Narrow(), torch.randn(2, 3, 9, 9))
    result = fxpress.run_passes(program, "cleanup,prune{ratio=0.5},verify-pruning,canonicalize,fuse-batchnorm")
    assert not any("batch_norm" in str(n.target) for n in result.graph.nodes)
    assert result.state_dict()["block.0.weight"].shape[0] == 8
    assert result(torch.randn(2, 3, 9, 9)).shape == (2, 3)
