"""Data sets of images are read as their owners distribute them; networks on them are those of the paper."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import trajstore as ts
from trajstore import analysis
from trajstore.errors import ConfigurationError, ConflictError
from trajstore.experiment.configuration import build
from trajstore.problems import images
from trajstore.replay.compare import replay

CPU = torch.device("cpu")


def pixels(count, channels, size=6, seed=0):
    shape = (count, size, size) if channels == 1 else (count, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAJSTORE_DATA", str(tmp_path))
    return tmp_path


def write_idx(folder, train, test):
    """The format of MNIST: a magic number with the type and the dimensions, their lengths, then bytes."""
    folder.mkdir(parents=True)
    for name, (stack, labels) in (("train", train), ("t10k", test)):
        head = struct.pack(">iiii", 0x0803, *stack.shape)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(head + stack.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x0801, len(labels)) + bytes(labels))


@pytest.mark.parametrize(("family", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files_are_read(data, family, folder):
    train, test = pixels(7, 1), pixels(3, 1, seed=1)
    write_idx(data / folder / "raw", (train, [3, 1, 4, 1, 5, 9, 2]), (test, [6, 5, 3]))
    found = build("images", family).load()
    assert torch.equal(found.train[0], torch.from_numpy(train)[:, None].float() / 255)
    assert found.train[1].tolist() == [3, 1, 4, 1, 5, 9, 2]
    assert torch.equal(found.test[0][:, 0], torch.from_numpy(test).float() / 255)
    assert found.classes == 10
    assert found.shape == (1, 6, 6)


@pytest.mark.parametrize("family", ["cifar10", "cifar100"])
def test_the_python_version_of_cifar_is_read(data, family, monkeypatch):
    """Small files in its format; torchvision wants the digests of the real ones, so it is told those of these."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[family]
    folder = data / kind.base_folder
    folder.mkdir()
    names = [f"class {k}" for k in range(10)]

    def written(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    key = "labels" if family == "cifar10" else "fine_labels"
    rows = {name: (pixels(4, 3, 32, seed), [seed, 1, 2, 3]) for seed, name in enumerate(("one", "two", "test"))}
    lists = [
        [name, written(name, {"data": stack.transpose(0, 3, 1, 2).reshape(4, -1), key: labels})]
        for name, (stack, labels) in rows.items()
    ]
    monkeypatch.setattr(kind, "train_list", lists[:2])
    monkeypatch.setattr(kind, "test_list", lists[2:])
    meta = {**kind.meta, "md5": written(kind.meta["filename"], {kind.meta["key"]: names})}
    monkeypatch.setattr(kind, "meta", meta)
    found = build("images", {"family": family, "train": 8}).load()
    assert sorted(found.train[1].tolist()) == [0, 1, 1, 1, 2, 2, 3, 3]
    assert found.test[1].tolist() == [2, 1, 2, 3]
    expected = torch.from_numpy(rows["test"][0]).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(found.test[0], expected)


def write_folder(folder, sizes=(6,)):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for k in range(3):
                image = Image.fromarray(pixels(1, 3, sizes[k % len(sizes)], k)[0])
                image.save(folder / part / name / f"{k}.png")


def test_a_folder_of_images_is_read(data):
    write_folder(data / "pets")
    found = build("images", {"family": "folder", "path": "pets"}).load()
    assert found.train[1].tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(found.train[0][4], torch.from_numpy(pixels(1, 3, 6, 1)[0]).permute(2, 0, 1).float() / 255)
    assert found.classes == 2


def test_what_is_wrong_with_a_folder_is_said(data):
    with pytest.raises(ConfigurationError, match=r"images: there is no folder .*pets/train; it must hold a"):
        build("images", {"family": "folder", "path": "pets"}).load()
    (data / "pets" / "train").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"images: Couldn't find any class folder in .*pets/train"):
        build("images", {"family": "folder", "path": "pets"}).load()
    write_folder(data / "mixed", sizes=(6, 5))
    with pytest.raises(ConfigurationError, match=r"images: .*1\.png is 5×5, and others are 6×6; all must be of one"):
        build("images", {"family": "folder", "path": "mixed"}).load()


def test_classes_of_the_test_part_are_those_to_train_on(data):
    write_folder(data / "pets")
    shutil.rmtree(data / "pets" / "test" / "cat")
    labels = build("images", {"family": "folder", "path": "pets"}).load().test[1]
    assert set(labels.tolist()) == {1}  # the dogs
    (data / "pets" / "test" / "dog").rename(data / "pets" / "test" / "emu")
    images._load.cache_clear()
    with pytest.raises(ConfigurationError, match="has a class 'emu', of which there is none to train on"):
        build("images", {"family": "folder", "path": "pets"}).load()


def test_idx_files_that_do_not_fit_or_are_damaged_are_named(data):
    raw = data / "FashionMNIST" / "raw"
    write_idx(raw, (pixels(20, 1), [3] * 20), (pixels(10, 1), [3] * 10))
    short = (raw / "t10k-labels-idx1-ubyte").read_bytes()
    (raw / "train-labels-idx1-ubyte").write_bytes(short)
    with pytest.raises(ConfigurationError, match="do not fit: they hold 20 images and 10 labels"):
        build("images", {"family": "fashion-mnist"}).load()
    (raw / "train-labels-idx1-ubyte").write_bytes(b"no such file of MNIST")
    with pytest.raises(ConfigurationError, match=r"FashionMNIST in .* are damaged .*; fetch them again"):
        build("images", {"family": "fashion-mnist"}).load()


def test_files_that_are_not_there_are_named_with_the_command_that_fetches_them(data):
    with pytest.raises(ConfigurationError, match=r"FashionMNIST is not in the folder .*; fetch it by python -c"):
        build("images", "fashion-mnist").load()


def test_a_smaller_selection_is_part_of_a_larger_one():
    some, more = (build("images", {"family": "shapes", "train": n, "test": 5}).load() for n in (20, 40))
    assert torch.equal(some.train[0], more.train[0][:20])
    assert torch.equal(some.test[0], more.test[0])
    assert some.digest != more.digest
    assert len(set(more.train[1].tolist())) == 10
    with pytest.raises(ConfigurationError, match="train is 5000, but that part has only 4000 images"):
        build("images", {"family": "shapes", "train": 5000}).load()


def test_images_are_made_smaller():
    whole, half = (build("images", {"family": "shapes", "train": 3, "test": 1, "size": s}).load() for s in (None, 14))
    assert half.shape == (1, 14, 14)
    assert half.digest == whole.digest  # it is that of the data
    assert half.train[0].mean().item() == pytest.approx(whole.train[0].mean().item(), rel=0.01)


def test_a_linear_map_tells_most_shapes_apart():
    found = build("images", {"family": "shapes", "train": 600, "test": 200}).load()
    (x, y), (unseen, truth) = found.train, found.test
    weights = torch.linalg.lstsq(x.flatten(1), torch.eye(10)[y], driver="gelsd").solution
    assert ((unseen.flatten(1) @ weights).argmax(1) == truth).float().mean() > 0.4
    assert x.min() >= 0
    assert x.max() <= 1


SMALL = {"family": "shapes", "train": 24, "test": 10, "size": 8, "channels": 3}


@pytest.mark.parametrize(
    ("table", "shape", "classes", "parameters"),
    [
        ("mlp", (1, 28, 28), 10, 1_399_510),
        ("vgg19", (3, 32, 32), 10, 20_029_514),
        ("resnet18", (3, 32, 32), 10, 11_173_962),
        ("resnet50", (3, 32, 32), 100, 23_705_252),
        ({"family": "vgg19", "narrow": 8}, (1, 32, 32), 10, None),
        ({"family": "resnet18", "narrow": 8}, (1, 16, 16), 10, None),
        ({"family": "resnet50", "narrow": 16}, (3, 8, 8), 10, None),
    ],
)
def test_networks_have_the_parameters_of_the_papers(table, shape, classes, parameters):
    problem = build("problem", table)
    with torch.device("meta"):
        net = problem.network(shape, classes)
        assert net.eval()(torch.zeros(2, *shape)).shape == (2, classes)
    count = sum(p.numel() for p in net.parameters())
    assert count == parameters if parameters else count < 500_000


@pytest.mark.parametrize(("init", "variance"), [("torch", 1 / 3), ("lecun", 1), ("he", 2)])
def test_a_perceptron_is_initialised_as_asked(init, variance):
    torch.manual_seed(0)
    first = build("problem", {"family": "mlp", "depth": 1, "init": init}).fresh((1, 28, 28), 10)[1]
    assert first.weight.var().item() * first.in_features == pytest.approx(variance, rel=0.01)
    assert (first.bias.abs().max().item() > 0) == (init == "torch")


def test_a_network_that_cannot_be_built_says_why():
    with pytest.raises(ConfigurationError, match="images are 8×8, too small to halve 5 times; set"):
        build("problem", {"family": "vgg19", "images": SMALL}).build(CPU)
    with pytest.raises(ConfigurationError, match="init"):
        build("problem", {"family": "mlp", "init": "xavier"})
    with pytest.raises(ConfigurationError, match="narrow is 7; it must divide 64 channels"):
        build("problem", {"family": "resnet18", "narrow": 7, "images": SMALL}).build(CPU)


def test_the_wave_agrees_with_the_definition_running_statistics_included(tmp_path):
    table = {
        "name": "net", "steps": 4, "orders": ["forward", "backward"], "operator": {"family": "sgd", "lr": 0.01},
        "problem": {"family": "resnet18", "narrow": 32, "images": SMALL, "batch_size": 8, "dtype": "float64"},
    }  # fmt: skip
    plain, wave = (
        ts.run(ts.Experiment.of(table), tmp_path / f"{how}.zarr", engine=how, durability="none").dataset().load()
        for how in ("reference", "wavefront")
    )
    assert np.abs(plain["params"] - wave["params"]).max() < 1e-12
    statistics = plain.traj.layer("bn1.running_mean")
    assert np.ptp(statistics.values, axis=-1).max() > 1e-3
    assert plain.traj.layer("bn1.num_batches_tracked").sel(order="backward", seed=0, snapshot=4) == 4
    assert {"train_accuracy", "test_accuracy", "train_loss", "test_loss"} <= set(plain)


def test_what_the_data_were_is_in_the_record_and_others_are_refused(data, trajstore):
    write_folder(data / "pets")
    table = {
        "name": "net", "steps": 2, "operator": {"family": "sgd", "lr": 0.1},
        "problem": {"family": "mlp", "width": 4, "depth": 1, "images": {"family": "folder", "path": "pets"}},
    }  # fmt: skip
    stored = ts.run(ts.Experiment.of(table), data / "s.zarr")
    assert stored.attributes["fills"][0]["data"] == build("images", table["problem"]["images"]).load().digest
    assert analysis.outputs(stored.dataset()).shape == (2, 1, 3, 6, 2)
    _, told, _ = trajstore("info", "s.zarr", "net")
    assert f"data         sha256:{stored.attributes['fills'][0]['data']}\n" in told
    images._load.cache_clear()
    Image.fromarray(pixels(1, 3, 6, 99)[0]).save(data / "pets" / "train" / "cat" / "0.png")
    with pytest.raises(ConflictError, match="'net': its data have changed since it was recorded, from digest"):
        analysis.outputs(stored.dataset())
    with pytest.raises(ConflictError, match="its data have changed since it was recorded"):
        ts.run(ts.Experiment.of({**table, "seeds": [0, 1]}), data / "s.zarr", extend=True)
    assert stored.schema.seeds == (0,)  # it has not grown
    assert stored.commits().complete.all()
    with pytest.raises(ConflictError, match="its data have changed since it was recorded"):
        list(replay(stored))
