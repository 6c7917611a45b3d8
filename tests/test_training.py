"""The training loop: what an option promises, on networks that train in a second."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxpress
from fxpress.errors import DataError, OptionError, TrainingError
from fxpress.passes.prune.recovery.shuffle import flip_and_shift
from fxpress.runtime.evaluate import Top1
from fxpress.training.distill import Distillation
from fxpress.training.distill_terms import SoftLabels
from fxpress.training.engine import move
from fxpress.training.objectives import CrossEntropy, scores, tells_classes
from fxpress.training.options import SGD, AdamW, TrainingOptions
from fxpress.training.qat import FreezeNorms
from fxpress.training.schedules import Constant, Cosine, OneCycle, Plateau, Step
from fxpress.training.seeding import generator_for
from fxpress.training.sparsity import GroupLasso, GrowingPenalty

CLASSES = 4


class Small(nn.Module):
    """Conv, BatchNorm, dropout, linear: scores [N, 4] from [N, 2, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """150 labelled examples whose class shows in the mean of one quarter of the picture."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (150,), generator=generator)
    inputs = 0.5 * torch.randn(150, 2, 6, 6, generator=generator)
    for i, label in enumerate(labels.tolist()):
        inputs[i, label % 2] += 1.5 if label < 2 else -1.5
    return inputs, labels


@pytest.fixture(scope="module")
def program(data) -> fxpress.Program:
    torch.manual_seed(0)
    return fxpress.capture(Small(), (data[0][:2],))


def same(first: fxpress.Program, second: fxpress.Program) -> bool:
    """Are all tensors equal, bit for bit?"""
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_it_learns_and_leaves_the_argument_alone(program, data):
    before = {n: t.clone() for n, t in program.state_dict().items()}
    tuned = fxpress.finetune(program, data, TrainingOptions(epochs=6, optimizer=AdamW(2e-2), batch_size=32))
    assert Top1([data])(program) < 0.7 < 0.9 < Top1([data])(tuned)
    assert not tuned.training
    assert all(torch.equal(t, before[n]) for n, t in program.state_dict().items())
    assert tuned.log[-1].name == "finetune"
    assert "mean loss by epoch" in tuned.log[-1].notes[0]
    assert not torch.equal(tuned.state_dict()["norm.running_mean"], before["norm.running_mean"]), "statistics follow"


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(program, data):
    torch.manual_seed(1)
    first = fxpress.finetune(program, data)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after), "the caller's generator is where it was"
    torch.manual_seed(2)
    assert same(first, fxpress.finetune(program, data))
    assert not same(first, fxpress.finetune(program, data, TrainingOptions(seed=1)))


@pytest.mark.parametrize("form", ["list", "arrays", "dataset", "loader", "function"])
def test_data_of_every_form(program, data, form):
    inputs, labels = data
    batches = list(zip(inputs.split(40), labels.split(40)))
    given = {
        "list": batches,
        "arrays": (inputs.numpy(), labels.numpy()),
        "dataset": TensorDataset(inputs, labels),
        "loader": DataLoader(TensorDataset(inputs, labels), 40, shuffle=True),
        "function": lambda: iter(batches),
    }[form]
    options = TrainingOptions(batch_size=40, optimizer=AdamW(1e-2), epochs=2)
    trained = fxpress.train(program, given, options)
    assert trained.program.log[-1].changes == 8
    assert trained.history[1].loss < trained.history[0].loss
    if form in ("arrays", "dataset"):
        assert same(trained.program, fxpress.finetune(program, batches, options)), "the order is that of the seed"
    if form == "loader":
        torch.manual_seed(99)
        assert same(trained.program, fxpress.finetune(program, given, options)), "a shuffling loader is seeded"


def test_every_example_comes_once_an_epoch_in_nearly_equal_batches(program, data):
    seen = []

    def objective(program, batch):
        seen.append((batch.step, batch.inputs[0].clone()))
        return CrossEntropy()(program, batch)

    fxpress.finetune(program, data, TrainingOptions(batch_size=64, epochs=2), objective=objective)
    assert [step for step, _ in seen] == list(range(6))
    assert [len(x) for _, x in seen] == [50] * 6
    for epoch in (seen[:3], seen[3:]):
        rows = torch.cat([x for _, x in epoch]).flatten(1).sum(1)
        assert torch.equal(rows.sort().values, data[0].flatten(1).sum(1).sort().values)
    assert not torch.equal(seen[0][1], seen[3][1])


def test_a_program_with_a_fixed_batch_trains_on_batches_of_that_size(data):
    torch.manual_seed(0)
    fixed = fxpress.capture(Small(), (data[0][:10],), dynamic_batch=False)
    batches = list(zip(data[0].split(10), data[1].split(10)))
    history = fxpress.train(fixed, batches, TrainingOptions(epochs=2, optimizer=AdamW(1e-2))).history
    assert history[1].loss < history[0].loss
    with pytest.raises(DataError, match="shape"):
        fxpress.train(fixed, data)


def test_several_inputs_and_named_ones():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 4), nn.Linear(5, 4)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.left(a) + self.right(b)

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 3, generator=generator), torch.randn(40, 5, generator=generator)
    labels = (a.sum(1) + b.sum(1) > 0).long()
    program = fxpress.capture(Two(), (a[:2], b[:2]))
    tuned = fxpress.finetune(program, (a, b, labels), TrainingOptions(epochs=3, batch_size=10))
    named = [{"a": x, "b": y, "labels": z} for x, y, z in zip(a.split(10), b.split(10), labels.split(10))]
    assert same(tuned, fxpress.finetune(program, named, TrainingOptions(epochs=3, batch_size=10)))


def test_a_program_moves_to_another_device_whole():
    """The device meta stands for a GPU: it refuses operands that are elsewhere, and needs no hardware."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)
            self.register_buffer("shift", torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ramp = torch.arange(6, device=x.device) + torch.tensor([1.0, 2, 3, 4, 5, 6])
            return self.head(x * ramp + self.shift) + torch.zeros(3).to(x.device)

    program = fxpress.capture(Places(), (torch.randn(2, 6),))
    expected = program(torch.ones(2, 6))
    there = program.copy()
    move(there, torch.device("meta"))
    assert there(torch.ones(2, 6, device="meta")).device.type == "meta"
    move(program, torch.device("cpu"))
    assert torch.equal(program(torch.ones(2, 6)), expected)


def test_an_objective_knows_its_place(program, data):
    places = []

    def objective(program, batch):
        places.append((batch.step, batch.done))
        return CrossEntropy()(program, batch)

    fxpress.finetune(program, data, TrainingOptions(batch_size=75, epochs=2), objective=objective)
    assert places == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]


def test_schedules():
    assert [Constant().factor(d) for d in (0, 0.5, 1)] == [1, 1, 1]
    assert [Step((0.5, 0.75), 0.1).factor(d) for d in (0.49, 0.5, 0.8)] == pytest.approx([1, 0.1, 0.01])
    assert [Cosine().factor(d) for d in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert Cosine(0.2).factor(1) == pytest.approx(0.2)
    cycle = OneCycle()
    assert [cycle.factor(d) for d in (0, 0.3, 1)] == pytest.approx([0.04, 1, 1e-4])
    assert [Plateau(patience=1).reduced(n) for n in range(5)] == [False, False, True, False, True]


def test_a_schedule_with_warmup_as_the_optimizer_sees_it(program, data):
    options = TrainingOptions(batch_size=50, epochs=4, warmup=0.25, optimizer=SGD(0.1), schedule=Cosine())
    rates = [r.learning_rate for r in fxpress.train(program, data, options).history]
    assert rates[0] == pytest.approx(0.1 * 3 / 4), "12 steps, 3 of them to warm up"
    expected = [0.1 * (1 + math.cos(math.pi * d)) / 2 for d in ((5 - 3) / 9, (8 - 3) / 9, (11 - 3) / 9)]
    assert rates[1:] == pytest.approx(expected)


def test_decay_skips_norms_and_biases(program, data):
    options = TrainingOptions(optimizer=SGD(0.1, momentum=0.0, weight_decay=0.5), schedule=Constant(), batch_size=150)
    nothing = lambda program, batch: 0.0 * scores(program, batch.inputs).sum()  # noqa: E731
    before, after = program.state_dict(), fxpress.finetune(program, data, options, objective=nothing).state_dict()
    for name in ("conv.weight", "head.weight"):
        assert torch.allclose(after[name], before[name] * (1 - 0.1 * 0.5))
    for name in ("norm.weight", "norm.bias", "head.bias"):
        assert torch.equal(after[name], before[name])


def test_clipping_bounds_the_step(program, data):
    options = TrainingOptions(optimizer=SGD(1.0, momentum=0.0, weight_decay=0.0), schedule=Constant(), batch_size=150)
    steep = lambda program, batch: 1000 * CrossEntropy()(program, batch)  # noqa: E731

    def moved(**kw):
        import dataclasses

        tuned = fxpress.finetune(program, data, dataclasses.replace(options, **kw), objective=steep)
        pairs = zip(dict(tuned.named_parameters()).values(), dict(program.named_parameters()).values())
        return math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))

    assert moved(clip_norm=0.5) == pytest.approx(0.5, rel=1e-3)
    assert moved() > 10


def test_frozen_parameters_stay(program, data):
    tuned = fxpress.finetune(program, data, TrainingOptions(freeze=("conv.*",)))
    assert torch.equal(tuned.state_dict()["conv.weight"], program.state_dict()["conv.weight"])
    assert not torch.equal(tuned.state_dict()["head.weight"], program.state_dict()["head.weight"])
    with pytest.raises(OptionError, match="matches no parameter"):
        fxpress.finetune(program, data, TrainingOptions(freeze=("nothing*",)))


def test_label_smoothing_is_that_of_torch(program, data):
    options = TrainingOptions(batch_size=150, label_smoothing=0.2, optimizer=AdamW(1e-9))
    smoothed = fxpress.train(program, data, options).history[0].loss

    def expected(program, batch):
        return nn.functional.cross_entropy(scores(program, batch.inputs), batch.labels, label_smoothing=0.2)

    options = TrainingOptions(batch_size=150, optimizer=AdamW(1e-9))
    assert smoothed == fxpress.train(program, data, options, objective=expected).history[0].loss
    assert smoothed != pytest.approx(fxpress.train(program, data, options).history[0].loss, rel=1e-3)


def test_the_average_of_the_weights_is_what_is_returned(program, data):
    seen = []

    def watch(program, batch):
        seen.append(program.state_dict()["head.bias"].clone())
        return CrossEntropy()(program, batch)

    options = TrainingOptions(batch_size=75, ema=0.9, optimizer=AdamW(1e-2))
    tuned = fxpress.finetune(program, data, options, objective=watch)
    fxpress.finetune(program, data, TrainingOptions(batch_size=75, optimizer=AdamW(1e-2), epochs=1))
    first, second = seen[0], seen[1]
    last = fxpress.finetune(program, data, TrainingOptions(batch_size=75, optimizer=AdamW(1e-2))).state_dict()["head.bias"]
    mean = 0.1 * first + 0.9 * second  # decay (1 + 0) / (10 + 0)
    mean = 2 / 11 * mean + 9 / 11 * last
    assert torch.allclose(tuned.state_dict()["head.bias"], mean, atol=1e-6)


def test_the_best_epoch_is_kept_and_patience_stops(program, data):
    judged = iter([0.5, 0.9, 0.4, 0.3, 0.2, 0.1])
    states = []

    def evaluate(run):
        run(data[0][:2])
        return next(judged)

    def on_epoch(program, number):
        states.append({n: t.clone() for n, t in program.state_dict().items()})

    options = TrainingOptions(epochs=6, patience=2, optimizer=AdamW(1e-2))
    trained = fxpress.train(program, data, options, evaluate=evaluate, on_epoch=on_epoch)
    assert [r.metric for r in trained.history] == [0.5, 0.9, 0.4, 0.3], "two epochs without gain end it"
    assert trained.kept == trained.history[1]
    assert all(torch.equal(t, states[2][n]) for n, t in trained.program.state_dict().items())


def test_a_plateau_lowers_the_rate(program, data):
    metrics = iter([0.9, 0.8, 0.8, 0.8, 0.8])
    options = TrainingOptions(epochs=5, schedule=Plateau(gamma=0.5, patience=1), optimizer=SGD(0.1), keep="last")
    history = fxpress.train(program, data, options, evaluate=lambda run: next(metrics)).history
    assert [r.learning_rate for r in history] == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05])


def test_held_out_examples_judge_and_are_not_trained_on(program, data):
    trained_on = []

    def objective(program, batch):
        trained_on.extend(x.numpy().tobytes() for x in batch.inputs[0])
        return CrossEntropy()(program, batch)

    objective.tells_classes = True
    trained = fxpress.train(program, data, TrainingOptions(hold_out=0.2, epochs=2), objective=objective)
    assert len(set(trained_on)) == 120
    assert trained.history[0].metric is not None
    assert 0 <= trained.history[0].metric <= 1


def test_an_objective_of_ones_own_judges_by_its_loss(program, data):
    """Class numbers say nothing of the outputs: those of an embedding are no scores."""
    embedding = lambda program, batch: 7 + CrossEntropy()(program, batch)  # noqa: E731
    options = TrainingOptions(hold_out=0.2)
    assert fxpress.train(program, data, options, objective=embedding).kept.metric < -7
    distilled = Distillation(program, program, [SoftLabels()])
    plan = fxpress.plan_pruning(program, macs=0.7)
    for known in (distilled, FreezeNorms(distilled, 0.5), GroupLasso(program), GrowingPenalty(program, plan)):
        assert fxpress.train(program, data, options, objective=known).kept.metric >= 0
    assert not tells_classes(FreezeNorms(embedding, 0.5))


def test_held_out_examples_without_a_label_do_not_judge(program, data):
    inputs, labels = data
    some = labels.clone()
    some[held_out_rows(150, 30)[:20]] = -100
    trained = fxpress.train(program, (inputs, some), TrainingOptions(hold_out=0.2))
    rows = held_out_rows(150, 30)[20:]
    assert trained.kept.metric == pytest.approx(Top1([(inputs[rows], labels[rows])])(trained.program))
    with pytest.raises(DataError, match="no example that is held out has a label"):
        fxpress.train(program, (inputs, torch.full_like(labels, -100)), TrainingOptions(hold_out=0.2))


def test_held_out_examples_judge_a_regression_by_its_loss(program, data):
    inputs = data[0]
    targets = torch.stack([inputs.mean((1, 2, 3))] * CLASSES, 1)

    def squares(program, batch):
        return (scores(program, batch.inputs) - batch.labels).square().mean()

    options = TrainingOptions(hold_out=0.2, epochs=3, optimizer=AdamW(1e-2), freeze=("norm.*",))
    trained = fxpress.train(program, (inputs, targets), options, objective=squares)
    left = inputs[held_out_rows(150, 30)], targets[held_out_rows(150, 30)]
    with torch.no_grad():
        loss = (trained.program(left[0]) - left[1]).square().mean()
    assert trained.kept.metric == pytest.approx(-loss.item(), rel=1e-4)
    assert trained.kept.metric == max(r.metric for r in trained.history)


def held_out_rows(count, held, seed=0):
    return torch.randperm(count, generator=generator_for(seed, "hold-out"))[:held]


def test_bfloat16_where_the_device_has_it(program, data):
    options = TrainingOptions(precision="bfloat16", optimizer=AdamW(1e-2))
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        with pytest.raises(OptionError, match="does not compute in bfloat16"):
            fxpress.finetune(program, data, options)
        return
    tuned = fxpress.finetune(program, data, options)
    assert all(p.dtype == torch.float32 for p in tuned.parameters())
    assert not same(tuned, fxpress.finetune(program, data, TrainingOptions(optimizer=AdamW(1e-2))))


def test_an_objective_with_weights_trains_them_and_goes_on_with_them(program, data, tmp_path):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))
            self.seen = []

        def described(self):
            return {}

        def forward(self, program, batch):
            self.seen.append(self.temperature.item())
            return nn.functional.cross_entropy(scores(program, batch.inputs) * self.temperature, batch.labels)

    objective, options = Scaled(), TrainingOptions(optimizer=AdamW(1e-2), epochs=3)
    whole = fxpress.train(program, data, options, objective=objective)
    assert len(set(objective.seen)) == 9, "it is trained"
    assert objective.temperature.item() not in (1, objective.seen[-1])
    assert objective.temperature.grad is None
    objective = Scaled()

    def stop(name, done, total):
        if done == 5:
            raise KeyboardInterrupt

    call = {"options": options, "objective": objective, "checkpoint": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        fxpress.train(program, data, **call, progress=stop)
    assert objective.temperature.item() == 1
    assert fxpress.train(program, data, **call).history == whole.history, "the same call goes on"
    trained = objective.temperature.item()
    assert trained != 1
    assert fxpress.train(program, data, **call).history == whole.history, "of what is finished, too"
    assert objective.temperature.item() == trained


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"checkpoint_every": 3}, "checkpoint_every has no effect"),
        ({"options": TrainingOptions(patience=2)}, "patience has no effect"),
        ({"options": TrainingOptions(keep="best")}, "keep has no effect"),
        ({"options": TrainingOptions(hold_out=0.1), "evaluate": lambda run: 0.0}, "hold_out has no effect"),
        ({"options": TrainingOptions(warmup=0.1, schedule=OneCycle())}, "one-cycle"),
        ({"options": TrainingOptions(precision="float16", device="cpu")}, "does not compute in float16"),
        ({"augment": "flip-shift-cutmix"}, "mixes pictures"),
        ({"augment": "flop"}, "unknown augmentation 'flop'"),
        ({"options": TrainingOptions(label_smoothing=0.1), "objective": CrossEntropy()}, "label_smoothing has no effect"),
    ],
)
def test_options_without_effect_are_refused(program, data, choices, words):
    with pytest.raises(OptionError, match=words):
        fxpress.finetune(program, data, **choices)


def test_without_accelerate_the_error_says_what_to_install(program, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(OptionError, match="needs the package accelerate") as caught:
        fxpress.finetune(program, data)
    assert "pip install 'fxpress[train]'" in str(caught.value)


def test_steps_leave_nothing_behind(program, data):
    """torch.manual_seed keeps a note of every seed where there is no GPU."""
    before = len(torch.cuda._queued_calls)
    fxpress.finetune(program, data, TrainingOptions(batch_size=30, epochs=4))
    assert len(torch.cuda._queued_calls) - before < 4


def test_augmentation_by_name_and_by_function(program, data):
    def mirrored(inputs, generator):
        return tuple(x.flip(3) for x in inputs)

    turned = (data[0].flip(3), data[1])
    assert same(fxpress.finetune(program, data, augment=mirrored), fxpress.finetune(program, turned))
    named = fxpress.finetune(program, data, augment="flip-shift")
    assert same(named, fxpress.finetune(program, data, augment=flip_and_shift))
    assert not same(named, fxpress.finetune(program, data))


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0}, {"ema": 1.5}, {"precision": "int8"}, {"hold_out": 1.0}, {"clip_norm": 0}, {"epochs": 2.5},
        {"warmup": "a"}, {"clip_norm": "1"}, {"optimizer": "sgd"}, {"optimizer": SGD}, {"schedule": "cosine"},
        {"freeze": None}, {"freeze": (3,)}, {"seed": None},
    ],
)  # fmt: skip
def test_bad_values_are_refused(bad):
    with pytest.raises(OptionError, match=next(iter(bad))):
        TrainingOptions(**bad)


@pytest.mark.parametrize(
    "make", [lambda: SGD("a"), lambda: AdamW(betas=0.9), lambda: Step(0.5), lambda: Plateau(patience=None)]
)
def test_bad_values_of_parts_are_refused(make):
    with pytest.raises(OptionError, match=r"(is|are) ") as caught:
        make()
    assert "hint:" in str(caught.value)


def test_one_glob_may_stand_alone(program, data):
    tuned = fxpress.finetune(program, data, TrainingOptions(freeze="conv.*"))
    assert torch.equal(tuned.state_dict()["conv.weight"], program.state_dict()["conv.weight"])
    assert not torch.equal(tuned.state_dict()["head.weight"], program.state_dict()["head.weight"])


@pytest.mark.parametrize("call", [fxpress.finetune, fxpress.train, fxpress.train_quantized, fxpress.prune_and_finetune])
def test_a_module_is_no_program(call, data):
    more = {"calibration": data[0].split(30)} if call is fxpress.train_quantized else {}
    more |= {"macs": 0.5} if call is fxpress.prune_and_finetune else {}
    with pytest.raises(OptionError, match="expected a Program, got Small"):
        call(Small(), data, **more)


@pytest.mark.parametrize("change", [torch.Tensor.int, torch.Tensor.short, torch.Tensor.tolist, torch.Tensor.numpy])
def test_class_numbers_of_any_kind(program, data, change):
    inputs, labels = data
    assert same(fxpress.finetune(program, (inputs, change(labels))), fxpress.finetune(program, data))


def test_places_without_a_label_count_for_nothing(program, data):
    inputs, labels = data
    assert math.isfinite(fxpress.train(program, (inputs, torch.where(labels == 0, -100, labels))).kept.loss)


def test_data_that_fail_are_explained(program, data):
    def broken():
        yield data[0][:30], data[1][:30]
        raise OSError("disk gone")

    with pytest.raises(DataError, match="batch 1 of the data cannot be read: OSError: disk gone") as caught:
        fxpress.finetune(program, broken)
    assert "test_training.py" in str(caught.value)
    with pytest.raises(DataError, match="150 examples and 149 labels"):
        fxpress.finetune(program, (data[0], data[1][1:]))


def test_mixed_pictures_are_refused_wherever_labels_are_read(program, data):
    for objective in (CrossEntropy(), lambda program, batch: CrossEntropy()(program, batch)):
        with pytest.raises(OptionError, match="mixes pictures"):
            fxpress.finetune(program, data, augment="flip-shift-cutmix", objective=objective)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers, self.head = kind(6, 8, num_layers=2, dropout=0.9, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_recurrent_layers_is_on_in_training_alone(kind):
    x = torch.randn(8, 5, 6)
    program = fxpress.capture(Recurrent(kind).eval(), x)
    assert torch.equal(program(x), program(x))
    program.train()
    assert not torch.equal(program(x), program(x))
    program.eval()
    assert torch.equal(program(x), program(x))


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (torch.rand(len(x), 1) > self.drop_prob) if self.training else x


class Unlike(nn.Module):
    """Attention with dropout, random depth, and a norm that averages over all batches."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=chance, batch_first=True)
        self.depth, self.norm = DropPath(chance), nn.BatchNorm1d(8, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention(x, x, x, need_weights=False)[0].mean(1)
        return self.norm(x.mean(1) + self.depth(y))


def test_what_trains_otherwise_than_in_the_module_is_noted(data):
    x = torch.randn(20, 3, 8)
    program = fxpress.capture(Unlike(0.5), x[:2])
    trained = fxpress.train(program, (x, torch.zeros(20).long()), TrainingOptions(batch_size=10))
    text = "; ".join(trained.notes())
    assert "attention, depth: what is dropped at random in training is not dropped here" in text
    assert "norm: average over all batches (momentum=None), here with momentum 0.1" in text
    moved = trained.program.state_dict()["norm.running_mean"]
    assert moved.abs().max() > 0, "its statistics are trained"
    quiet = fxpress.capture(Unlike(0.0), x[:2])
    assert "dropped" not in "; ".join(fxpress.train(quiet, (x, torch.zeros(20).long())).notes())


def test_bad_data_and_objectives_are_explained(program, data):
    inputs, labels = data
    with pytest.raises(DataError, match="no labels"):
        fxpress.finetune(program, [inputs])
    with pytest.raises(DataError, match="labels go from"):
        fxpress.finetune(program, (inputs, labels + 2))
    with pytest.raises(DataError, match="do not fit an output"):
        fxpress.finetune(program, (inputs, inputs))
    with pytest.raises(TrainingError, match="does not depend on the weights"):
        fxpress.finetune(program, data, objective=lambda program, batch: torch.zeros(()))
    with pytest.raises(TrainingError, match="a scalar"):
        fxpress.finetune(program, data, objective=lambda program, batch: scores(program, batch.inputs))
    with pytest.raises(TrainingError, match="ZeroDivisionError") as caught:
        fxpress.finetune(program, data, objective=lambda program, batch: 1 / 0)
    assert "test_training.py" in str(caught.value)
