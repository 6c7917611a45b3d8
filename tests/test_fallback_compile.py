"""`max_drop` on real programs: poisoned activations are found, the pipeline reproduces the model, a killed search goes on."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import fxpress
from fxpress.backends.targets import load_target
from fxpress.errors import OptionError, OutputError
from fxpress.frontend.batches import as_batches
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager, run_passes
from fxpress.passes.quantize.placement.fallback import Setting
from fxpress.passes.quantize.placement.journal import Journal, fingerprint
from fxpress.passes.quantize.placement.points import Switchboard
from fxpress.passes.quantize.placement.sensitivity import measure_sensitivity
from fxpress.passes.quantize.placement.trials import Trials
from fxpress.runtime.evaluate import Metric, Top1

TARGET = load_target("ort-x86")


class Poisoned(nn.Module):
    """Five convolutions; the value between `b` and `c` has channels of which the largest is 10^4 times the smallest, so
    that one scale cannot hold them. SiLU stands in the way of equalization."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.b, self.c, self.d = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(width, 4)
        scale = torch.logspace(0, 4, width)
        with torch.no_grad():
            self.b.weight *= scale.reshape(-1, 1, 1, 1)
            self.b.bias *= scale
            self.c.weight /= scale.reshape(1, -1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        x = nn.functional.silu(self.b(x))
        x = torch.relu(self.c(x))
        x = torch.relu(self.d(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def poisoned() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(module, inputs, labels): the float model is right on all, and its classes are about even."""
    return poisoned_task()


def poisoned_task() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    module, x = Poisoned().eval(), torch.randn(192, 3, 8, 8)
    with torch.no_grad():
        scores = module(x)
        module.head.weight /= scores.std(0)[:, None]
        module.head.bias.copy_((module.head.bias - scores.mean(0)) / scores.std(0))
        return module, x, module(x).argmax(1)


def compiled(task, max_drop=0.06, **options) -> fxpress.Artifact:
    module, x, y = task
    options = {"evaluate": Top1([(x, y)]), "calibration": x[:32].split(16), **options}
    return fxpress.compile(module, (x[:2],), max_drop=max_drop, **options)


@pytest.fixture(scope="module")
def artifact(poisoned, tmp_path_factory) -> fxpress.Artifact:
    return compiled(poisoned, output=tmp_path_factory.mktemp("fallback") / "out")


# -- what is found -------------------------------------------------------------------------------------------------


def test_a_poisoned_activation_is_found_and_little_stays_in_float(artifact):
    found = artifact.report["fallback"]
    assert artifact.kept
    assert found["trials"][0]["metric"] < 0.9, "all on integers it is far from the allowance"
    assert {"b", "c"} <= set(found["kept_float"])
    assert found["float_macs_share"] < 0.75  # of four equal convolutions two must stay
    worst = found["sensitivity"][0]
    assert worst["sqnr_alone_db"] < 15
    assert {"conv2d_1", "conv2d_2"} & set(worst["operations"])


def test_every_float_island_says_that_it_was_asked_for(artifact):
    coverage = artifact.report["coverage"]
    assert 0.2 < coverage["integer_macs"] < 0.9
    assert {i["reason"] for i in coverage["float_islands"]} == {"keep_float names it"}
    assert coverage["integer_macs"] == pytest.approx(1 - artifact.report["fallback"]["float_macs_share"], abs=1e-6)


def test_the_printed_pipeline_makes_the_same_model_without_a_search(artifact, poisoned):
    again = compiled(poisoned, max_drop=None, pipeline=artifact.report["pipeline"])
    assert "keep_float" in artifact.report["pipeline"]
    assert again.report["compiled"]["metric"] == artifact.report["compiled"]["metric"]
    assert again.onnx.SerializeToString() == artifact.onnx.SerializeToString()
    assert again.report["fallback"] is None


def test_the_notes_tell_the_curve(artifact):
    stage = next(s for s in artifact.report["stages"] if s["pass"] == "max-drop")
    notes = "\n".join(stage["notes"])
    assert "the allowance is kept" in notes
    assert "% of the MACs in float -> " in notes
    drops = [p["drop"] for p in artifact.report["fallback"]["curve"]]
    assert drops == sorted(drops, reverse=True)


def test_no_search_where_the_allowance_is_kept(poisoned):
    artifact = compiled(poisoned, max_drop=1.0)
    assert artifact.report["fallback"] is None
    assert artifact.report["pipeline"].endswith(",quantize")


def test_equalization_is_tried_before_float(poisoned):
    class Relu(Poisoned):
        """Relu lets equalization through."""

        def forward(self, x):
            x = torch.relu(self.a(x))
            x = torch.relu(self.c(torch.relu(self.b(x))))
            return self.head(torch.relu(self.d(x)).mean((2, 3)))

    module = Relu().eval()
    module.load_state_dict(poisoned[0].state_dict())
    x = poisoned[1]
    with torch.no_grad():
        module.head.bias -= module(x).mean(0)
        y = module(x).argmax(1)
    artifact = compiled((module, x, y), max_drop=0.1)
    assert artifact.kept
    assert artifact.report["fallback"]["kept_float"] == []
    assert "equalize" in artifact.report["pipeline"]


def test_the_fewest_macs_are_those_of_brute_force(poisoned, artifact):
    """Every subset of the five layers is judged: none with fewer MACs in float keeps the allowance."""
    module, x, y = poisoned
    program = run_passes(fxpress.capture(module, x[:2]), "cleanup,canonicalize,fuse-batchnorm")
    context = Context(target=TARGET, calibration=as_batches(program, x[:32].split(16)))
    trials = Trials(program, context)
    options = artifact.report["fallback"]["trials"][-1]["pipeline"]
    layers = ["conv2d", "conv2d_1", "conv2d_2", "conv2d_3", "linear"]
    sets = itertools.chain.from_iterable(itertools.combinations(layers, n) for n in range(5))
    least = sum(trials.macs.values())
    for kept in map(frozenset, sets):
        macs = sum(trials.macs[o] for o in kept)
        if macs < least and _right(trials.make(Setting(options, kept | {"silu"}))[0], x, y) >= 0.94:
            least = macs
    assert artifact.report["fallback"]["float_macs_share"] * sum(trials.macs.values()) <= least * 1.001


def _right(program: fxpress.Program, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((program(x).argmax(1) == y).float().mean())


def test_a_trial_is_what_the_pipeline_makes(poisoned):
    """Observers are remembered between trials; the numbers must be those of calibrating anew."""
    module, x, _ = poisoned
    program = run_passes(fxpress.capture(module, x[:2]), "cleanup,canonicalize,fuse-batchnorm")
    context = Context(target=TARGET, calibration=as_batches(program, x[:32].split(16)))
    trials = Trials(program, context)
    for kept in ((), ("conv2d_1",), ("silu", "conv2d_1"), ("linear",), ("conv2d_2",)):
        setting = Setting("quantize{ranges=mse}", frozenset(kept))
        fast, *macs = trials.make(setting)
        slow = PassManager(trials.passes(setting)).run(program, context)
        assert torch.equal(fast(x), slow(x)), kept
        assert tuple(macs) == (sum(trials.macs.get(o, 0) for o in kept), 0) == trials.other_macs(setting)


def test_inspect_and_explain_show_it(artifact, capsys):
    from fxpress.commands.inspect import explain_node, inspect_artifact

    inspect_artifact(artifact.path, as_json=False)
    explain_node(artifact.path, "b", as_json=False)
    text = capsys.readouterr().err
    assert "what MACs in float and in 16 bits buy" in text
    assert "sensitivity, worst first" in text
    assert "b, activation: the outputs have SQNR" in text
    assert "keep_float=[conv2d_1" in text
    page = (artifact.path / "report.html").read_text()
    assert "Search under the allowed drop" in page
    assert "only it quantized" in page


# -- sensitivity ---------------------------------------------------------------------------------------------------


def observed(module: nn.Module, x: torch.Tensor) -> fxpress.Program:
    program = run_passes(fxpress.capture(module, x[:2]), "cleanup,canonicalize,fuse-batchnorm")
    context = Context(target=TARGET, calibration=as_batches(program, [x]))
    return PassManager("annotate,observe{ranges=minmax},calibrate").run(program, context)


def test_all_points_on_is_the_quantized_program_and_none_is_the_float_one(tiny_module, tiny_data):
    program = observed(tiny_module, tiny_data)
    board = Switchboard(program, TARGET, "minmax")
    exact = board.result(board.values((tiny_data,), ()))[0]
    assert torch.equal(exact, tiny_module(tiny_data)) or torch.allclose(exact, tiny_module(tiny_data), atol=1e-5)
    everything = board.result(board.values((tiny_data,), range(len(board.points))))[0]
    folded = PassManager("fold").run(program, Context(target=TARGET))(tiny_data)
    noise, simulated = ((y - exact).square().sum() for y in (folded, everything))
    assert abs(10 * torch.log10(simulated / noise)) < 0.5  # they differ in int32 biases and roundings on the border


def test_a_switch_computes_again_what_lies_behind_it(tiny_module, tiny_data):
    board = Switchboard(observed(tiny_module, tiny_data), TARGET, "minmax")
    values = board.values((tiny_data,), ())
    for i in range(len(board.points)):
        whole = board.result(board.values((tiny_data,), {i}))
        assert torch.equal(board.outputs(values, {i}, {i})[0], whole[0]), board.points[i].name


def test_sensitivity_names_the_worst_and_tells_weights_from_activations(poisoned):
    module, x, _ = poisoned
    board = Switchboard(observed(module, x[:16]), TARGET, "minmax")
    rows = measure_sensitivity(board, [(x[:8],)], {})
    assert [r.noise for r in rows] == sorted((r.noise for r in rows), reverse=True)
    assert {(r.name, r.kind) for r in rows} >= {("a", "weights"), ("head", "weights"), ("input of a", "activation")}
    assert all(r.alone_db >= r.without_db - 30 for r in rows if r.without_db is not None)


def test_what_is_fitted_behind_refines_the_result(poisoned):
    pipeline = "cleanup,canonicalize,fuse-batchnorm,quantize{ranges=minmax},correct-bias{samples=16}"
    artifact = compiled(poisoned, pipeline=pipeline)
    trials = artifact.report["fallback"]["trials"]
    kept = [t for t in trials if t["kept_float"]]
    assert artifact.kept
    fitted = ["correct-bias" in t["pipeline"] for t in kept]
    before = kept[: fitted.index(True)]
    found = [t for t in before if t["metric"] >= 1 - 0.06]
    assert found, "first without"
    refined = kept[len(before)]
    assert refined["kept_float"] in [t["kept_float"] for t in found], "then with, from what was found"
    assert any(fitted[len(before) + 1 :]), "and on from there"


# -- options and faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after", "allowed"), [(0.8275, 0.8175, 0.01), (0.83, 0.82, 0.01), (0.3, 0.2, 0.1)])
def test_the_allowance_is_meant_in_decimals(before, after, allowed):
    from fxpress.compilation.allowance import drop_promise
    from fxpress.runtime.evaluate import least_allowed

    metrics = Metric("m", before, 1), Metric("m", after, 1)
    assert after >= least_allowed(before, allowed)
    assert drop_promise(metrics, allowed)[0].kept
    assert not drop_promise((metrics[0], Metric("m", after - 1e-6, 1)), allowed)[0].kept


def test_options_without_max_drop_are_refused(poisoned):
    for options in ({"journal": "j"}, {"search_seconds": 5.0}, {"search_trials": 3}):
        with pytest.raises(OptionError, match="no effect without max_drop"):
            compiled(poisoned, max_drop=None, **options)


def test_no_trials_no_search(poisoned):
    artifact = compiled(poisoned, search_trials=0)
    assert not artifact.kept
    assert artifact.report["fallback"]["kept_float"] == []
    assert len(artifact.report["fallback"]["trials"]) == 1


def test_a_metric_that_fails_later_leaves_the_first_result(poisoned):
    scores = iter([0.9, 0.7])
    artifact = compiled(poisoned, evaluate=lambda run: next(scores))
    assert not artifact.kept
    assert artifact.report["compiled"]["metric"] == 0.7
    notes = next(s for s in artifact.report["stages"] if s["pass"] == "max-drop")["notes"]
    assert any("trials could not be judged: evaluate" in n for n in notes)


def test_a_metric_that_is_nan_on_integers_only(poisoned):
    _, x, y = poisoned

    def evaluate(run):
        value = Top1([(x, y)])(run)
        return value if value > 0.9 else float("nan")

    artifact = compiled(poisoned, evaluate=evaluate)
    assert artifact.kept
    assert artifact.report["fallback"]["trials"][0]["metric"] is None
    with pytest.raises(OptionError, match="returned nan"):
        compiled(poisoned, evaluate=lambda run: float("nan"))


def test_where_what_came_before_lost_it_float_is_no_remedy(tiny_module, tiny_data):
    reference = fxpress.capture(tiny_module, (tiny_data[:2],))
    changed = reference.copy()  # as if it had been pruned
    with torch.no_grad():
        y = tiny_module(tiny_data).argmax(1)
        dict(changed.named_parameters())["head.bias"][y[0]] -= 10
    artifact = fxpress.compile(
        changed, calibration=[tiny_data], evaluate=Top1([(tiny_data, y)]), max_drop=0.01, reference=reference
    )
    assert not artifact.kept
    assert artifact.report["fallback"]["kept_float"] == []
    notes = next(s for s in artifact.report["stages"] if s["pass"] == "max-drop")["notes"]
    assert any("float before quantization misses the allowance too" in n for n in notes)


# -- the journal ---------------------------------------------------------------------------------------------------


def test_a_journal_is_read_back_without_its_torn_end(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, "f")
    journal.add("a", {"metric": 0.1})
    journal.add("b", {"metric": 1 / 3})
    path.write_bytes(path.read_bytes() + b'{"key": "c", "met')
    again = Journal(path, "f")
    assert again.find("b")["metric"] == 1 / 3
    assert again.find("c") is None
    again.add("c", {"metric": 0.5})
    assert Journal(path, "f").find("c")["metric"] == 0.5


def test_a_journal_of_something_else_begins_anew_and_says_so(tmp_path):
    Journal(tmp_path / "j", "f").add("a", {})
    other = Journal(tmp_path / "j", "g")
    assert other.find("a") is None
    assert "begun anew" in other.notes[0]


def test_a_file_that_is_no_journal_is_left_alone(tmp_path):
    (tmp_path / "model.py").write_text("print(1)\n")
    with pytest.raises(OutputError, match="is no journal"):
        Journal(tmp_path / "model.py", "f")
    assert (tmp_path / "model.py").read_text() == "print(1)\n"


def test_a_journal_that_cannot_be_written(tmp_path, poisoned):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the journal"):
        compiled(poisoned, journal=tmp_path / "file" / "j")


def test_a_full_disk_ends_the_journal_not_the_search(tmp_path, poisoned, monkeypatch):
    def full(descriptor, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxpress.passes.quantize.placement.journal.os.write", full)
    artifact = compiled(poisoned, journal=tmp_path / "j")
    assert artifact.kept
    notes = next(s for s in artifact.report["stages"] if s["pass"] == "max-drop")["notes"]
    assert any("ends early: No space left on device" in n for n in notes)


def test_the_fingerprint_knows_weights_data_and_facts(tiny_module, tiny_data):
    program = fxpress.capture(tiny_module, tiny_data[:2])
    first = fingerprint(program, [(tiny_data,)], "x", 1)
    assert first == fingerprint(fxpress.capture(tiny_module, tiny_data[:2]), [(tiny_data,)], "x", 1)
    changed = program.copy()
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    others = [
        fingerprint(changed, [(tiny_data,)], "x", 1),
        fingerprint(program, [(tiny_data + 1e-3,)], "x", 1),
        fingerprint(program, [(tiny_data,)], "x", 2),
    ]
    assert len({first, *others}) == 4


def test_trials_of_another_metric_are_not_taken_over(poisoned, tmp_path):
    """Of the same name, and of the same value for float: told by what it says of the model that was asked for."""
    _, x, y = poisoned

    def metric(harder):
        def score(run):
            return 1 - harder * (1 - Top1([(x, y)])(run))

        return score

    compiled(poisoned, max_drop=0.5, evaluate=metric(0.5), journal=tmp_path / "j", search_trials=3)
    strict = compiled(poisoned, max_drop=0.06, evaluate=metric(1.0), journal=tmp_path / "j")
    alone = compiled(poisoned, max_drop=0.06, evaluate=metric(1.0))
    assert strict.kept
    assert strict.report["pipeline"] == alone.report["pipeline"]


SCRIPT = """
import json, sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_fallback_compile import compiled, poisoned_task
from fxpress.runtime.evaluate import Top1
task = poisoned_task()
calls = 0
def evaluate(run):
    global calls
    calls += 1
    time.sleep({pause})
    return Top1([task[1:]])(run)
artifact = compiled(task, evaluate=evaluate, journal={journal!r})
print(json.dumps({{"calls": calls, "pipeline": artifact.report["pipeline"], "trials": len(artifact.report["fallback"]["trials"])}}))
"""


def start(journal: Path, pause: float) -> subprocess.Popen:
    code = SCRIPT.format(tests=str(Path(__file__).parent), journal=str(journal), pause=pause)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ})


def test_a_killed_search_goes_on(tmp_path, artifact):
    journal = tmp_path / "j"
    process = start(journal, pause=0.3)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    known = len(Journal(journal, json.loads(journal.read_bytes().split(b"\n")[0])["fingerprint"]).facts) - 1
    assert known >= 2  # beside what the model as asked was worth
    output, _ = start(journal, pause=0).communicate(timeout=120)
    result = json.loads(output)
    assert result["pipeline"] == artifact.report["pipeline"]
    assert result["trials"] == len(artifact.report["fallback"]["trials"])
    # Judged anew: float, the pipeline as asked, the trials that were not known, and the result at the end.
    assert result["calls"] == 2 + (result["trials"] - 1 - known) + 1


# -- 16 bits before float ------------------------------------------------------------------------------------------


class Loud(nn.Module):
    """One channel of what `b` gives is 300 times as large as the others, and `c` does not read it: activations of 8
    bits cannot hold the others, and the weights are harmless."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        with torch.no_grad():
            self.b.weight[0] *= 300
            self.c.weight[:, 0] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.b(torch.relu(self.a(x))))
        return self.d(torch.relu(self.c(x)))


def test_where_the_target_has_sixteen_bits_they_are_tried_before_float(tmp_path):
    torch.manual_seed(0)
    module, x = Loud().eval(), torch.randn(96, 3, 8, 8)
    with torch.no_grad():
        y = module(x)

    def nearness(run) -> float:
        return float(1 - (run(x) - y).norm() / (y - y.mean((0, 2, 3), keepdim=True)).norm())

    options = {"evaluate": nearness, "target": "qnn"}
    artifact = compiled((module, x, None), max_drop=0.06, output=tmp_path / "out", **options)
    found = artifact.report["fallback"]
    assert artifact.kept
    assert found["trials"][0]["metric"] < 0.8
    assert {"b", "c"} <= set(found["kept_int16"]), "the tensor between them needs more steps"
    assert found["kept_float"] == []
    assert found["float_macs_share"] == 0
    assert 0 < found["int16_macs_share"] < 0.75
    assert "use_int16=[" in artifact.report["pipeline"]
    assert "keep_float" not in artifact.report["pipeline"]
    again = compiled((module, x, None), max_drop=None, pipeline=artifact.report["pipeline"], **options)
    assert again.onnx.SerializeToString() == artifact.onnx.SerializeToString()
    page = (artifact.path / "report.html").read_text()
    assert "In 16 bits because of it" in page


def test_what_sixteen_bits_do_not_suffice_for_is_left_in_float(poisoned):
    """The weights of `c` span 10^4 within each output channel, which any activations leave as they are; what `b` gives
    spans as much, and is stored in 16 bits before float reads it."""
    artifact = compiled(poisoned, target="qnn")
    found = artifact.report["fallback"]
    assert artifact.kept
    assert "c" in found["kept_float"]
    assert "b" in found["kept_int16"]
    assert max(found["float_macs_share"], found["int16_macs_share"]) < 0.35
    notes = "\n".join(next(s for s in artifact.report["stages"] if s["pass"] == "max-drop")["notes"])
    assert "in 16 bits because of the allowance: b" in notes
    again = compiled(poisoned, max_drop=None, target="qnn", pipeline=artifact.report["pipeline"])
    assert again.onnx.SerializeToString() == artifact.onnx.SerializeToString()


def test_sixteen_bits_are_explained_where_there_are_none(poisoned):
    with pytest.raises(OptionError, match="use_int16: target ort-x86 has no activations of 16 bits"):
        compiled(poisoned, max_drop=None, pipeline="cleanup,canonicalize,quantize{use_int16=[b]}")
    with pytest.raises(OptionError, match="nothing of what silu names is computed on integers of 8 bits otherwise"):
        compiled(poisoned, max_drop=None, target="qnn", pipeline="cleanup,canonicalize,quantize{use_int16=[silu]}")


def test_a_trial_with_sixteen_bits_is_what_the_pipeline_makes(poisoned):
    module, x, _ = poisoned
    program = run_passes(fxpress.capture(module, x[:2]), "cleanup,canonicalize,fuse-batchnorm")
    context = Context(target=load_target("qnn"), calibration=as_batches(program, x[:32].split(16)))
    trials = Trials(program, context)
    for kept in ((), ("conv2d_1",), ("silu", "conv2d_1"), ("linear",), ("conv2d_1", "conv2d_2")):
        setting = Setting("quantize{ranges=mse}", frozenset(kept), "int16")
        fast, *macs = trials.make(setting)
        slow = PassManager(trials.passes(setting)).run(program, context)
        assert torch.equal(fast(x), slow(x)), kept
        assert tuple(macs) == (0, sum(trials.macs.get(o, 0) for o in kept)) == trials.other_macs(setting)
    assert trials.widened("quantize") >= {"conv2d", "conv2d_1", "linear"}
