"""Recipes: what each is short for, and those that train, from labelled data to a verified file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fxpress
from fxpress.backends.targets import load_target
from fxpress.cli import main
from fxpress.demo import DigitNet, load_digits
from fxpress.errors import DataError, OptionError
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager
from fxpress.passes.pipeline import parse_pipeline, print_pipeline
from fxpress.recipe import RECIPES, load_recipe, resolve_passes
from fxpress.runtime.evaluate import Top1
from fxpress.training.options import AdamW, TrainingOptions


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def program(digits) -> fxpress.Program:
    torch.manual_seed(0)
    untrained = fxpress.capture(DigitNet(16), digits.inputs[:2])
    data = (digits.inputs, digits.labels)
    return fxpress.finetune(untrained, data, TrainingOptions(epochs=4, optimizer=AdamW(1e-2)))


def statistics(program: fxpress.Program) -> torch.Tensor:
    """The running means of all BatchNorm layers."""
    return torch.cat([b.flatten() for name, b in program.graph_module.named_buffers() if name.endswith("running_mean")])


def test_frozen_distillation_keeps_the_statistics_of_batchnorm(digits, program):
    context = Context(calibration=[(digits.inputs[:64],)], training=(digits.inputs[:256], digits.labels[:256]))
    kept, moved = (
        statistics(PassManager(f"cleanup,prune{{macs=0.5}},distil{{freeze={freeze}}}").run(program, context))
        for freeze in ("true", "false")
    )
    pruned = statistics(PassManager("cleanup,prune{macs=0.5}").run(program, context))
    assert torch.equal(kept, pruned)
    assert not torch.equal(moved, pruned)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_texts_that_round_trip(name):
    passes = resolve_passes(name)
    assert parse_pipeline(RECIPES[name].pipeline) == passes
    assert parse_pipeline(print_pipeline(passes)) == passes


def test_a_pruning_request_takes_the_place_of_the_recipes_own():
    text = print_pipeline(resolve_passes("prune-distil-int8", prune="macs=0.3,importance=l1"))
    assert "prune{macs=0.3,importance=l1},recover,distil" in text
    assert text.count("prune{") == 1


def test_training_options_in_toml(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('pipeline = "cleanup,prune{macs=0.6},finetune{epochs=2,augment=flip-shift},fuse-batchnorm,quantize"')
    (_, _, finetune, *_) = resolve_passes(str(path))
    assert (finetune.epochs, finetune.augment) == (2, "flip-shift")
    assert load_recipe(str(path)).name == "mine"


def test_prune_distil_qat_from_labelled_data_to_a_verified_file(digits, program):
    artifact = fxpress.compile(
        program,
        calibration=digits.inputs[:128].split(32),
        recipe="prune-distil-qat",
        training=(digits.inputs, digits.labels),
        evaluate=Top1([(digits.held_out_inputs, digits.held_out_labels)]),
        max_drop="5%",
    )
    report = artifact.report
    assert artifact.kept
    assert [s["pass"] for s in report["stages"] if s["pass"] in ("distil", "qat")] == ["distil", "qat"]
    assert report["pruning"]["macs_kept"] <= 0.5
    assert report["coverage"]["integer_macs"] == 1.0
    assert report["parity"]["layer_max_steps"] <= 1


def exit_code(command: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main(command)
    return caught.value.code


def test_on_the_command_line(digits, tmp_path, capsys):
    source = tmp_path / "net.py"
    source.write_text(
        "import torch\nfrom fxpress.demo import DigitNet\n"
        "def net():\n    torch.manual_seed(0)\n    return DigitNet(8), (torch.zeros(2, 1, 8, 8),)\n"
    )
    np.savez(tmp_path / "train.npz", images=digits.inputs[:256].numpy(), labels=digits.labels[:256].numpy())
    data = str(tmp_path / "train.npz")
    command = ["compile", f"{source}:net", "--data", data, "-o", str(tmp_path / "out"), "--recipe", "int8-qat"]
    assert exit_code([*command, "--train-data", data]) == 0
    assert (tmp_path / "out" / "model.onnx").is_file()
    capsys.readouterr()
    np.savez(tmp_path / "unlabelled.npz", images=digits.inputs[:64].numpy())
    bare = ["--train-data", str(tmp_path / "unlabelled.npz")]
    assert exit_code([*command[:-4], "-o", str(tmp_path / "two"), "--recipe", "int8-qat", *bare]) == 0
    capsys.readouterr()
    assert exit_code([*command[:-4], "-o", str(tmp_path / "three"), "--pipeline", "cleanup,finetune", *bare]) == 1
    assert "has no labels" in capsys.readouterr().err
    assert exit_code([*command[:-2], "--recipe", "int8", "--train-data", data]) == 1
    assert "training data have no effect" in capsys.readouterr().err


def run(program: fxpress.Program, pipeline: str, training=None, calibration=None) -> fxpress.Program:
    context = Context(load_target("ort-x86"), calibration, training=training)
    return PassManager(pipeline).run(program, context)


def test_distil_brings_back_what_pruning_cost(digits, program):
    data = (digits.inputs, digits.labels)

    def accuracy(p: fxpress.Program) -> float:
        return float((p.run_flat((digits.held_out_inputs,))[0].argmax(1) == digits.held_out_labels).float().mean())

    pruned = run(program, "cleanup,prune{macs=0.3}")
    distilled = run(program, "cleanup,prune{macs=0.3},distil{epochs=2,attention=[left,right]}", data)
    assert accuracy(distilled) > accuracy(pruned) + 0.05


@pytest.mark.parametrize(
    ("pipeline", "training", "error", "message"),
    [
        ("finetune", False, DataError, "training needs data"),
        ("distil", True, OptionError, "no teacher"),
        ("cleanup,prune{macs=0.8},distil{soft=0}", True, OptionError, "plain training"),
        ("cleanup,prune{macs=0.8},distil{features=stam}", True, OptionError, "'stam'"),
        ("qat{labels=0.5}", True, OptionError, "no effect without soft"),
        ("finetune{learning_rate=-1}", True, OptionError, "learning_rate"),
        ("finetune{augment=flip-shift-cutmix}", True, OptionError, "mixes pictures"),
    ],
)
def test_mistakes_are_explained(digits, program, pipeline, training, error, message):
    data = (digits.inputs[:64], digits.labels[:64]) if training else None
    with pytest.raises(error, match=message) as caught:
        run(program, pipeline, data, [(digits.inputs[:32],)])
    assert "hint:" in str(caught.value)


@pytest.mark.parametrize("last", ["finetune", "fuse-batchnorm{keep=true},qat"])
def test_the_zeros_of_a_sparse_plan_stay(digits, program, last):
    data, calibration = (digits.inputs[:256], digits.labels[:256]), [(digits.inputs[:64],)]
    sparse = "cleanup,prune{kind=unstructured,ratio=0.5}"
    before = run(program, sparse).state_dict()["right.0.0.weight"]
    after = run(program, f"{sparse},{last}", data, calibration).state_dict()["right.0.0.weight"]
    assert (before == 0).float().mean() > 0.2
    assert (after[before == 0] == 0).all()


@pytest.mark.parametrize(("recipe", "kind"), [("recipe", "labelled data"), ("int8-qat", "trains on data")])
def test_recipes_that_train_need_data(digits, program, recipe, kind):
    made = {"pipeline": "cleanup,finetune"} if recipe == "recipe" else {"recipe": recipe}
    with pytest.raises(DataError, match=kind):
        fxpress.compile(program, calibration=digits.inputs[:64].split(32), **made)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_recipe_that_trains_is_refused_in_one_of_several_processes(digits, program, monkeypatch, rank):
    """The training would be shared, the calibration and the files would not."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    calibration = digits.inputs[:64].split(32)
    with pytest.raises(OptionError, match="trains on all processes") as caught:
        fxpress.compile(program, calibration=calibration, training=calibration, recipe="int8-qat")
    assert "hint: give distributed=True" in str(caught.value)
    fxpress.compile(program, recipe="float")


def test_recipes_that_read_no_labels_need_none(digits, program):
    calibration = digits.inputs[:64].split(32)
    made = [
        fxpress.compile(program, calibration=calibration, training=training, recipe="prune-distil-int8").report
        for training in (calibration, (digits.inputs[:64], digits.labels[:64]))
    ]
    assert made[0]["layers"] == made[1]["layers"]


def test_labels_that_are_read_are_missed(digits, program):
    with pytest.raises(DataError, match="holds no labels"):
        run(program, "finetune", list(digits.inputs[:64].split(32)))
    with pytest.raises(DataError, match="holds no labels"):
        run(program, "cleanup,prune{macs=0.8},distil{labels=0,hold_out=0.1}", list(digits.inputs[:64].split(32)))
