"""The data of a training: what is one example too few, what is shared already, and streams of another length."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import fxpress
from fxpress.errors import DataError, OptionError, TrainingError
from fxpress.training.batch_statistics import one_value_norms
from fxpress.training.examples import Indexed, Part, Streamed, as_examples
from fxpress.training.objectives import Batch, CrossEntropy
from fxpress.training.options import TrainingOptions
from fxpress.training.qat import freeze_norms

INPUTS, LABELS = torch.randn(17, 8, generator=torch.Generator().manual_seed(0)), torch.arange(17) % 3


def normed() -> fxpress.Program:
    torch.manual_seed(0)
    return fxpress.capture(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval(), (INPUTS[:2],))


def plain() -> fxpress.Program:
    torch.manual_seed(0)
    return fxpress.capture(nn.Linear(8, 3), (INPUTS[:2],))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(INPUTS[:16].split(4), LABELS[:16].split(4)))


# -- one example --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 2])
def test_batchnorm_of_one_value_per_channel_is_refused_before_it_is_nan(step):
    """Its running variance would be 0/0, and the model's outputs too, without a word."""
    data = {0: (INPUTS[:1], LABELS[:1]), 2: DataLoader(TensorDataset(INPUTS, LABELS), batch_size=8)}[step]
    with pytest.raises(TrainingError, match=f"step {step}: the BatchNorm '1' has a single value") as caught:
        fxpress.finetune(normed(), data)
    assert "drop_last=True" in str(caught.value)


def test_one_example_is_enough_for_a_frozen_norm_and_for_maps():
    program = normed()
    freeze_norms(program)
    fxpress.finetune(program, (INPUTS[:1], LABELS[:1]))
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    names = [n.name for n in one_value_norms(fxpress.capture(module.eval(), (torch.randn(2, 1, 5, 5),)))]
    assert names == ["batch_norm_1"]


def test_all_processes_decide_alike():
    assert [Part(rank, 2).smallest(3) for rank in range(2)] == [1, 1]
    assert [len(range(3)[Part(rank, 2).of(3)]) for rank in range(2)] == [1, 2]
    assert Part(0, 4).smallest(2) == 1, "one of them works on an example that does not count"


def test_a_batch_without_any_label_that_counts_teaches_nothing():
    program = plain()
    nothing = CrossEntropy()(program, Batch((INPUTS,), torch.full((17,), -100)))
    assert nothing == 0.0
    assert nothing.requires_grad
    both = LABELS.clone()
    both[8:] = -100
    data = DataLoader(TensorDataset(INPUTS, both), batch_size=8)
    assert torch.isfinite(fxpress.finetune(program, data)(INPUTS)).all()


# -- what is shared already ---------------------------------------------------------------------------------------


def test_a_loader_that_shares_the_examples_itself_is_refused():
    rows = TensorDataset(INPUTS, LABELS)
    sampler = DistributedSampler(rows, num_replicas=2, rank=0)
    with pytest.raises(OptionError, match="a part of its part"):
        fxpress.finetune(plain(), DataLoader(rows, batch_size=4, sampler=sampler))


# -- streams ------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(INPUTS[:16], LABELS[:16])


class SizedStream(Stream):
    def __len__(self):
        return 16


@pytest.mark.parametrize("kind", [Stream, SizedStream])
def test_a_loader_over_a_stream_is_counted_by_reading_it(kind):
    program = plain()
    examples = as_examples(program, DataLoader(kind(), batch_size=4), 64, 0)
    assert isinstance(examples, Streamed)
    assert examples.steps == 4
    with pytest.raises(DataError, match=r"has shape \[8\]"):  # and is no set that could be read by index
        as_examples(program, kind(), 64, 0)
    assert isinstance(as_examples(program, TensorDataset(INPUTS, LABELS), 64, 0), Indexed)


class Changing:
    """Gives `counts` batches, one number for each time it is read."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = iter(counts)

    def __iter__(self):
        return iter(batches()[: next(self.counts)])


@pytest.mark.parametrize(("later", "given"), [(2, "2 batches"), (0, "0 batches"), (4, "more than 3 batches")])
def test_a_stream_of_another_length_than_at_first_is_an_error(later, given):
    """The schedule goes by the number of steps, and a mean over no batches is none."""
    data = Changing([3, 3, 3, 3, later])  # looked at, counted, trained on, and then
    with pytest.raises(DataError, match=f"the data give {given} in epoch [23], and were counted as 3"):
        fxpress.finetune(plain(), data, TrainingOptions(epochs=4))


@pytest.mark.parametrize("form", ["list", "loader", "dataset"])
def test_more_than_one_tensor_of_labels_is_explained(form):
    rows = TensorDataset(INPUTS, LABELS, LABELS)
    data = {"list": [(INPUTS, LABELS, LABELS)], "loader": DataLoader(rows, batch_size=4), "dataset": rows}[form]
    with pytest.raises(DataError, match="a batch holds 3 tensors, the model takes 1") as caught:
        fxpress.finetune(plain(), data)
    assert "labels are one tensor" in str(caught.value)
