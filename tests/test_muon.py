"""Muon beside AdamW in one optimizer: each weight moves as torch's own optimizers would move it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxpress
from fxpress.errors import OptionError
from fxpress.passes.prune.recovery.muon import Muon, is_matrix, lookup_tables
from fxpress.training.options import AdamW, TrainingOptions
from fxpress.training.options import Muon as MuonOptions


class Net(nn.Module):
    """A convolution, a depthwise one, a norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.depthwise(self.dense(x)).relu()).mean((2, 3)))


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8)
    return x, x.mean((2, 3)).argmax(1)


def gradients(module: nn.Module, data, step: int) -> None:
    module.zero_grad()
    rows = slice(8 * step, 8 * step + 8)
    nn.functional.cross_entropy(module(data[0][rows]), data[1][rows]).backward()


def test_every_weight_moves_as_torch_moves_it(data):
    torch.manual_seed(1)
    ours, theirs = (net := Net()), copy.deepcopy(net)
    optimizer = Muon([{"params": list(ours.parameters()), "weight_decay": 0.1}], 1e-2)
    matrices = {n: p for n, p in theirs.named_parameters() if n in ("dense.weight", "head.weight")}
    flat = {n: nn.Parameter(p.detach().view(len(p), -1)) for n, p in matrices.items()}  # shares their storage
    others = [p for n, p in theirs.named_parameters() if n not in matrices]
    muon = torch.optim.Muon(list(flat.values()), 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, 1e-2, weight_decay=0.1)
    for step in range(4):
        gradients(ours, data, step)
        gradients(theirs, data, step)
        for name, weight in matrices.items():
            flat[name].grad = weight.grad.reshape(flat[name].shape)
        optimizer.step(), muon.step(), adam.step()
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, theirs.get_parameter(name), msg=name)
        assert not torch.equal(weight, Net().get_parameter(name)), name


def test_what_is_no_matrix_is_left_to_adamw():
    net = Net()
    found = {n for n, p in net.named_parameters() if is_matrix(p)}
    assert found == {"dense.weight", "head.weight"}
    groups = Muon([{"params": [net.head.weight], "matrices": False}], 1e-2).param_groups
    assert [g["matrices"] for g in groups] == [False]


def test_a_lookup_table_is_none():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(words).mean(1))

    torch.manual_seed(0)
    words = torch.randint(50, (256, 6))
    program = fxpress.capture(Words(), (words[:2],))
    assert lookup_tables(program) == {"table.weight"}
    before = program.state_dict()["table.weight"].clone()
    trained = fxpress.finetune(
        program, (words, words.sum(1) % 2), TrainingOptions(epochs=3, optimizer=MuonOptions(2e-2))
    )
    moved = (trained.state_dict()["table.weight"] - before).abs()
    assert moved.max() <= 0.02 * 12 * 1.01, "at most the rate a step, as Adam moves; a matrix has no such bound"
    assert moved.min() > 0


def test_state_survives_saving(data):
    torch.manual_seed(1)
    net = Net()
    whole, parts = copy.deepcopy(net), copy.deepcopy(net)
    optimizer = Muon(whole.parameters(), 1e-2)
    for step in range(4):
        gradients(whole, data, step)
        optimizer.step()
    first = Muon(parts.parameters(), 1e-2)
    for step in range(2):
        gradients(parts, data, step)
        first.step()
    second = Muon(parts.parameters(), 1e-2)
    second.load_state_dict(first.state_dict())
    for step in range(2, 4):
        gradients(parts, data, step)
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))


def test_a_training_goes_on_from_its_checkpoint(data, tmp_path):
    torch.manual_seed(1)
    program = fxpress.capture(Net(), (data[0][:2],))
    options = TrainingOptions(epochs=3, batch_size=16, optimizer=MuonOptions(1e-2))

    class Stopped(BaseException):
        pass

    def stop(name, done, total):
        if done == 6:
            raise Stopped

    whole = fxpress.finetune(program, data, options)
    with pytest.raises(Stopped):
        fxpress.finetune(program, data, options, checkpoint=tmp_path, progress=stop)
    resumed = fxpress.finetune(program, data, options, checkpoint=tmp_path)
    tensors = whole.state_dict()
    assert all(torch.equal(t, tensors[n]) for n, t in resumed.state_dict().items())


def test_it_takes_fewer_steps_than_adamw_to_follow_a_teacher():
    """Why it is here: the same few steps lead closer to the teacher's values, over three seeds."""
    distances = {}
    for kind, optimizer in (("muon", MuonOptions(5e-3)), ("adamw", AdamW(5e-3, weight_decay=0.0))):
        distances[kind] = [_distance(optimizer, seed) for seed in range(3)]
    assert all(m < 0.9 * a for m, a in zip(distances["muon"], distances["adamw"])), distances


def _distance(optimizer: MuonOptions | AdamW, seed: int) -> float:
    """Squared error after learning from a teacher of the same form, relative to the teacher's variance."""
    torch.manual_seed(seed)
    student, teacher = (_wide() for _ in range(2))
    x = torch.randn(512, 64)
    with torch.no_grad():
        y = teacher(x)
    program = fxpress.capture(student, (x[:2],))
    objective = _squares(y.var())
    options = TrainingOptions(epochs=6, batch_size=32, optimizer=optimizer, seed=seed)
    trained = fxpress.finetune(program, (x, y), options, objective=objective)
    return float((trained(x) - y).square().mean() / y.var())


def _wide() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8)).eval()


def _squares(scale: torch.Tensor):
    def objective(program, batch):
        scores = program(*batch.inputs)
        return (scores - batch.labels).square().mean() / scale

    return objective


@pytest.mark.parametrize("wrong", [{"learning_rate": 0.0}, {"momentum": 1.0}, {"weight_decay": -1.0}])
def test_bad_options(wrong):
    with pytest.raises(OptionError):
        MuonOptions(**wrong)
