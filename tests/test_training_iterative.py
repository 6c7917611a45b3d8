"""Pruning in steps with training in between, penalties before pruning, zeros that stay."""

from __future__ import annotations

import functools

import pytest
import torch

import fxpress
from fxpress.demo import DigitNet, load_digits
from fxpress.errors import OptionError, PruningError, TrainingError
from fxpress.runtime.evaluate import Top1
from fxpress.training.describe import described
from fxpress.training.distill import Distillation
from fxpress.training.distill_terms import Attention, Features
from fxpress.training.iterative import Shrink
from fxpress.training.objectives import Batch, CrossEntropy
from fxpress.training.options import SGD, AdamW, TrainingOptions
from fxpress.training.sparsity import GroupLasso, GrowingPenalty, removed_weights

OPTIONS = TrainingOptions(epochs=2, optimizer=AdamW(5e-3))


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def data(digits):
    return digits.inputs, digits.labels


@pytest.fixture(scope="module")
def top1(digits):
    return Top1([(digits.held_out_inputs, digits.held_out_labels)])


@pytest.fixture(scope="module")
def program(digits, data) -> fxpress.Program:
    """A network that reads digits."""
    torch.manual_seed(0)
    untrained = fxpress.capture(DigitNet(16), (digits.inputs[:2],))
    return fxpress.finetune(untrained, data, TrainingOptions(epochs=5, optimizer=AdamW(1e-2)))


def metric(program, top1):
    return top1(lambda x: program.run_flat((x,))[0])


def test_steps_lead_to_the_budget_and_every_one_is_recorded(program, data, top1):
    before = metric(program, top1)
    assert before > 0.95
    pruned, plan, steps = fxpress.prune_and_finetune(program, data, OPTIONS, macs=0.4, steps=2, evaluate=top1)
    assert [s.number for s in steps] == [1, 2]
    assert 0.6 < steps[0].macs / plan.macs[0] <= 0.4**0.5
    assert 0.35 < steps[1].macs / plan.macs[0] <= 0.4
    assert steps[1].macs == plan.macs[1]
    assert all(s.pruned_metric < s.metric for s in steps), "training mends what pruning breaks"
    assert steps[-1].metric == metric(pruned, top1) > before - 0.03
    assert plan.notes[-2:] == tuple(map(str, steps))
    again = plan.apply(program)
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in pruned.parameters()]


def test_the_smallest_that_keeps_the_metric_is_returned(program, data, top1):
    floor = metric(program, top1) - 0.05
    pruned, plan, steps = fxpress.prune_and_finetune(
        program, data, OPTIONS, params=0.02, steps=4, evaluate=top1, max_drop=0.05
    )  # fmt: skip
    assert steps[-1].metric < floor, "it stopped at the step that fell too far"
    assert metric(pruned, top1) == steps[-2].metric >= floor
    assert plan.parameters[1] == steps[-2].parameters
    with pytest.raises(TrainingError, match=r"the first of 1 steps drops more than max_drop=0\.0"):
        fxpress.prune_and_finetune(
            program, data, TrainingOptions(optimizer=AdamW(1e-6)), params=0.01, evaluate=top1, max_drop=0.0
        )


def test_a_stopped_run_goes_on_to_the_same_result(program, data, top1, tmp_path):
    class Stopped(BaseException):
        pass

    def stop(name, done, total):
        if name == "finetune 2" and done == 25:
            raise Stopped

    run = functools.partial(fxpress.prune_and_finetune, program, data, OPTIONS, macs=0.5, steps=2, evaluate=top1)
    whole = run()
    with pytest.raises(Stopped):
        run(checkpoint=tmp_path, progress=stop)
    told = []
    resumed = run(checkpoint=tmp_path, progress=lambda name, done, total: told.append((name, done)))
    assert told[0] == ("finetune 2", 21), "the first step is not trained again, nor the first epoch of the second"
    assert resumed.steps == whole.steps
    tensors = whole.program.state_dict()
    assert all(torch.equal(t, tensors[n]) for n, t in resumed.program.state_dict().items())


@pytest.mark.parametrize(
    "shrink",
    [
        Shrink("growing", 0.02, TrainingOptions(epochs=4, optimizer=SGD(0.05))),
        # The lasso has to find out by itself what goes, which takes longer; SGD's steps shrink with the weights.
        Shrink("group-lasso", 3e-3, TrainingOptions(epochs=20, optimizer=AdamW(5e-3))),
    ],
    ids=lambda s: s.method,
)
def test_what_shrinks_before_it_goes_costs_nearly_nothing(program, data, top1, shrink):
    options = TrainingOptions(optimizer=AdamW(1e-9))  # what pruning itself leaves
    plain = fxpress.prune_and_finetune(program, data, options, macs=0.5, evaluate=top1)
    shrunk = fxpress.prune_and_finetune(program, data, options, macs=0.5, evaluate=top1, shrink=shrink)
    assert plain.steps[0].pruned_metric < 0.8
    assert shrunk.steps[0].pruned_metric > 0.95
    if shrink.method == "growing":
        assert shrunk.plan.removals == plain.plan.removals


def test_the_penalty_of_a_plan_is_the_squares_of_what_it_removes(program, data):
    plan = fxpress.plan_pruning(program, macs=0.5)
    masks = removed_weights(program, plan)
    smaller = sum(p.numel() for p in plan.apply(program).parameters())
    assert smaller + sum(int(m.sum()) for m in masks.values()) == sum(p.numel() for p in program.parameters())
    batch = Batch((data[0][:8],), data[1][:8], step=7)
    squares = sum(float((p.detach() * masks[n]).square().sum()) for n, p in program.named_parameters() if n in masks)
    growing = GrowingPenalty(program, plan, growth=0.01, every=2)
    assert [growing.factor(s) for s in (0, 1, 2, 7, 10**6)] == pytest.approx([0.01, 0.01, 0.02, 0.04, 1.0])
    difference = growing(program, batch) - CrossEntropy()(program, batch)
    assert difference.item() == pytest.approx(0.04 / 2 * squares, rel=1e-4)


def test_a_channel_of_the_lasso_is_its_weights_in_all_layers(tiny_module, tiny_data):
    program = fxpress.capture(tiny_module, (tiny_data[:2],))
    lasso = GroupLasso(program, strength=1.0)
    t = {n: p.detach().square() for n, p in program.named_parameters()}
    squares = t["conv1.weight"].sum((1, 2, 3)) + t["conv2.weight"].sum((1, 2, 3)) + t["conv2.weight"].sum((0, 2, 3))
    squares = squares + t["head.weight"].sum(0)
    squares = squares + sum(t[f"{norm}.{kind}"] for norm in ("bn1", "bn2") for kind in ("weight", "bias"))
    assert torch.allclose(lasso.norms(program).detach().sort().values, squares.sqrt().sort().values, rtol=1e-4)
    count = 3 * 9 + 2 * 16 * 9 + 5 + 4
    assert torch.allclose(lasso.scale, torch.full((16,), float(count)).sqrt())


@pytest.mark.parametrize("choices", [{"kind": "unstructured", "ratio": 0.6}, {"kind": "n:m", "pattern": "2:4"}])
def test_zeros_of_a_sparse_plan_stay_zero(program, data, choices):
    plan = fxpress.plan_pruning(program, **choices)
    sparse = plan.apply(program)
    options = TrainingOptions(optimizer=SGD(0.05), ema=0.9)
    tuned = fxpress.finetune(sparse, data, options, plan=plan)
    filled = fxpress.finetune(sparse, data, options)
    zeros = lambda p: sum(int((t == 0).sum()) for t in p.parameters())  # noqa: E731
    assert zeros(tuned) >= plan.zeros > 0
    assert zeros(filled) < plan.zeros
    assert any(not torch.equal(a, b) for a, b in zip(tuned.parameters(), sparse.parameters()))


def test_adapters_are_as_wide_as_the_program_of_each_step(program, data):
    teacher, few = program.copy(), tuple(t[:64] for t in data)
    terms = [Features((("down", "down"),)), Attention((("down", "down"),))]
    objective = Distillation(program, teacher, terms, labels=0.5, label_smoothing=0.1, seed=3)
    pruned, _, steps = fxpress.prune_and_finetune(
        program, few, macs=0.4, steps=2, objective=objective, shrink=Shrink("growing", 0.1)
    )
    assert len(steps) == 2
    anew = objective.made_for(pruned)
    (adapter,) = anew.adapters[0]
    assert adapter.in_channels < adapter.out_channels == 32
    assert described(anew) == described(objective)


def test_what_makes_no_sense_is_refused(program, data):
    for bad in (-0.1, float("nan"), float("inf"), "1%"):
        with pytest.raises(OptionError, match="max_drop is"):
            fxpress.prune_and_finetune(program, data, macs=0.5, max_drop=bad, evaluate=lambda run: 0.0)
    with pytest.raises(OptionError, match="shrink is 'growing'"):
        fxpress.prune_and_finetune(program, data, macs=0.5, shrink="growing")
    with pytest.raises(OptionError, match="exactly one budget"):
        fxpress.prune_and_finetune(program, data)
    with pytest.raises(OptionError, match="max_drop has no effect"):
        fxpress.prune_and_finetune(program, data, macs=0.5, max_drop=0.1)
    with pytest.raises(OptionError, match="steps"):
        fxpress.prune_and_finetune(program, data, macs=0.5, steps=0)
    with pytest.raises(OptionError, match="method"):
        Shrink("melt")
    plan = fxpress.plan_pruning(program, macs=0.5)
    with pytest.raises(OptionError, match="zeroes no single weights"):
        fxpress.finetune(program, data, plan=plan)
    with pytest.raises(PruningError, match="not for this program"):
        removed_weights(plan.apply(program), plan)
