"""Where models and weights come from."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxpress
from fxpress.errors import SourceError, WeightsError
from fxpress.frontend.preprocess import Preprocess
from fxpress.frontend.sources import load_file, load_source
from fxpress.frontend.weights import find_state_dict, load_weights

MODEL_FILE = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())

def with_inputs():
    return make(), (torch.randn(2, 4),)

def needs_argument(width):
    return nn.Linear(width, 1)

def not_a_model():
    return 42

constant = 3
"""


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MODEL_FILE)
    return path


# -- models -------------------------------------------------------------------------------------------------------


def test_a_callable_in_a_file(model_file):
    source = load_source(f"{model_file}:make")
    assert isinstance(source.module, nn.Sequential)
    assert source.example is None
    assert not source.random_weights


def test_a_callable_may_bring_example_inputs(model_file):
    source = load_source(f"{model_file}:with_inputs")
    assert source.example[0].shape == (2, 4)


def test_a_callable_in_an_importable_module(model_file, monkeypatch):
    monkeypatch.syspath_prepend(model_file.parent)
    assert isinstance(load_source("mine:make").module, nn.Sequential)
    sys.modules.pop("mine")


def test_a_saved_program(tmp_path):
    program = fxpress.capture(small(), (torch.randn(2, 3, 8, 8),))
    program.save(tmp_path / "small.pt2")
    source = load_source(str(tmp_path / "small.pt2"))
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(source.module(x), program(x))


def test_random_weights_depend_on_the_seed_alone(model_file):
    a, b, c = (load_source(f"{model_file}:make", seed=s).module[0].weight for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_changed_file_is_loaded_anew(model_file):
    first = load_file(model_file)
    assert load_file(model_file) is first
    model_file.write_text(MODEL_FILE + "\nadded = 1\n")
    assert load_file(model_file).added == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet18", "is not a model"),
        ("FILE:nothing", "has no 'nothing'"),
        ("FILE:maek", "did you mean make"),
        ("FILE:constant", "is a int"),
        ("FILE:needs_argument", "called without arguments"),
        ("FILE:not_a_model", "returns a int"),
        ("absent.py:make", "no such file"),
        ("absent_package_xyz:make", "cannot import"),
        ("absent.pt2", "no such file"),
    ],
)
def test_a_model_that_cannot_be_found(model_file, text, message):
    with pytest.raises(SourceError) as caught:
        load_source(text.replace("FILE", str(model_file)))
    assert message in str(caught.value)
    assert caught.value.hint


def test_a_file_that_fails_is_named_with_its_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import torch\n\nwidth = 1 / 0\n")
    with pytest.raises(SourceError, match="ZeroDivisionError") as caught:
        load_source(f"{path}:make")
    assert caught.value.where == f"{path}:3"


@pytest.mark.zoo
def test_torchvision_models_bring_their_input_size_and_preprocess():
    source = load_source("torchvision:squeezenet1_1")
    assert source.random_weights
    assert source.input_shape == (3, 224, 224)
    assert source.preprocess.name == "imagenet"
    with pytest.raises(SourceError, match="did you mean resnet"):
        load_source("torchvision:resnet81")


@pytest.mark.zoo
def test_timm_models_bring_their_own_preprocess():
    source = load_source("timm:mobilenetv3_small_100")
    assert source.preprocess.interpolation == "bicubic"
    assert source.preprocess.example_shape() == source.input_shape == (3, 224, 224)
    with pytest.raises(SourceError, match="no model"):
        load_source("timm:mobilenetv9")


# -- weights ------------------------------------------------------------------------------------------------------


def saved(tmp_path, content, name="weights.pth"):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def test_safetensors(tmp_path):
    trained, fresh = small(), small()
    load_weights(fresh, saved(tmp_path, trained.state_dict(), "w.safetensors"))
    assert torch.equal(fresh[0].weight, trained[0].weight)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "ema", "model_state_dict", "state_dict_ema"])
def test_a_state_dict_inside_a_checkpoint(tmp_path, wrapper):
    trained, fresh = small(), small()
    notes = load_weights(fresh, saved(tmp_path, {wrapper: trained.state_dict(), "epoch": 3}))
    assert torch.equal(fresh[0].weight, trained[0].weight)
    assert wrapper in notes[0]


def test_prefixes_of_wrappers_are_stripped(tmp_path):
    trained, fresh = small(), small()
    state = {f"module._orig_mod.{k}": v for k, v in trained.state_dict().items()}
    assert len(load_weights(fresh, saved(tmp_path, {"model": {"state_dict": state}}))) == 3
    assert torch.equal(fresh[0].weight, trained[0].weight)


def test_a_module_that_is_really_called_module_keeps_its_prefix(tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    trained, fresh = Outer(), Outer()
    assert load_weights(fresh, saved(tmp_path, trained.state_dict())) == []
    assert torch.equal(fresh.module.weight, trained.module.weight)


def test_what_does_not_fit_is_listed(tmp_path):
    state = small().state_dict()
    state["0.weight"] = torch.zeros(5, 3, 3, 3)
    state["head.weight"] = state.pop("1.bias")
    module = small()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(module, saved(tmp_path, state))
    text = str(caught.value)
    assert "missing (1): 1.bias" in text
    assert "unexpected (1): head.weight" in text
    assert "0.weight: file [5, 3, 3, 3], model [4, 3, 3, 3]" in text
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items()), "a failed load must change nothing"


def test_weights_that_are_not_finite(tmp_path):
    state = small().state_dict()
    state["0.bias"][1] = float("nan")
    with pytest.raises(WeightsError, match=r"0\.bias"):
        load_weights(small(), saved(tmp_path, state))


class Spy:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    with pytest.raises(WeightsError, match="cannot read"):
        load_weights(small(), saved(tmp_path, {"state_dict": Spy()}))


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [1, 2], {"state_dict": {"a": 1}}])
def test_a_checkpoint_without_a_state_dict(content):
    with pytest.raises(WeightsError, match="no state dict"):
        find_state_dict(content)


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(WeightsError, match="no such"):
        load_weights(small(), tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(WeightsError, match="cannot read"):
        load_weights(small(), tmp_path / "text.pth")


@pytest.mark.realdata
@pytest.mark.zoo
def test_real_checkpoint(real_data):
    source = load_source("torchvision:mobilenet_v2")
    assert load_weights(source.module, real_data / "mobilenet_v2-b0353104.pth") == []
    assert isinstance(source.preprocess, Preprocess)
