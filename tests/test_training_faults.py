"""What a training survives, and what it says when it cannot: kills, full disks, other runs' checkpoints, NaN."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fxpress
from fxpress.errors import OutputError, TrainingError
from fxpress.passes.prune.recovery.shuffle import flip_and_shift
from fxpress.training.describe import described
from fxpress.training.distill import Distillation
from fxpress.training.distill_terms import SoftLabels
from fxpress.training.objectives import CrossEntropy
from fxpress.training.options import SGD, AdamW, TrainingOptions
from fxpress.training.qat import FreezeNorms
from fxpress.training.schedules import Cosine, Plateau
from fxpress.training.sparsity import GroupLasso, GrowingPenalty


class Small(nn.Module):
    """Conv, BatchNorm, dropout, linear: scores [N, 3] from [N, 1, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (90,), generator=generator)
    return torch.randn(90, 1, 6, 6, generator=generator) + labels[:, None, None, None] - 1, labels


@pytest.fixture(scope="module")
def program(data) -> fxpress.Program:
    torch.manual_seed(0)
    return fxpress.capture(Small(), (data[0][:2],))


class Stopped(BaseException):
    """Stands for a signal."""


def stop_at(step):
    """A progress display that stops the training once `step` steps are done."""

    def progress(name, done, total):
        if done == step:
            raise Stopped

    return progress


OPTIONS = TrainingOptions(epochs=4, batch_size=32, clip_norm=1.0, ema=0.9, hold_out=0.2, warmup=0.1)
VARIANTS = {
    "adamw-cosine": dataclasses.replace(OPTIONS, optimizer=AdamW(1e-2), schedule=Cosine()),
    "sgd-plateau-patience": dataclasses.replace(
        OPTIONS, optimizer=SGD(0.5, nesterov=True), schedule=Plateau(0.5, 0), patience=2, warmup=0.0
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("steps", [(1,), (5, 7), (3, 6, 11)])
def test_a_run_that_was_stopped_ends_with_the_same_bits(program, data, tmp_path, variant, steps):
    options = VARIANTS[variant]
    whole = fxpress.train(program, data, options, augment=flip_and_shift)
    assert len(whole.history) == 4 or variant != "adamw-cosine"
    for step in steps:
        if step < whole.program.log[-1].changes:
            with pytest.raises(Stopped):
                fxpress.train(
                    program, data, options, augment=flip_and_shift, progress=stop_at(step),
                    checkpoint=tmp_path / "run", checkpoint_every=2,
                )  # fmt: skip
    torch.manual_seed(77)  # what other code draws has no part in it
    told = []
    resumed = fxpress.train(
        program, data, options, augment=flip_and_shift,
        checkpoint=tmp_path / "run", checkpoint_every=2, progress=lambda name, done, total: told.append(done),
    )  # fmt: skip
    assert resumed.history == whole.history
    assert resumed.kept == whole.kept
    tensors = whole.program.state_dict()
    assert all(torch.equal(t, tensors[n]) for n, t in resumed.program.state_dict().items())
    assert told[0] > 1 or steps == (1,), "it went on, it did not begin again"


class Rows(Dataset):
    """Single examples, read by index."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data[1])

    def __getitem__(self, index):
        return self.data[0][index], self.data[1][index]


def noisy_batches(data):
    """A stream that draws from the global generators of torch and numpy."""
    for x, y in zip(data[0].split(30), data[1].split(30)):
        yield x + 0.1 * torch.randn(x.shape) + float(np.random.rand()), y


@pytest.mark.parametrize("form", ["dataset", "loader", "own generator", "function"])
def test_a_stopped_run_goes_on_in_the_middle_of_any_data(program, data, tmp_path, form):
    given = {
        "dataset": Rows(data),
        "loader": DataLoader(Rows(data), 30, shuffle=True),
        "own generator": DataLoader(Rows(data), 30, shuffle=True, generator=torch.Generator().manual_seed(7)),
        "function": lambda: noisy_batches(data),
    }[form]
    options = TrainingOptions(epochs=3, batch_size=30)
    whole = fxpress.train(program, given, options)
    with pytest.raises(Stopped):
        fxpress.train(program, given, options, progress=stop_at(5), checkpoint=tmp_path / "run", checkpoint_every=1)
    resumed = fxpress.train(program, given, options, checkpoint=tmp_path / "run", checkpoint_every=1)
    assert resumed.history == whole.history
    tensors = whole.program.state_dict()
    assert all(torch.equal(t, tensors[n]) for n, t in resumed.program.state_dict().items())


def test_a_finished_run_returns_what_it_came_to(program, data, tmp_path):
    first = fxpress.train(program, data, OPTIONS, checkpoint=tmp_path / "run")
    again = fxpress.train(program, data, OPTIONS, progress=stop_at(1), checkpoint=tmp_path / "run")
    assert again.history == first.history
    assert all(torch.equal(a, b) for a, b in zip(first.program.parameters(), again.program.parameters()))


def test_the_checkpoint_of_another_run_is_refused(program, data, tmp_path):
    folder = tmp_path / "run"
    fxpress.train(program, data, OPTIONS, checkpoint=folder)
    with pytest.raises(TrainingError, match="of another run: seed was 0, is 5"):
        fxpress.train(program, data, dataclasses.replace(OPTIONS, seed=5), checkpoint=folder)
    with pytest.raises(TrainingError, match="of another run: start was"):
        fxpress.train(fxpress.capture(Small(), (data[0][:2],)), data, OPTIONS, checkpoint=folder)
    with pytest.raises(TrainingError, match="of another run: augment was"):
        fxpress.train(program, data, OPTIONS, augment=flip_and_shift, checkpoint=folder)
    steeper = dataclasses.replace(OPTIONS, optimizer=dataclasses.replace(OPTIONS.optimizer, weight_decay=0.5))
    with pytest.raises(TrainingError, match=r"optimizer.weight_decay was [\d.e-]+, is 0.5"):
        fxpress.train(program, data, steeper, checkpoint=folder)
    content = bytearray((folder / "tensors.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "tensors.safetensors").write_bytes(content)
    with pytest.raises(TrainingError, match="not those that were written"):
        fxpress.train(program, data, OPTIONS, checkpoint=folder)
    for text in ("[]", "{}", '{"format": 2}'):
        (folder / "training.json").write_text(text)
        with pytest.raises(TrainingError, match=r"damaged|has the format"):
            fxpress.train(program, data, OPTIONS, checkpoint=folder)
    (folder / "tensors.safetensors").write_bytes(b"damage")
    with pytest.raises(TrainingError, match="cannot be read"):
        fxpress.train(program, data, OPTIONS, checkpoint=folder)


def objectives(program):
    """What is learned, in pairs that differ in one respect."""
    plans = [fxpress.plan_pruning(program, macs=share) for share in (0.5, 0.7)]
    teachers = [Small().eval() for _ in range(2)]

    def weighed(by):
        return lambda program, batch: by * CrossEntropy()(program, batch)

    yield weighed(1.0), weighed(0.5)
    yield (lambda p, b: CrossEntropy()(p, b)), (lambda p, b: 2 * CrossEntropy()(p, b))
    yield CrossEntropy(), CrossEntropy(0.1)
    yield tuple(GroupLasso(program, strength=s) for s in (1e-4, 1e-3))
    yield tuple(GrowingPenalty(program, plan) for plan in plans)
    yield tuple(GrowingPenalty(program, plans[0], growth=g) for g in (0.1, 0.2))
    yield tuple(Distillation(program, teachers[0], [SoftLabels(temperature=t)]) for t in (2.0, 4.0))
    yield tuple(Distillation(program, teacher, [SoftLabels()]) for teacher in teachers)
    yield tuple(Distillation(program, teachers[0], [SoftLabels()], labels=w) for w in (0.1, 0.5))
    yield FreezeNorms(CrossEntropy(), 0.5), FreezeNorms(CrossEntropy(), 0.7)
    yield FreezeNorms(CrossEntropy(), 0.5), FreezeNorms(CrossEntropy(0.1), 0.5)


class Weighed:
    """An objective of a user's own, with something in it that no two runs share."""

    def __init__(self, by: float) -> None:
        self.by, self.log = by, Log()

    def __call__(self, program, batch):
        return self.by * CrossEntropy()(program, batch)


class Log:
    def __init__(self) -> None:
        self.begun = time.perf_counter()


def test_what_an_objective_holds_besides_numbers_is_known_by_its_class():
    assert described(Weighed(0.5)) == described(Weighed(0.5))
    assert described(Weighed(0.5)) != described(Weighed(0.4))
    log, other = Log(), Log()
    assert described(lambda program, batch: log) != described(lambda program, batch: 0)
    makers = [lambda log=log: CrossEntropy(), lambda log=other: CrossEntropy()]
    assert described(makers[0])["holds"] == described(makers[1])["holds"]


def test_the_checkpoint_of_another_objective_is_refused(program, data, tmp_path):
    for i, (first, other) in enumerate(objectives(program)):
        assert described(first) == described(first)
        fxpress.train(program, data, OPTIONS, objective=first, checkpoint=tmp_path / str(i))
        fxpress.train(program, data, OPTIONS, objective=first, checkpoint=tmp_path / str(i))
        with pytest.raises(TrainingError, match=r"of another run: (objective|start)"):
            fxpress.train(program, data, OPTIONS, objective=other, checkpoint=tmp_path / str(i))


def test_a_checkpoint_holds_tensors_and_json_only(program, data, tmp_path):
    fxpress.train(program, data, OPTIONS, checkpoint=tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["tensors.safetensors", "training.json"]
    state = json.loads((tmp_path / "run" / "training.json").read_text())
    assert state["position"]["finished"]


def test_a_folder_of_somebody_else_is_left_alone(program, data, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="left alone"):
        fxpress.train(program, data, OPTIONS, checkpoint=tmp_path)


@contextmanager
def largest_file(size):
    """Let no file of this process grow beyond `size` bytes: writing fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays_readable(program, data, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        fxpress.train(program, data, OPTIONS, progress=stop_at(4), checkpoint=folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with largest_file(1000), pytest.raises(OutputError, match=r"cannot write .*run"):
        fxpress.train(program, data, OPTIONS, checkpoint=folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"], "nothing half-written is left"
    resumed = fxpress.train(program, data, OPTIONS, checkpoint=folder)
    assert resumed.history == fxpress.train(program, data, OPTIONS).history


# -- not a number -------------------------------------------------------------------------------------------------


def test_activations_that_overflow_are_found_at_their_layer(program, data):
    broken = program.copy()
    with torch.no_grad():
        broken.graph_module.norm.weight.fill_(3e38)
    with pytest.raises(TrainingError) as caught:
        fxpress.finetune(broken, data, TrainingOptions(batch_size=90))
    text = str(caught.value)
    assert "step 0" in text
    assert "'norm'" in text, "the first layer, not the last"
    assert "self.norm(self.conv(x))" in text, "the user's source line"
    assert "hint: lower the learning rate" in text


def test_an_exploding_training_says_at_which_step(program, data):
    with pytest.raises(TrainingError, match=r"step [1-9]\d*: .* is not finite"):
        fxpress.finetune(program, data, TrainingOptions(epochs=20, optimizer=SGD(1e30, momentum=0.0), batch_size=30))


def test_a_loss_that_is_not_finite_by_itself(program, data):
    def objective(program, batch):
        return CrossEntropy()(program, batch) * float("nan")

    with pytest.raises(TrainingError, match="the loss is not finite") as caught:
        fxpress.finetune(program, data, objective=objective)
    assert "look at the labels" in str(caught.value)


class Root(nn.Module):
    """The slope of the root is infinite at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.sqrt(0 * self.first(x)))


def test_a_gradient_that_is_not_finite_is_found_at_its_weight():
    torch.manual_seed(0)
    inputs = torch.randn(16, 4)
    program = fxpress.capture(Root(), (inputs[:2],))
    labels = torch.arange(16) % 3
    with pytest.raises(TrainingError, match=r"the gradient of 'first\.(weight|bias)'"):
        fxpress.finetune(program, (inputs, labels))


# -- kill -9 ------------------------------------------------------------------------------------------------------

# Children are forked from one process that has the imports, so that a kill costs no start. Each trains the same run; the
# parent kills the first ones at moments drawn at random, in steps and while checkpoints are written, the last may finish.
KILLING = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
import fxpress
from fxpress.demo import DigitNet, load_digits
from fxpress.runtime.evaluate import Top1

torch.set_num_threads(1)
root, kills = Path(sys.argv[1]), int(sys.argv[2])
digits = load_digits()
torch.manual_seed(0)
program = fxpress.capture(DigitNet(8), (digits.inputs[:2],))

def train(name):
    options = fxpress.TrainingOptions(epochs=3, optimizer=fxpress.AdamW(1e-2), ema=0.9)
    trained = fxpress.train(
        program, (digits.inputs, digits.labels), options,
        checkpoint=root / name if name == "killed" else None, checkpoint_every=4 if name == "killed" else None,
        evaluate=Top1([(digits.held_out_inputs, digits.held_out_labels)]),
    )
    (root / f"{name}.json").write_text(json.dumps([[r.loss, r.metric] for r in trained.history]))
    trained.program.save(root / f"{name}.pt2")

def start(name):
    child = os.fork()
    if child == 0:
        train(name)
        os._exit(0)
    return child

def steps(name):
    try:
        return json.loads((root / name / "training.json").read_text())["position"]["step"]
    except OSError:
        return 0

moments, draw = [], random.Random(int(sys.argv[3]))
for number in range(kills):
    begun = steps("killed")
    child = start("killed")
    while steps("killed") < begun + 5:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    moments.append(steps("killed"))
for name in ("killed", "undisturbed"):
    assert os.waitpid(start(name), 0)[1] == 0
print(json.dumps(moments))
"""


def test_a_run_that_is_killed_goes_on_to_the_same_metric(tmp_path):
    command = [sys.executable, "-c", KILLING, str(tmp_path), "3", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    moments = json.loads(done.stdout)
    assert 5 <= moments[0] < moments[-1] < 60, "each kill came in the middle, and none cost what was done before"
    killed, undisturbed = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("killed", "undisturbed"))
    assert killed == undisturbed
    assert killed[-1][1] > 0.8, "the digits were learned"
    first, second = (fxpress.Program.load(tmp_path / f"{n}.pt2") for n in ("killed", "undisturbed"))
    assert all(torch.equal(t, second.state_dict()[n]) for n, t in first.state_dict().items())
    left = [p.name for p in Path(tmp_path).iterdir() if p.name.startswith(".")]
    assert not left, "the next writer removes what a killed one left"
    shutil.rmtree(tmp_path / "killed")
