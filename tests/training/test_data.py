"""Glyphs, data sets through Hugging Face datasets, and augmentation."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import ft2font
from PIL import Image
from torch.utils.data import TensorDataset

from kdkernels import cli
from kdkernels.training import Distillation, data
from kdkernels.training.data import augment
from kdkernels.training.data.glyphs import CHARACTERS, FONTS, font_folder, glyphs
from kdkernels.training.models import small_student


def test_every_font_has_every_character() -> None:
    assert len(set(CHARACTERS)) == 100
    for name in FONTS:
        known = ft2font.FT2Font(font_folder() / f"{name}.ttf").get_charmap()
        assert [c for c in CHARACTERS if ord(c) not in known] == [], name


def test_glyphs_are_the_same_for_a_seed() -> None:
    images, labels = glyphs(200, seed=3).tensors
    again, other = glyphs(200, seed=3).tensors, glyphs(200, seed=4).tensors
    assert images.shape == (200, 3, 32, 32)
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    assert not torch.equal(labels, other[1])
    assert torch.bincount(labels).tolist() == [2] * 100
    torch.testing.assert_close(images.mean((1, 2, 3)), torch.zeros(200), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((1, 2, 3)), torch.ones(200), atol=1e-5, rtol=0)


def test_glyphs_can_be_told_apart() -> None:
    """Ridge regression, a linear classifier, reads many more than one in a hundred of new ones."""
    (x, y), (x_test, y_test) = glyphs(1500, seed=0).tensors, glyphs(300, seed=1).tensors
    x, x_test = x.mean(1).flatten(1), x_test.mean(1).flatten(1)
    weights = torch.linalg.solve(x.T @ x + 300 * torch.eye(x.shape[1]), x.T @ torch.eye(100)[y])
    assert 0.15 < ((x_test @ weights).argmax(1) == y_test).double().mean().item() < 0.7


def test_glyphs_as_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "TRAIN_GLYPHS", 20)
    monkeypatch.setattr(data, "TEST_GLYPHS", 10)
    split = data.load("glyphs")
    assert (len(split.train), len(split.test), split.channels, split.classes) == (20, 10, 3, 100)
    assert split.models == ("medium_student", "medium_teacher")


def test_crops_and_flips() -> None:
    images = torch.arange(1.0, 1 + 50 * 2 * 36).reshape(50, 2, 6, 6)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    results = augment.CropFlip(padding=2)(images)
    seen = set()
    for image, result in zip(padded, results, strict=True):
        windows = {(y, x, f): image[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5) for f in (0, 1)}
        windows = {key: window.flip(2) if key[2] else window for key, window in windows.items()}
        seen.add(next(key for key, window in windows.items() if torch.equal(window, result)))
    assert len(seen) > 20  # of 50 possible
    assert {flip for _, _, flip in seen} == {0, 1}
    assert torch.equal(augment.CropFlip(0, flip=0)(images), images)
    assert torch.equal(augment.CropFlip(0, flip=1)(images), images.flip(3))


def test_resized_crops() -> None:
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(48.0), indexing="ij")
    images = torch.stack([y, x]).expand(200, 2, 40, 48)
    result = augment.ResizedCropFlip(16)(images)
    assert result.shape == (200, 2, 16, 16)
    # a window of a plane is a plane: its slopes are the window's size
    high, wide = (
        result[:, 0].diff(dim=1)[:, 4:11].mean((1, 2)) * 16,
        result[:, 1].diff(dim=2)[:, :, 4:11].mean((1, 2)) * 16,
    )
    assert 60 < (wide < 0).sum() < 140  # those that were flipped
    area, ratio = high * wide.abs() / (40 * 48), wide.abs() / high
    free = (high < 39) & (wide.abs() < 47)  # the others are cut to the image
    assert 0.07 < area.min() < 0.15
    assert area.max() <= 1.01
    assert free.sum() > 100
    assert (ratio[free] > 0.74).all()
    assert (ratio[free] < 1.35).all()
    whole = augment.ResizedCropFlip(40, scale=(1, 1), ratio=(1, 1), flip=0)(images[:1, :, :, :40])
    torch.testing.assert_close(whole, images[:1, :, :, :40], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: augment.CropFlip(-1), "padding must be 0 or more"),
        (lambda: augment.ResizedCropFlip(0), "size must be 1 or more"),
        (lambda: augment.make_augmentation("flop", 32), "one of none, crop, crop-flip, resized-crop-flip, got 'flop'"),
    ],
)
def test_wrong_augmentations(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_both_networks_see_the_augmented_images_in_training_alone() -> None:
    seen = []
    teacher, student = small_student(1, 10), small_student(1, 10)
    for network in (teacher, student):
        network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    distillation = Distillation(teacher, student, "kd", augment=augment.CropFlip(0, flip=1))
    images, target = torch.randn(4, 1, 8, 8), torch.arange(4)
    distillation(images, target)
    distillation.eval()(images, target)
    assert all(torch.equal(x, images.flip(3)) for x in seen[:2])
    assert all(torch.equal(x, images) for x in seen[2:])


def pictures(count: int, shape: tuple[int, ...] = (32, 32, 3)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets", reason="comes with the data extra")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # it waits at the end of each stream, in each process, for Arrow's threads
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
    datasets.disable_progress_bars()
    return datasets


def cifar100(folder: Path, datasets: Any, train: int = 40, test: int = 20) -> Path:
    """In the layout of uoft-cs/cifar100: PNG files as bytes in parquet files, the columns' kinds beside them."""
    import pyarrow as pa
    from pyarrow import parquet

    names = datasets.ClassLabel(num_classes=100), datasets.ClassLabel(num_classes=20)
    features = datasets.Features({"img": datasets.Image(), "fine_label": names[0], "coarse_label": names[1]})
    (folder / "cifar100").mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        images = []
        for x in pictures(count):
            Image.fromarray(x).save(file := io.BytesIO(), "PNG")
            images.append({"bytes": file.getvalue(), "path": None})
        labels = np.arange(count) % 100
        table = pa.table({"img": images, "fine_label": labels, "coarse_label": labels % 20})
        kinds = json.dumps({"info": {"features": features.to_dict()}})
        parquet.write_table(
            table.replace_schema_metadata({"huggingface": kinds}),
            folder / "cifar100" / f"{split}-00000-of-00001.parquet",
        )
    card = {
        "dataset_info": {
            "config_name": "cifar100",
            "features": features._to_yaml_list(),
            "splits": [
                {"name": "train", "num_bytes": 1, "num_examples": train},
                {"name": "test", "num_bytes": 1, "num_examples": test},
            ],
        },
        "configs": [
            {
                "config_name": "cifar100",
                "data_files": [{"split": s, "path": f"cifar100/{s}-*"} for s in ("train", "test")],
                "default": True,
            }
        ],
    }
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")  # JSON is YAML
    return folder


def test_cifar100_in_its_published_layout(tmp_path: Path, datasets: Any) -> None:
    folder = cifar100(tmp_path / "cifar100", datasets)
    split = data.load(f"hf:{folder}")
    images, labels = split.train.tensors
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)))
    expected = (torch.from_numpy(pictures(40)).movedim(3, 1) / 255 - mean) / std
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert labels.tolist() == list(range(40))
    assert (len(split.test), split.channels, split.classes, split.augment) == (20, 3, 100, "crop-flip")
    coarse = data.load(f"hf:{folder}", label="coarse_label")
    assert (coarse.classes, coarse.train.tensors[1].tolist()) == (20, [i % 20 for i in range(40)])
    with pytest.raises(ValueError, match="no label column 'fine': name one of fine_label, coarse_label"):
        data.load(f"hf:{folder}", label="fine")


def test_a_stream_is_shuffled_anew_in_each_epoch(tmp_path: Path, datasets: Any) -> None:
    folder = cifar100(tmp_path / "cifar100", datasets)
    split = data.load(f"hf:{folder}", streaming=True)
    whole = data.load(f"hf:{folder}")
    for workers in (0, 2):
        loader = data.loader(split.train, 16, train=True, workers=workers)
        torch.manual_seed(0)
        epochs = [torch.cat([labels for _, labels in loader]).tolist() for _ in range(2)]
        torch.manual_seed(0)
        assert torch.cat([labels for _, labels in loader]).tolist() == epochs[0]
        assert len(loader) == 2
        assert [len(set(epoch)) for epoch in epochs] == [32, 32]  # 40 without the rest; none twice
        assert epochs[0] != epochs[1]
    images, labels = next(iter(data.loader(split.test, 20, train=False)))
    assert torch.equal(images, whole.test.tensors[0])
    assert torch.equal(labels, whole.test.tensors[1])
    with pytest.raises(ValueError, match="cannot be drawn from a stream"):
        data.labelled_subset(split.train, 1, seed=0)


def image_folder(folder: Path, splits: tuple[str, ...] = ("train", "test")) -> Path:
    for split in splits:
        for i, x in enumerate(pictures(12, (70, 90, 3))):
            path = folder / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(path)
    return folder


def test_an_image_folder(tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = image_folder(tmp_path / "pictures")
    split = data.load(f"hf:{folder}", size=48)
    images, labels = split.train.tensors
    assert images.shape == (12, 3, 48, 48)
    assert (split.classes, split.augment) == (2, "none")
    assert sorted(labels.tolist()) == [0] * 6 + [1] * 6
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=1e-2, rtol=0)
    monkeypatch.setattr("kdkernels.training.data.hub.IN_MEMORY", 1000)
    rows = data.load(f"hf:{folder}", size=48)
    assert not isinstance(rows.train, TensorDataset)
    assert rows.workers == 4
    assert torch.equal(torch.stack([rows.train[i][0] for i in range(12)]), images)
    few = data.labelled_subset(rows.train, 2, seed=0)
    assert sorted(few[i][1] for i in range(len(few))) == [0, 0, 1, 1]
    assert len(next(iter(data.loader(rows.train, 12, train=True, triplets=True)))) == 3
    assert data.load(f"hf:{folder}").train[0][0].shape == (3, 224, 224)


def test_sets_without_what_is_needed_are_refused(tmp_path: Path, datasets: Any) -> None:
    with pytest.raises(ValueError, match=r"needs a split train and one of validation, .*, and has train"):
        data.load(f"hf:{image_folder(tmp_path / 'one', ('train',))}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty cannot be loaded") as caught:
        data.load(f"hf:{tmp_path / 'empty'}")
    assert "\n" not in str(caught.value)
    (tmp_path / "text").mkdir()
    for split in ("train", "test"):
        (tmp_path / "text" / f"{split}.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="needs one column of images, and has none of"):
        data.load(f"hf:{tmp_path / 'text'}")
    with pytest.raises(ValueError, match="belong to hf: data sets, got 'digits'"):
        data.load("digits", size=32)


def test_cifar100_and_an_image_folder_train(tmp_path: Path, datasets: Any, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["train", "--epochs", "1", "--teacher-epochs", "1", "--batch-size", "8", "--output"]
    source = f"hf:{cifar100(tmp_path / 'cifar100', datasets)}"
    models = ["--model", "resnet8", "--teacher-model", "wrn_16_1"]
    assert cli.main([*common, str(tmp_path / "a"), "--data", source, *models, "--method", "sp"]) == 0
    source = f"hf:{image_folder(tmp_path / 'pictures')}"
    assert cli.main([*common, str(tmp_path / "b"), "--data", source, "--image-size", "32"]) == 0
    assert "kd: " in capsys.readouterr().out


def run(options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["train", "--epochs", "1", "--output", str(folder / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_wrong_options_fail_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "data must be 'digits', 'glyphs', hf:NAME, hf:FOLDER or" in run(["--data", "cifar"], tmp_path, capsys)
    assert "there is no model 'resnet9': did you mean" in run(["--model", "resnet9"], tmp_path, capsys)
    assert "an augmentation is one of none, crop" in run(["--augment", "flop"], tmp_path, capsys)
    line = run(["--teacher", "pretrained"], tmp_path, capsys)
    assert "no published weights of 'small_teacher' here" in line
