"""Two processes do what one does: the same order of examples, the same metric, identical ranges; only the first writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fxpress
from fxpress.backends.targets import load_target
from fxpress.demo import DigitNet, load_digits
from fxpress.errors import DataError, OptionError, QuantizationError
from fxpress.passes.base import Context
from fxpress.passes.quantize.observe import calibrate_program, sites_of
from fxpress.passes.quantize.ranges.channels import ChannelObserver
from fxpress.passes.quantize.ranges.states import state_of
from fxpress.passes.quantize.shared_calibration import merge_observed, own_batches
from fxpress.runtime.evaluate import Top1
from fxpress.training.distributed import packed, unpacked
from fxpress.training.examples import Held, Part, as_examples

# What every process runs; the parent reads the files that they leave. Each process keeps to its own names, but for the
# checkpoint and the artifact, which are one process's to write.
WORK = """
import json, os, sys
from pathlib import Path
import numpy as np
import torch
from torch import nn
import fxpress
from fxpress.cli import main
from fxpress.demo import DigitNet, load_digits
from fxpress.runtime.evaluate import Top1
from fxpress.training.distill import Distillation
from fxpress.training.distill_terms import SoftLabels
from fxpress.training.objectives import CrossEntropy

torch.set_num_threads(1)
root, rank = Path(sys.argv[1]), os.environ["RANK"]
digits = load_digits()
data, held_out = (digits.inputs, digits.labels), [(digits.held_out_inputs, digits.held_out_labels)]
torch.manual_seed(0)
program = fxpress.capture(DigitNet(8), (digits.inputs[:2],))
seen, told = [], []

def objective(program, batch):
    seen.append([float(v) for v in batch.inputs[0].double().sum((1, 2, 3))])
    return CrossEntropy()(program, batch)

trained = fxpress.train(
    program, data, fxpress.TrainingOptions(epochs=3, optimizer=fxpress.AdamW(1e-2), ema=0.9), objective=objective,
    evaluate=Top1(held_out), checkpoint=root / "run", progress=lambda *done: told.append(done),
)
perceptron = fxpress.Program.load(sys.argv[2])
uneven = fxpress.finetune(perceptron, data, fxpress.TrainingOptions(batch_size=63, optimizer=fxpress.SGD(0.1)))
fused = fxpress.run_passes(program, "cleanup,canonicalize,fuse-batchnorm")
scales = {}
for ranges in ("minmax", "moving-average", "mse"):
    int8 = fxpress.quantize(fused, digits.inputs[:100].split(9), ranges=ranges, distributed=True)
    scales[ranges] = [n.args[1:3] for n in int8.graph.nodes if "fxpress.quantize" in str(n.target)]
np.save(root / f"data{rank}.npy", digits.inputs[:100].numpy())
fused.save(root / f"fused{rank}.pt2")
command = ["compile", root / f"fused{rank}.pt2", "--data", root / f"data{rank}.npy", "--distributed", "-o", root / "out"]
try:
    code = main([str(word) for word in command])
except SystemExit as exit:
    code = exit.code
dense = fxpress.Program.load(sys.argv[3])
places = digits.inputs[:4, 0].long() % 4
places[0, 1:], places[2:] = -100, -100  # a process has more places with a label than the other
options = fxpress.TrainingOptions(batch_size=2, optimizer=fxpress.SGD(1.0))
distilled = Distillation(dense, nn.Conv2d(1, 4, 1), [SoftLabels(1e-6)], labels=1.0)
ignored = [fxpress.finetune(dense, lambda: [(digits.inputs[:4], places)], options, objective=o) for o in (None, distilled)]
values = [t.double().sum().item() for t in trained.program.state_dict().values()]
report = {"seen": seen, "told": len(told), "history": [[r.loss, r.metric] for r in trained.history],
          "uneven": [p.detach().flatten().tolist() for p in uneven.parameters()], "scales": scales, "values": values, "code": code,
          "ignored": [[p.detach().flatten().tolist() for p in program.parameters()] for program in ignored]}
(root / f"rank{rank}.json").write_text(json.dumps(report))
"""


def perceptron(digits) -> fxpress.Program:
    """A network without BatchNorm, whose gradient does not depend on who computes which part of it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return fxpress.capture(module, (digits.inputs[:2],))


def dense(digits) -> fxpress.Program:
    """Scores of four classes for each place."""
    torch.manual_seed(0)
    return fxpress.capture(nn.Conv2d(1, 4, 1), (digits.inputs[:2],))


def launch(root: Path, script: str, *arguments: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    """`torchrun` with `count` processes on the CPU."""
    path = root / "work.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([*command, str(path), str(root), *arguments], capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, digits) -> SimpleNamespace:
    """What two processes reported, and the folder where they worked."""
    root = tmp_path_factory.mktemp("ranks")
    perceptron(digits).save(root / "perceptron.pt2")
    dense(digits).save(root / "dense.pt2")
    done = launch(root, WORK, str(root / "perceptron.pt2"), str(root / "dense.pt2"))
    assert done.returncode == 0, done.stderr[-4000:]
    return SimpleNamespace(root=root, stderr=done.stderr, both=[json.loads((root / f"rank{r}.json").read_text()) for r in (0, 1)])


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def program(digits) -> fxpress.Program:
    torch.manual_seed(0)
    return fxpress.capture(DigitNet(8), (digits.inputs[:2],))


def test_a_batch_is_the_same_examples_in_the_same_order(ranks, digits):
    first, second = (r["seen"] for r in ranks.both)
    held = Held((digits.inputs,), digits.labels, 64, 0)
    expected = [
        [float(v) for v in slot.inputs[0].double().sum((1, 2, 3))]
        for epoch in range(3)
        for slot in held.epoch(epoch, 0, Part())
    ]
    assert [a + b for a, b in zip(first, second, strict=True)] == expected


def test_training_ends_at_the_metric_of_one_process(ranks, program, digits):
    first, second = ranks.both
    assert first["history"] == second["history"]
    assert first["values"] == second["values"], "both return the same weights and statistics"
    one = fxpress.train(
        program, (digits.inputs, digits.labels),
        fxpress.TrainingOptions(epochs=3, optimizer=fxpress.AdamW(1e-2), ema=0.9),
        evaluate=Top1([(digits.held_out_inputs, digits.held_out_labels)]),
    )  # fmt: skip
    metric = one.history[-1].metric
    assert metric > 0.9
    assert first["history"][-1][1] == pytest.approx(metric, abs=0.03)
    losses = [r.loss for r in one.history]
    assert [r[0] for r in first["history"]] == pytest.approx(losses, rel=0.25), "BatchNorm sees half of each batch"


def test_without_batchnorm_the_weights_are_those_of_one_process(ranks, digits):
    options = fxpress.TrainingOptions(batch_size=63, optimizer=fxpress.SGD(0.1))
    one = fxpress.finetune(perceptron(digits), (digits.inputs, digits.labels), options)
    for first, second, alone in zip(*(r["uneven"] for r in ranks.both), one.parameters(), strict=True):
        assert first == second
        assert torch.allclose(torch.tensor(first), alone.detach().flatten(), rtol=1e-3, atol=1e-5)


def test_labels_that_do_not_count_weigh_nothing(ranks, digits):
    places = digits.inputs[:4, 0].long() % 4
    places[0, 1:], places[2:] = -100, -100
    options = fxpress.TrainingOptions(batch_size=2, optimizer=fxpress.SGD(1.0))
    one = fxpress.finetune(dense(digits), lambda: [(digits.inputs[:4], places)], options)
    assert ranks.both[0]["ignored"] == ranks.both[1]["ignored"]
    for many in ranks.both[0]["ignored"]:  # by cross entropy, and as a term of distillation
        for shared, alone in zip(many, one.parameters(), strict=True):
            assert torch.allclose(torch.tensor(shared), alone.detach().flatten(), rtol=1e-4, atol=1e-5)


def test_calibration_gives_identical_ranges(ranks, program, digits):
    first, second = ranks.both
    assert first["scales"] == second["scales"]
    fused = fxpress.run_passes(program, "cleanup,canonicalize,fuse-batchnorm")
    for ranges, scales in first["scales"].items():
        int8 = fxpress.quantize(fused, digits.inputs[:100].split(9), ranges=ranges)
        alone = [n.args[1:3] for n in int8.graph.nodes if "fxpress.quantize" in str(n.target)]
        as_stored = [[torch.tensor(s).item(), z] for s, z in alone]
        assert [[torch.tensor(s).item(), z] for s, z in scales] == as_stored, ranges
        assert len(scales) > 5


def test_only_the_first_process_writes(ranks):
    first, second = ranks.both
    assert first["told"] == 60
    assert second["told"] == 0
    assert (ranks.root / "out" / "model.onnx").exists()
    assert (ranks.root / "run" / "training.json").exists()
    assert not [p.name for p in ranks.root.iterdir() if p.name.startswith(".")]
    assert first["code"] == second["code"] == 0
    assert ranks.stderr.count("in integer kernels") == 1, "the report is told once"


# -- a process that is lost ---------------------------------------------------------------------------------------

LOST = """
import os, signal, sys
from pathlib import Path
import torch
import fxpress
from fxpress.demo import DigitNet, load_digits

torch.set_num_threads(1)
digits = load_digits()
torch.manual_seed(0)
program = fxpress.capture(DigitNet(8), (digits.inputs[:2],))
os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
child = os.fork()
rank = "1" if child == 0 else "0"
os.environ.update(RANK=rank, LOCAL_RANK=rank)

def augment(inputs, generator):
    augment.calls += 1
    if rank == "1" and augment.calls == 27:  # the middle of the second epoch of 20 steps
        os.kill(os.getpid(), signal.SIGKILL)
    return inputs

augment.calls = 0
try:
    fxpress.train(program, (digits.inputs, digits.labels), fxpress.TrainingOptions(epochs=3), augment=augment,
                  checkpoint=Path(sys.argv[1]) / "run")
except fxpress.FxpressError as error:
    print(type(error).__name__, error)
    sys.stdout.flush()
    os._exit(3)
"""


def test_a_lost_process_is_an_error_and_the_checkpoint_goes_on(tmp_path, program, digits):
    port = str(20000 + os.getpid() % 20000)
    done = subprocess.run(
        [sys.executable, "-c", LOST, str(tmp_path), port], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 3, done.stdout + done.stderr[-3000:]
    assert "TrainingError step 26: process 0 of 2 lost contact with another one" in done.stdout
    assert "hint: look at what the other printed" in done.stdout
    state = json.loads((tmp_path / "run" / "training.json").read_text())
    assert state["position"]["epoch"] == 1

    def augment(inputs, generator):
        return inputs

    told = []
    fxpress.train(
        program, (digits.inputs, digits.labels), fxpress.TrainingOptions(epochs=3), augment=augment,
        checkpoint=tmp_path / "run", progress=lambda name, done, total: told.append(done),
    )  # fmt: skip
    assert told == list(range(21, 61)), "one process goes on where two stopped"


# -- the parts, in one process --------------------------------------------------------------------------------------


class Fake:
    """One of several processes, whose gathering is played by the test."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count, self.told = rank, count, []

    def gather(self, value):
        return self.told


@pytest.mark.parametrize("size", [3, 4, 7, 9])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_are_consecutive_and_complete(size, count):
    data = list(range(size))
    parts = [list(own_batches(data, Fake(r, count))) for r in range(count)]
    assert [x for p in parts for x in p] == data
    assert [x for r in range(count) for x in data[Part(r, count).of(size)]] == data
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("ranges", ["auto", "minmax", "moving-average", "percentile", "mse"])
def test_merged_observers_have_seen_what_one_would_have(program, digits, ranges):
    fused = fxpress.run_passes(program, "cleanup,canonicalize,fuse-batchnorm")
    target = load_target("ort-x86")
    observed = fxpress.run_passes(fused, f"annotate,observe{{ranges={ranges}}}", Context(target=target))
    batches = [(x,) for x in digits.inputs[:70].split(8)]
    whole = observed.copy()
    calibrate_program(whole, batches, Context())
    states = []
    for rank in range(3):  # what each of three processes would tell
        part = observed.copy()
        own = list(own_batches(batches, Fake(rank, 3)))
        calibrate_program(part, own, Context())
        sites = sites_of(part)
        state = {str(k): state_of(s.observer) for k, s in sites.by_key.items() if s.observer is not None}
        states.append(unpacked(packed({"samples": sites.samples, **state})))
    blank = {str(k): s.observer for k, s in sites_of(observed.copy()).by_key.items() if s.observer is not None}
    process = Fake(0, 3)
    process.told = states
    merged, samples = merge_observed(blank, 0, process)
    assert samples == 70
    for key, observer in merged.items():
        expected = sites_of(whole).by_key[int(key)].observer
        one, other = (o.params(target.activation) for o in (observer, expected))
        assert one.zero_point == other.zero_point
        assert torch.equal(torch.as_tensor(one.scale).float(), torch.as_tensor(other.scale).float())


def test_observers_by_channel_merge_too():
    values = torch.randn(12, 3, 4, generator=torch.Generator().manual_seed(0))
    whole, first, second = (ChannelObserver("mse") for _ in range(3))
    whole.observe(values)
    first.observe(values[:5])
    second.observe(values[5:])
    process = Fake(0, 2)
    process.told = [unpacked(packed({"samples": n, "0": state_of(o)})) for n, o in ((5, first), (7, second))]
    merged, samples = merge_observed({"0": first}, 5, process)
    form = load_target("ort-x86").activation
    assert samples == 12
    assert torch.equal(merged["0"].params(form).scales, whole.params(form).scales)


def test_fewer_batches_than_processes_are_refused():
    with pytest.raises(DataError, match="1 batches for 2 processes"):
        own_batches([1], Fake(0, 2))


def test_a_state_survives_the_wire():
    value = {"a": [1, 2.5, float("inf"), None, True, "x"], "t": torch.arange(5), "n": {"empty": torch.zeros(0)}}
    back = unpacked(packed(value))
    assert back["a"] == value["a"]
    assert torch.equal(back["t"], value["t"])
    assert torch.equal(back["n"]["empty"], value["n"]["empty"])


def test_processes_that_observe_different_tensors_are_refused():
    process = Fake(0, 2)
    process.told = [{"samples": 1, "0": {}}, {"samples": 1, "1": {}}]
    with pytest.raises(QuantizationError, match="do not quantize the same"):
        merge_observed({}, 1, process)


@pytest.mark.parametrize("form", ["held", "dataset", "stream"])
def test_a_process_without_a_share_works_on_one_example_for_nothing(form):
    inputs, labels = torch.arange(5.0)[:, None], torch.arange(5)
    program = fxpress.capture(nn.Linear(1, 5), (inputs[:2],))
    rows, batches = TensorDataset(inputs, labels), list(zip(inputs.split(4), labels.split(4)))
    data = {"held": (inputs[:1], labels[:1]), "dataset": rows, "stream": lambda: batches}[form]
    examples = as_examples(program, data, 1, 0)
    slots = [list(examples.epoch(0, 0, Part(rank, 3))) for rank in range(3)]
    for shares in zip(*slots, strict=True):
        total = shares[0].total
        assert [len(s.labels) for s in shares] == [max(1, len(range(total)[Part(r, 3).of(total)])) for r in range(3)]
        assert sum(s.weight for s in shares) == pytest.approx(3), "the mean over processes is that over the batch"
        assert all(s.weight == pytest.approx(3 * len(s.labels) / total) for s in shares if s.weight)


def test_distributed_without_processes_is_refused(program, digits):
    with pytest.raises(OptionError, match="no effect on one process"):
        fxpress.quantize(program, digits.inputs[:32].split(16), distributed=True)
