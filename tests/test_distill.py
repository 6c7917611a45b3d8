"""Distillation: the terms are those of the papers, adapters train and vanish, a student learns from its teacher."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.demo import DigitNet, load_digits
from fxpress.errors import DataError, OptionError
from fxpress.training.distill import Distillation, named_node
from fxpress.training.distill_terms import Attention, Features, Relations, Seen, SoftLabels, attention_map, correlation
from fxpress.training.objectives import Batch
from fxpress.training.options import AdamW, TrainingOptions


class Net(nn.Module):
    """Two stages and a head, of any width."""

    def __init__(self, width: int, classes: int = 5, stride: int = 1) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride, 1), nn.ReLU())
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(x)).mean((2, 3)))


def student(width: int = 4, **options: int) -> fxpress.Program:
    torch.manual_seed(0)
    return fxpress.capture(Net(width, **options).eval(), torch.randn(2, 3, 8, 8))


def teacher(width: int = 8, **options: int) -> nn.Module:
    torch.manual_seed(1)
    return Net(width, **options)


def batch(count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(2)
    return Batch((torch.randn(count, 3, 8, 8, generator=generator),), torch.randint(5, (count,), generator=generator))


# -- the terms -----------------------------------------------------------------------------------------------------


def test_soft_labels_are_the_divergence_at_a_temperature():
    mine, theirs = torch.randn(7, 5), torch.randn(7, 5)
    got = SoftLabels(temperature=3.0)(Seen(mine, {}), Seen(theirs, {}), [])
    want = 9 * F.kl_div(F.log_softmax(mine / 3, 1), F.softmax(theirs / 3, 1), reduction="batchmean")
    assert torch.allclose(got, want, atol=1e-6)
    assert SoftLabels()(Seen(mine, {}), Seen(mine + 4.0, {}), []) < 1e-6, "scores matter up to a constant"


def test_correlation_and_relations():
    a, b = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    want = [float(torch.corrcoef(torch.stack([x, y]))[0, 1]) for x, y in zip(a, b)]
    assert correlation(a, b).tolist() == pytest.approx(want)
    same = Relations(temperature=1.0)(Seen(a, {}), Seen(a, {}), [])
    assert same == pytest.approx(0.0, abs=1e-9)
    # A teacher whose probabilities are an affine function of the student's says the same (unlike for soft labels).
    p = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.1, 0.6]], dtype=torch.float64)
    q = 0.5 * p + 1 / 6
    assert Relations(temperature=1.0)(Seen(p.log(), {}), Seen(q.log(), {}), []) == pytest.approx(0.0, abs=1e-9)
    assert SoftLabels(temperature=1.0)(Seen(p.log(), {}), Seen(q.log(), {}), []) > 0.01


def test_attention_is_where_not_how_much_nor_in_which_channel():
    x = torch.randn(3, 8, 5, 5)
    seen = [Seen(x, {"a": v}) for v in (x, 3 * x[:, torch.randperm(8)], x.flip(3))]
    term = Attention((("a", "a"),))
    assert term(seen[0], seen[1], []) < 1e-6
    assert term(seen[0], seen[2], []) > 0.01
    assert attention_map(x).norm(dim=1) == pytest.approx(1.0)


def test_features_are_adapted_in_width_and_averaged_in_size():
    term = Features((("two", "two"),))
    objective = Distillation(student(4), teacher(8, stride=2), [term])
    (adapter,) = objective.adapters[0]
    assert adapter.weight.shape == (16, 8, 1, 1)
    assert isinstance(Distillation(student(8), teacher(8), [term]).adapters[0][0], nn.Identity)
    assert torch.isfinite(objective(student(4), batch()))


def test_scores_of_pixels_are_distilled_too():
    mine, theirs = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    flat = [s.permute(0, 2, 3, 1).reshape(-1, 5) for s in (mine, theirs)]
    for term in (SoftLabels(), Relations()):
        got, want = term(Seen(mine, {}), Seen(theirs, {}), []), term(*(Seen(s, {}) for s in flat), [])
        assert torch.allclose(got, want, atol=1e-5)


# -- the objective -------------------------------------------------------------------------------------------------


def test_a_program_and_its_module_teach_the_same():
    module = teacher().eval()
    captured = fxpress.capture(module, torch.randn(2, 3, 8, 8))
    terms = [SoftLabels(), Features((("one", "one"), ("two", "two"))), Attention((("one", "one"),))]
    losses = [Distillation(student(), t, terms, labels=0.1)(student(), batch()) for t in (module, captured)]
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)


def test_the_loss_is_the_weighted_sum_and_trains_student_and_adapters_only():
    program, module = student(), teacher().train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    terms = [SoftLabels(0.5), Relations(2.0), Features((("two", "two"),), 0.25)]
    together = Distillation(program, module, terms, labels=0.3)(program, batch())
    alone = [Distillation(program, module, [t])(program, batch()) for t in terms]
    labels = F.cross_entropy(program(*batch().inputs), batch().labels)
    assert torch.allclose(together, sum(alone) + 0.3 * labels, rtol=1e-5)
    objective = Distillation(program, module, terms)
    assert {n for n, _ in objective.named_parameters()} == {"adapters.2.0.weight", "adapters.2.0.bias"}
    objective(program, batch()).backward()
    assert all(p.grad is not None for p in [*program.parameters(), *objective.parameters()])
    assert all(p.grad is None for p in module.parameters())
    assert module.training, "the user's module is left as it was"
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_names_are_nodes_or_modules():
    program = student()
    assert named_node(program, "one").name == "relu"
    assert named_node(program, "one.0").name == "conv2d"
    assert named_node(program, "relu_1").name == "relu_1"


def test_adapters_are_trained_and_vanish():
    program = student()
    objective = Distillation(program, teacher(), [Features((("one", "one"), ("two", "two")))])
    before = [p.clone() for p in objective.parameters()]
    data = (torch.randn(32, 3, 8, 8), torch.randint(5, (32,)))
    trained = fxpress.train(
        program, data, TrainingOptions(epochs=6, batch_size=16, optimizer=AdamW(1e-2)), objective=objective
    )
    assert not any(torch.equal(a, b) for a, b in zip(before, objective.parameters()))
    assert {n for n, _ in trained.program.named_parameters()} == {n for n, _ in program.named_parameters()}
    assert trained.history[-1].loss < 0.9 * trained.history[0].loss


def test_a_small_student_learns_more_from_a_teacher_than_from_few_labels():
    """The teacher knows the whole training set; the student sees 200 examples of it."""
    digits = load_digits()
    example = digits.inputs[:2]
    torch.manual_seed(0)
    large = fxpress.finetune(
        fxpress.capture(DigitNet(16), example),
        (digits.inputs, digits.labels),
        TrainingOptions(epochs=4, optimizer=AdamW(1e-2)),
    )
    few = (digits.inputs[:200], digits.labels[:200])
    torch.manual_seed(1)
    small = fxpress.capture(DigitNet(6), example)
    options = TrainingOptions(epochs=30, batch_size=20, optimizer=AdamW(1e-2))
    objective = Distillation(small, large, [SoftLabels(1.0)])

    def accuracy(p: fxpress.Program) -> float:
        return float((p.run_flat((digits.held_out_inputs,))[0].argmax(1) == digits.held_out_labels).float().mean())

    from_labels = accuracy(fxpress.finetune(small, few, options))
    from_teacher = accuracy(fxpress.finetune(small, few, options, objective=objective))
    assert from_teacher > from_labels + 0.01


class Waves(nn.Module):
    """Conv1d maps [N, C, L], then tokens [N, L, C]."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv1d(2, width, 3, stride, 1), nn.BatchNorm1d(width), nn.ReLU())
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.one(x).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("stride", [1, 2])
def test_features_over_time_are_adapted_in_channels(stride):
    x = torch.randn(6, 2, 12)
    small, large = fxpress.capture(Waves(4).eval(), x[:2]), Waves(6, stride).eval()
    objective = Distillation(small, large, [Features((("one", "one"),))])
    (adapter,) = objective.adapters[0]
    assert (type(adapter), adapter.in_channels, adapter.out_channels) == (nn.Conv1d, 4, 6)
    assert torch.isfinite(objective(small, Batch((x,), torch.zeros(6).long())))
    tokens = Distillation(small, Waves(6).eval(), [Features((("mix", "mix"),))])
    (adapter,) = tokens.adapters[0]
    assert (type(adapter), adapter.in_features, adapter.out_features) == (nn.Linear, 4, 6)
    with pytest.raises(OptionError, match="differ in more than the last dimension"):
        Distillation(small, Waves(6, 2).eval(), [Features((("mix", "mix"),))])


class Tokens(nn.Module):
    """Tokens [N, T, C] to scores [N, 5], or of each token [N, T, 5]."""

    def __init__(self, width: int, each: bool = False) -> None:
        super().__init__()
        self.embed, self.head, self.each = nn.Linear(6, width), nn.Linear(width, 5), each

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.embed(x))
        return self.head(x if self.each else x.mean(1))


def tokens(width: int, **options: bool) -> nn.Module:
    torch.manual_seed(width)
    return Tokens(width, **options).eval()


@pytest.mark.parametrize("width", [4, 8])
def test_attention_is_paid_to_tokens_whatever_their_width(width):
    x, small, large = torch.randn(6, 10, 6), tokens(4), tokens(width)
    program = fxpress.capture(small, x[:2])
    got = Distillation(program, large, [Attention((("embed", "embed"),))])(program, Batch((x,), torch.zeros(6)))
    mine, theirs = (F.normalize(m.embed(x).square().mean(2), dim=1) for m in (small, large))
    assert torch.allclose(got, (mine - theirs).square().sum(1).mean(), atol=1e-6)
    with pytest.raises(OptionError, match="different numbers of places"):
        Attention((("a", "a"),)).adapters(Seen(x, {"a": x}), Seen(x, {"a": x[:, 1:]}))


class Swin(nn.Module):
    """Maps of a convolution, then [N, H, W, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, width, 2, 2), nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))


def test_features_with_channels_last_are_adapted_in_the_last_dimension():
    x = torch.randn(4, 3, 8, 8)
    program = fxpress.capture(Swin(4).eval(), x[:2])
    objective = Distillation(program, Swin(6).eval(), [Features((("mix", "mix"), ("stem", "stem")))])
    mix, stem = objective.adapters[0]
    assert (type(mix), mix.in_features, mix.out_features) == (nn.Linear, 4, 6)
    assert (type(stem), stem.out_channels) == (nn.Conv2d, 6)
    assert torch.isfinite(objective(program, Batch((x,), torch.zeros(4))))


@pytest.mark.parametrize("length", [3, 5])
def test_scores_of_tokens_are_distilled_over_their_classes(length):
    x, labels = torch.randn(4, length, 6), torch.randint(5, (4, length))
    small, large = tokens(4, each=True), tokens(8, each=True)
    program = fxpress.capture(small, x[:2])
    for taught in (large, fxpress.capture(large, x[:2])):
        got = Distillation(program, taught, [SoftLabels(1.0), Relations()], labels=0.5)(program, Batch((x,), labels))
        mine, theirs = (Seen(m(x).flatten(0, 1), {}) for m in (small, large))
        terms = SoftLabels(1.0)(mine, theirs, []) + Relations()(mine, theirs, [])
        assert torch.allclose(got, terms + 0.5 * F.cross_entropy(mine.scores, labels.flatten()), rtol=1e-5)


class Two(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x + y).mean((2, 3))


def two_inputs() -> fxpress.Program:
    x = torch.randn(2, 3, 8, 8)
    return fxpress.capture(Two(), (x, x))


# -- what can go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Distillation(student(), teacher(), []), OptionError, "plain training"),
        (lambda: Distillation(student(), teacher(), [SoftLabels(0.0)]), OptionError, "positive"),
        (lambda: Distillation(student(), teacher(), [SoftLabels()], label_smoothing=0.1), OptionError, "no effect"),
        (lambda: Distillation(student(), teacher(), [Features((("three", "two"),))]), OptionError, "'three'"),
        (lambda: Distillation(student(), teacher(), [Features((("two", "three"),))]), OptionError, "'three'"),
        (lambda: Distillation(student(), teacher(), [Features((("head", "two"),))]), OptionError, "cannot be led"),
        (lambda: Distillation(student(), teacher(), [Attention((("head", "head"),))]), OptionError, "no places"),
        (lambda: Distillation(student(), "resnet18", [SoftLabels()]), OptionError, "teacher is a str"),
        (lambda: Distillation(student(), nn.Linear(3, 5), [SoftLabels()]), OptionError, "does not run on the student"),
        (lambda: Distillation(student(), two_inputs(), [SoftLabels()]), OptionError, "takes 2 inputs"),
        (lambda: Distillation(student(classes=1), teacher(classes=1), [SoftLabels()]), OptionError, "nothing to learn"),
        (lambda: Distillation(student(classes=1), teacher(classes=1), [Relations()]), OptionError, "nothing to learn"),
        (lambda: SoftLabels(temperature=0.0), OptionError, "temperature"),
        (lambda: Features(()), OptionError, "pairs"),
        (
            lambda: Distillation(student(), teacher(classes=7), [SoftLabels()])(student(), batch()),
            DataError,
            "same classes",
        ),
    ],
)
def test_mistakes_are_explained(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert "hint:" in str(caught.value)
