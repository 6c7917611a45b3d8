"""What a pruned or quantized student matches of its teacher: found in the graph, at the positions that are left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxpress
from fxpress.backends.targets import load_target
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager
from fxpress.passes.prune.recovery.pairing import pair_programs
from fxpress.passes.prune.recovery.refine import Loss
from fxpress.training.distill import Distillation
from fxpress.training.matching import matched_values
from fxpress.training.objectives import Batch

EXAMPLE = torch.zeros(2, 3, 8, 8)


class Block(nn.Module):
    """x + conv(relu(conv(x)))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.last = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.last(self.second(self.norm(self.first(x)).relu()))).relu()


class Stream(nn.Module):
    """Two blocks on one stream, and a head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def program() -> fxpress.Program:
    torch.manual_seed(0)
    return fxpress.capture(Stream().eval(), (EXAMPLE,))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def loss(student: fxpress.Program, teacher: fxpress.Program, term, images: torch.Tensor) -> torch.Tensor:
    return Distillation(student, teacher, [term])(student, Batch((images,), torch.zeros(len(images), dtype=torch.long)))


def test_it_is_the_loss_of_recovery(program, images):
    plan = fxpress.plan_pruning(program, ratio=0.5, scope="layer", round_to=1)
    pruned = plan.apply(program)
    term = matched_values(pruned, program, plan)
    assert len(term.pairs) == 2, "the sums of both blocks"
    assert any(kept for kept in term.kept.values()), "the stream is narrower"
    want = Loss(pair_programs(pruned, program, plan))((images,))
    torch.testing.assert_close(loss(pruned, program, term, images), want)
    assert want > 0.01


def test_a_student_that_lost_nothing_has_no_loss(program, images):
    term = matched_values(program.copy(), program, None)
    assert len(term.pairs) == 2
    assert loss(program.copy(), program, term, images) == 0


def test_channels_that_did_nothing_cost_nothing(program, images):
    """The oracle's law: where what is removed was zero, what is left is the teacher's own value."""
    plan = fxpress.plan_pruning(program, ratio=0.5, exclude=("stem", "head"), round_to=1)
    teacher = program.copy()
    inner = [r for r in plan.removals if r.name.endswith((".norm.weight", ".norm.bias"))]
    with torch.no_grad():
        for removal in inner:
            teacher.state_dict()[removal.name][list(removal.removed)] = 0
    assert inner
    pruned = plan.apply(teacher)
    assert loss(pruned, teacher, matched_values(pruned, teacher, plan), images) < 1e-10


def run(program: fxpress.Program, pipeline: str, images: torch.Tensor) -> fxpress.Program:
    data = images, torch.zeros(len(images), dtype=torch.long)
    context = Context(load_target("ort-x86"), [(images,)], training=data)
    return PassManager(pipeline).run(program, context)


def distance(student: fxpress.Program, teacher: fxpress.Program, images: torch.Tensor) -> float:
    return float((student(images) - teacher(images)).square().mean() / teacher(images).var())


def test_distil_and_qat_match_after_pruning(program, images):
    images = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    matching = "soft=0,labels=0,match=1,optimizer=muon,learning_rate=0.005,epochs=4,batch_size=16"
    pruned = run(program, "cleanup,prune{macs=0.6}", images)
    distilled = run(program, f"cleanup,prune{{macs=0.6}},distil{{freeze=true,{matching}}}", images)
    fuse = "canonicalize,fuse-batchnorm{keep=true}"
    trained = run(program, f"cleanup,prune{{macs=0.6}},{fuse},qat{{freeze=0,{matching}}}", images)
    before = distance(pruned, program, images)
    assert distance(distilled, program, images) < 0.5 * before
    assert distance(trained, program, images) < 0.5 * before


def test_qat_matches_the_float_program(program, images):
    matching = "labels=0,match=1,optimizer=muon,learning_rate=0.001,freeze=0,batch_size=8"
    trained = run(program, f"cleanup,canonicalize,fuse-batchnorm{{keep=true}},qat{{{matching}}}", images)
    assert distance(trained, program, images) < 0.01


class Plain(nn.Module):
    """Convolutions in a row, without sums."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8), nn.SiLU()
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x).mean((2, 3)))


def test_activations_are_matched_where_there_are_no_sums(images):
    torch.manual_seed(0)
    teacher = fxpress.capture(Plain().eval(), (EXAMPLE,))
    plan = fxpress.plan_pruning(teacher, ratio=0.5, scope="layer", round_to=1)
    pruned = plan.apply(teacher)
    assert {n for n, _ in matched_values(pruned, teacher, plan).pairs} == {"relu", "silu"}
    # Fused and quantized too, where a convolution's value has become that of the BatchNorm behind it.
    fuse = "canonicalize,fuse-batchnorm{keep=true},annotate,observe,calibrate,fake-quantize"
    fake = run(teacher, fuse, images)
    term = matched_values(fake, teacher, None)
    assert {n for n, _ in term.pairs} >= {"relu"}
    assert loss(fake, teacher, term, images) < 1e-3


def test_scores_alone_are_matched_where_nothing_else_is_common(program, images):
    other = fxpress.capture(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), (EXAMPLE,))
    term = matched_values(other, program, None)
    assert term.pairs == ()
    want = 0.05 * (other(images) - program(images)).square().mean() / program(images).var()
    torch.testing.assert_close(loss(other, program, term, images), want)
