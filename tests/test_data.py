"""Where examples come from, how pictures become inputs, and what is checked about batches."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxpress
from fxpress.errors import DataError, OptionError
from fxpress.frontend.batches import as_batches
from fxpress.frontend.data import Loading, open_data, spaced
from fxpress.frontend.preprocess import PRESETS, Preprocess, imagenet_like, load_preprocess

PLAIN = Preprocess(scale=1 / 255)


def picture(seed=0, size=(12, 10)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


# -- Preprocess ---------------------------------------------------------------------------------------------------


def test_the_arithmetic_of_a_preprocess():
    how = Preprocess(scale=1 / 255, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    pixels = np.asarray(picture())
    expected = (pixels / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    result = how(picture())
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(how(pixels), result)


@pytest.mark.zoo
@pytest.mark.parametrize("size", [(300, 400), (401, 257), (224, 224), (90, 500)])
def test_the_imagenet_preset_is_torchvisions(size):
    from torchvision.transforms import v2

    theirs = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                         v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])  # fmt: skip
    image = picture(size=size)
    np.testing.assert_allclose(PRESETS["imagenet"](image), theirs(image).numpy(), atol=2e-6)


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "efficientnet_b0", "vit_tiny_patch16_224", "convnext_atto"])
def test_a_timm_model_brings_timms_transform(name):
    from fxpress.frontend.sources import load_source

    source = load_source(f"timm:{name}")
    import timm

    config = timm.data.resolve_model_data_config(source.module)
    theirs = timm.data.create_transform(**config, is_training=False)
    image = picture(size=(333, 280))
    np.testing.assert_allclose(source.preprocess(image), theirs(image).numpy(), atol=2e-6)


def test_grey_pictures_and_other_layouts():
    grey = Preprocess(channels=1, scale=1 / 16)
    assert grey(np.zeros((8, 8), np.uint8)).shape == (1, 8, 8)
    assert Preprocess(layout="HWC", dtype="uint8")(picture()).shape == (12, 10, 3)
    assert Preprocess(layout="HWC", dtype="uint8")(picture()).dtype == np.uint8


def test_a_preprocess_round_trips_through_json():
    for how in (*PRESETS.values(), Preprocess(resize=(20, 30), mean=(1.0, 2.0, 3.0)), imagenet_like(160, 192)):
        assert Preprocess.from_json(how.to_json()) == how


def test_a_preprocess_from_toml(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("resize = 40\ncrop = [32, 32]\nscale = 0.5\nmean = [0.1, 0.2, 0.3]\n")
    assert load_preprocess(str(path)) == Preprocess("mine", 40, (32, 32), scale=0.5, mean=(0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crops = [1, 2]", "no field 'crops'"),
        ("crop = 32", "crop is 32"),
        ("crop = [32, 32, 32]", "crop is"),
        ('interpolation = "cubic"', "interpolation is 'cubic'"),
        ("mean = [0.5]", "1 values for 3 channels"),
        ("scale = 'x'", "scale is 'x'"),
        ('dtype = "uint8"\nscale = 0.5', "cannot scale"),
        ("scale = ", "not valid TOML"),
    ],
)
def test_a_preprocess_that_cannot_be(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(OptionError, match=message):
        load_preprocess(str(path))


def test_what_is_no_picture():
    with pytest.raises(DataError, match="is no picture"):
        PLAIN(np.zeros((3, 4, 5, 6), np.uint8))
    with pytest.raises(DataError, match="is no picture"):
        PLAIN(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(DataError, match="smaller than the crop"):
        Preprocess(crop=(64, 64))(picture())


# -- DATA ---------------------------------------------------------------------------------------------------------


def write_pictures(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / name)


def labels_of(data):
    return [int(y) for _, labels in data for y in labels]


def test_class_folders_are_labels(tmp_path):
    write_pictures(tmp_path, ["cat/a.png", "cat/b.png", "dog/a.png"])
    data = open_data(str(tmp_path), Loading(PLAIN, batch_size=2))
    assert (data.count, data.labelled, data.classes) == (3, True, ("cat", "dog"))
    assert labels_of(data) == labels_of(data) == [0, 0, 1]
    assert next(iter(data))[0].shape == (2, 3, 12, 10)


def test_numbered_class_folders_mean_their_number(tmp_path):
    write_pictures(tmp_path, ["10/a.png", "9/a.png"])
    assert labels_of(open_data(str(tmp_path), Loading(PLAIN))) == [10, 9]


def test_a_folder_without_classes_has_no_labels(tmp_path):
    write_pictures(tmp_path, ["a.png", "b.png"])
    data = open_data(str(tmp_path), Loading(PLAIN))
    assert data.labelled is False
    assert isinstance(next(iter(data)), torch.Tensor)


def test_a_zip_is_read_as_a_folder(tmp_path):
    write_pictures(tmp_path / "all", ["x/cat/a.png", "x/dog/a.png"])
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for p in (tmp_path / "all").rglob("*.png"):
            archive.write(p, p.relative_to(tmp_path / "all"))
    assert open_data(str(tmp_path / "all.zip"), Loading(PLAIN)).classes == ("cat", "dog")


def test_names_that_carry_the_class_index(tmp_path):
    write_pictures(tmp_path, ["281_n02123045.png", "7_n01514668.png"])
    assert sorted(labels_of(open_data(str(tmp_path), Loading(PLAIN)))) == [7, 281]


def test_uint8_arrays_are_pictures(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(5), classes=np.array(list("abcde")))
    data = open_data(str(tmp_path / "d.npz"), Loading(PLAIN, batch_size=2))
    assert data.classes == tuple("abcde")
    assert labels_of(data) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(next(iter(data))[0][1].numpy(), images[1].transpose(2, 0, 1) / 255, atol=1e-6)


def test_float_arrays_are_ready_inputs(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    np.save(tmp_path / "d.npy", x)
    for name in ("d.npz", "d.npy"):
        data = open_data(str(tmp_path / name), Loading(batch_size=3))
        np.testing.assert_array_equal(torch.cat(list(data)).numpy(), x)
    with pytest.raises(OptionError, match="no effect"):
        open_data(str(tmp_path / "d.npy"), Loading(PLAIN))


def test_pictures_need_a_preprocess(tmp_path):
    write_pictures(tmp_path, ["a.png"])
    with pytest.raises(OptionError, match="--preprocess"):
        open_data(str(tmp_path))
    assert open_data(str(tmp_path), Loading(fallback=PLAIN)).preprocess is PLAIN


def test_a_callable_is_called_for_every_pass(tmp_path):
    path = tmp_path / "feed.py"
    path.write_text("import torch\ndef batches():\n    for i in range(3):\n        yield torch.full((2, 4), float(i)), torch.tensor([0, 1])\n")
    data = open_data(f"{path}:batches")
    assert len(list(data)) == len(list(data)) == 3


def test_samples_are_evenly_spaced(tmp_path):
    assert list(spaced(10, 4)) == [0, 3, 6, 9]
    assert len(spaced(10, 40)) == len(spaced(10, None)) == 10
    np.savez(tmp_path / "d.npz", x=np.arange(10, dtype=np.float32)[:, None])
    assert open_data(str(tmp_path / "d.npz"), Loading(samples=4)).count == 4


def bad_data(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "bad.npz").write_text("hello")
    (tmp_path / "bad.zip").write_text("hello")
    np.savez(tmp_path / "names.npz", pixels=np.zeros((2, 2), np.float32))
    np.savez(tmp_path / "lengths.npz", x=np.zeros((2, 2), np.float32), y=np.zeros(3, np.int64))
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 2), np.float32))
    np.save(tmp_path / "objects.npy", np.array([object()]), allow_pickle=True)
    write_pictures(tmp_path / "sizes", ["a.png"])
    picture(size=(5, 5)).save(tmp_path / "sizes" / "b.png")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "no such data"),
        ("empty", "no pictures"),
        ("broken", "cannot read the picture a.png"),
        ("text.txt", "cannot tell what kind"),
        ("bad.npz", "cannot read"),
        ("bad.zip", "cannot read"),
        ("names.npz", "no array called images or x"),
        ("lengths.npz", "2 examples but 3 labels"),
        ("none.npz", "no examples"),
        ("objects.npy", "cannot read"),
        ("sizes", "different sizes"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, name, message):
    bad_data(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        list(open_data(str(tmp_path / name), Loading(fallback=PLAIN)))
    assert caught.value.hint


@pytest.mark.realdata
def test_the_real_pictures(real_data):
    data = open_data(str(real_data / "imagenet_sample_500.zip"), Loading(PRESETS["imagenet"], samples=20))
    assert data.count == 20
    assert all(y % 2 == 0 for y in labels_of(data))


# -- batches ------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def forward(self, left, right):
        return left + right


@pytest.fixture(scope="module")
def program():
    return fxpress.capture(nn.Linear(4, 3), (torch.randn(2, 4),))


@pytest.fixture(scope="module")
def two_inputs():
    return fxpress.capture(Two(), (torch.randn(2, 4), torch.randn(2, 4)))


X, Y = torch.randn(6, 4), torch.arange(6)


@pytest.mark.parametrize(
    "data",
    [
        [X[:3], X[3:]],
        [(X[:3],), [X[3:]]],
        [(X[:3], Y[:3]), (X[3:], Y[3:])],
        [{"input": X[:3]}, {"input": X[3:], "labels": Y[3:]}],
        [X[:3].numpy(), X[3:].numpy()],
        DataLoader(TensorDataset(X, Y), batch_size=3),
        X,
        X.numpy(),
        lambda: iter([X[:3], X[3:]]),
    ],
    ids=["tensors", "tuples", "labelled", "dicts", "numpy", "loader", "tensor", "array", "function"],
)
def test_any_iterable_of_batches_becomes_flat_tuples(program, data):
    batches = as_batches(program, data)
    for _ in range(2):
        assert torch.equal(torch.cat([b for (b,) in batches]), X)
    assert batches.count == 6


def test_a_generator_is_kept(program):
    batches = as_batches(program, (x for x in (X[:3], X[3:])))
    assert len(list(batches)) == len(list(batches)) == 2


def test_two_inputs_are_not_taken_for_a_label(two_inputs):
    (batch,) = as_batches(two_inputs, [(X, -X)])
    assert torch.equal(batch[1], -X)
    (batch,) = as_batches(two_inputs, [((X, -X), Y)])
    assert torch.equal(batch[1], -X)
    (batch,) = as_batches(two_inputs, [{"right": -X, "left": X}])
    assert torch.equal(batch[1], -X)


NAN = X.clone()
NAN[4, 1] = float("nan")


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        ([], "no examples", "at least one"),
        ([X.double()], "dtype float64", r"x.to\(torch.float32\)"),
        ([X.to(torch.uint8)], "dtype uint8", "Preprocess"),
        ([X[:, :3]], r"shape \[6, 3\]", "size"),
        ([X[0]], r"shape \[4\]", "unsqueeze"),
        ([NAN], "1 NaN", "isfinite"),
        ([torch.zeros(2, 4)], "every value", "real examples"),
        ([(X, Y, Y)], "3 tensors", "inputs, labels"),
        ([{"pixels": X}], "keys pixels", "forward"),
        (["text"], "a str", "tensors"),
        ({"input": X}, "one dict", "list"),
        (7, "are a int", "DataLoader"),
        (lambda: 3, "returned a int", "iterable"),
    ],
)
def test_data_that_do_not_fit(program, data, message, hint):
    with pytest.raises(DataError, match=message) as caught:
        as_batches(program, data)
    import re

    assert re.search(hint, caught.value.hint)


def test_nan_is_found_in_every_batch_not_only_the_first(program):
    batches = as_batches(program, [X, NAN])
    with pytest.raises(DataError, match=r"batch 1 .* NaN"):
        list(batches)


def test_raw_pixels_are_remarked(program):
    batches = as_batches(program, [torch.randint(0, 256, (8, 4)).float()])
    assert "pixels" in batches.notes[0]


def test_batches_of_different_inputs_must_agree(two_inputs):
    with pytest.raises(DataError, match="shape"):
        as_batches(two_inputs, [(X, X[:3])])


def test_a_fixed_batch_is_checked():
    program = fxpress.capture(nn.Linear(4, 3), (torch.randn(2, 4),), dynamic_batch=False)
    with pytest.raises(DataError, match="shape") as caught:
        as_batches(program, [X])
    assert "fixed" in caught.value.hint
