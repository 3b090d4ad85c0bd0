"""Networks by name, their parameter keys, and weights from files."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from kdkernels import cli
from kdkernels.training import stage_names
from kdkernels.training.models import MODELS, load_weights, make_model

# Of RepDistiller's own networks (commit b84f547) for 100 classes, read off them: parameters, entries of the state dict,
# and its last entry but two. All keys, shapes and outputs were compared with theirs.
REPDISTILLER = {
    "resnet8": (83892, 56, "layer3.0.downsample.1.num_batches_tracked"),
    "resnet14": (181108, 92, "layer3.1.bn2.num_batches_tracked"),
    "resnet20": (278324, 128, "layer3.2.bn2.num_batches_tracked"),
    "resnet32": (472756, 200, "layer3.4.bn2.num_batches_tracked"),
    "resnet44": (667188, 272, "layer3.6.bn2.num_batches_tracked"),
    "resnet56": (861620, 344, "layer3.8.bn2.num_batches_tracked"),
    "resnet110": (1736564, 668, "layer3.17.bn2.num_batches_tracked"),
    "resnet8x4": (1233540, 62, "layer3.0.downsample.1.num_batches_tracked"),
    "resnet32x4": (7433860, 206, "layer3.4.bn2.num_batches_tracked"),
    "ResNet50": (23705252, 320, "layer4.2.bn3.num_batches_tracked"),
    "wrn_16_1": (180916, 82, "bn1.num_batches_tracked"),
    "wrn_16_2": (703284, 83, "bn1.num_batches_tracked"),
    "wrn_40_1": (569780, 226, "bn1.num_batches_tracked"),
    "wrn_40_2": (2255156, 227, "bn1.num_batches_tracked"),
    "vgg8": (3965028, 37, "block4.1.num_batches_tracked"),
    "vgg11": (9277284, 58, "block4.4.num_batches_tracked"),
    "vgg13": (9462180, 72, "block4.4.num_batches_tracked"),
    "vgg16": (14774436, 93, "block4.7.num_batches_tracked"),
    "vgg19": (20086692, 114, "block4.10.num_batches_tracked"),
    "MobileNetV2": (812836, 320, "conv2.1.num_batches_tracked"),
    "ShuffleV1": (949258, 296, "layer3.3.bn3.num_batches_tracked"),
    "ShuffleV2": (1355528, 338, "bn2.num_batches_tracked"),
}

STAGES = {"resnet": 3, "ResNet": 4, "wrn": 3, "vgg": 5, "MobileNetV": 7, "ShuffleV": 3}


@pytest.mark.parametrize("name", REPDISTILLER)
def test_repdistillers_networks(name: str) -> None:
    parameters, entries, key = REPDISTILLER[name]
    with torch.device("meta"):
        model = make_model(name, 3, 100)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 100)
    assert sum(p.numel() for p in model.parameters()) == parameters
    keys = list(model.state_dict())
    assert (len(keys), keys[-3]) == (entries, key)
    assert len(stage_names(model)) == STAGES[re.match("[A-Za-z]+", name)[0]]


def test_all_of_repdistillers_networks_are_tested() -> None:
    assert set(MODELS) - set(REPDISTILLER) == {"small_student", "small_teacher", "medium_student", "medium_teacher"}


def test_networks_for_small_grey_images() -> None:
    for name in ("resnet8", "wrn-16-1", "vgg8", "mobilenetv2", "shufflenetv1", "ShuffleNetV2", "medium_student"):
        with torch.device("meta"):
            assert make_model(name, 1, 10).eval()(torch.empty(2, 1, 8, 8)).shape == (2, 10)


def test_their_keys_in_full() -> None:
    block = ["bn1", "conv1", "bn2", "conv2"]
    norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def entries(prefix: str, layers: list[str]) -> list[str]:
        return [f"{prefix}{n}.{k}" for n in layers for k in (norms if n.startswith("bn") else ("weight",))]

    stages = [
        key
        for i in (1, 2, 3)
        for j in (0, 1)
        for key in entries(f"block{i}.layer.{j}.", block + (["convShortcut"] if (i, j) in ((2, 0), (3, 0)) else []))
    ]
    expected = ["conv1.weight", *stages, *entries("", ["bn1"]), "fc.weight", "fc.bias"]
    assert list(make_model("wrn_16_1", 3, 100).state_dict()) == expected


def checkpoint(path: Path, model: nn.Module, **more: object) -> Path:
    """As RepDistiller's train_teacher.py saves one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more}, path)
    return path


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def test_repdistillers_checkpoints_load(tmp_path: Path) -> None:
    teacher = make_model("resnet8x4", 3, 100)
    files = [
        checkpoint(tmp_path / "ckpt_epoch_240.pth", teacher, epoch=240, accuracy=torch.tensor(72.5)),
        checkpoint(tmp_path / "resnet8x4_last.pth", teacher, opt=Namespace(model="resnet8x4", lr_decay_epochs=[150])),
    ]
    bare, parallel, old = (tmp_path / f"{name}.pth" for name in ("bare", "parallel", "old"))
    torch.save(teacher.state_dict(), bare)
    torch.save({"state_dict": {f"module.{k}": v for k, v in teacher.state_dict().items()}}, parallel)
    without = {k: v for k, v in teacher.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({"model": without}, old, _use_new_zipfile_serialization=False)  # as PyTorch 1.0 did
    for file in (*files, bare, parallel, old):
        model = make_model("resnet8x4", 3, 100)
        assert not same(model, teacher)
        load_weights(model, file)
        assert same(model, teacher), file


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("evil"),))


def test_other_files_are_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = checkpoint(tmp_path / "teacher.pth", make_model("resnet8", 3, 100))
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:1000])
    (tmp_path / "text.pth").write_text("text")
    (tmp_path / "text.safetensors").write_text("text")
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    for name, message in {
        "missing.pth": "does not exist",
        "cut.pth": "no checkpoint that can be read safely",
        "text.pth": "no checkpoint that can be read safely",
        "text.safetensors": "no whole safetensors file",
        "evil.pth": "no checkpoint that can be read safely",
        "none.pth": "holds no state dict, alone or as 'model' or 'state_dict', but 'epoch'",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_weights(make_model("resnet8", 3, 100), tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()
    with pytest.raises(ValueError, match=r"has fc.weight \(100, 64\), not \(10, 64\), fc.bias"):
        load_weights(make_model("resnet8", 3, 10), whole)
    with pytest.raises(ValueError, match=r"this ResNet: it lacks layer1.1.bn1.bias, .* and \d+ more"):
        load_weights(make_model("resnet14", 3, 100), whole)
    with pytest.raises(ValueError, match="this WideResNet: it lacks block1"):
        load_weights(make_model("wrn_16_1", 3, 100), whole)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet9", r"there is no model 'resnet9': did you mean .*resnet8"),
        ("mobilenet", r"there is no model 'mobilenet': did you mean MobileNetV2\?"),
        ("linear", r"no model 'linear': there are small_student, .*ShuffleV2, timm:NAME"),
        ("nowhere.at.all:Net", "No module named 'nowhere'; a model is a name, timm:NAME"),
        ("own_nets:Smal", r"own_nets has no 'Smal': did you mean Small"),
        ("own_nets:NUMBER", "must be a function or class that makes a network, got 3"),
        ("own_nets:needs_more", "needs depth, and is given in_channels, classes, num_classes"),
        ("own_nets:nothing", "returns a NoneType, and not a network"),
        ("hf:no/such/model/at/all", "hf:no/such/model/at/all cannot be made"),
    ],
)
def test_unknown_models_are_named(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_nets(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=message) as caught:
        make_model(name, 3, 10)
    assert "\n" not in str(caught.value)


def own_nets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own_nets.py").write_text(
        "from torch import nn\n"
        "NUMBER = 3\n"
        "def needs_more(depth): pass\n"
        "def nothing(classes=2): pass\n"
        "class Small(nn.Sequential):\n"
        "    def __init__(self, in_channels, num_classes, wide=4):\n"
        "        super().__init__(nn.Conv2d(in_channels, wide, 3), nn.Flatten(), nn.LazyLinear(num_classes))\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])  # which finding it adds to
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)


def test_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_nets(tmp_path, monkeypatch)
    assert make_model("own_nets:Small", 2, 7)(torch.randn(3, 2, 8, 8)).shape == (3, 7)
    with pytest.raises(ValueError, match="no published weights"):
        make_model("own_nets:Small", 2, 7, pretrained=True)
    with pytest.raises(ValueError, match="no published weights of 'resnet8'"):
        make_model("resnet8", 3, 10, pretrained=True)


def test_transformers_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
    published = transformers.ResNetForImageClassification(config)
    published.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    assert make_model(f"hf:{tmp_path}", 3, 10)(x).logits.shape == (2, 10)
    teacher = make_model(f"hf:{tmp_path}", 3, 3, pretrained=True).eval()
    torch.testing.assert_close(teacher(x).logits, published.eval()(x).logits)


def test_a_published_teacher_of_other_classes_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], downsample_in_first_stage=False, num_labels=3
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "three")
    monkeypatch.setattr("kdkernels.training.run.fit", mock.Mock(side_effect=AssertionError("it trains")))
    options = ["--teacher", "pretrained", "--teacher-model", f"hf:{tmp_path / 'three'}", "--output", str(tmp_path)]
    assert cli.main(["train", *options]) == 2
    assert "(32, 10)" in capsys.readouterr().err.splitlines()[-1]


class Library(ModuleType):
    """What is asked of timm or torchvision.models, written down."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.asked: list[tuple[str, dict[str, object]]] = []

    def is_model(self, name: str) -> bool:
        return name == "resnet18"

    def list_models(self, module: object = None) -> list[str]:
        return ["resnet18", "googlenet"]

    def create_model(self, name: str, **options: object) -> nn.Module:
        self.asked.append((name, options))
        return nn.Identity()

    get_model = create_model


def test_timm_and_torchvision_are_asked_for_their_models(monkeypatch: pytest.MonkeyPatch) -> None:
    timm, torchvision = Library("timm"), Library("torchvision.models")
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", torchvision)
    make_model("timm:resnet18.a1_in1k", 1, 10)
    make_model("timm:resnet18", 3, 10, pretrained=True)
    assert timm.asked == [
        ("resnet18.a1_in1k", {"pretrained": False, "in_chans": 1, "num_classes": 10}),
        ("resnet18", {"pretrained": True, "in_chans": 3}),
    ]
    make_model("torchvision:googlenet", 3, 10)
    make_model("torchvision:resnet18", 3, 10, pretrained=True)
    assert torchvision.asked == [
        ("googlenet", {"weights": None, "num_classes": 10, "aux_logits": False}),
        ("resnet18", {"weights": "DEFAULT"}),
    ]
    with pytest.raises(ValueError, match=r"timm:resnet81 cannot be made: it has no model .* did you mean resnet18"):
        make_model("timm:resnet81", 3, 10)
    with pytest.raises(ValueError, match=r"torchvision:resnet81 .*: it has no classifier .* did you mean resnet18"):
        make_model("torchvision:resnet81", 3, 10)
    with pytest.raises(ValueError, match="images of 3 channels, the data has 1"):
        make_model("torchvision:resnet18", 1, 10)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm:resnet18 cannot be made: timm cannot be imported"):
        make_model("timm:resnet18", 3, 10)


def test_all_networks_learn() -> None:
    """A gradient reaches every parameter."""
    for name in ("resnet8", "wrn_16_1", "MobileNetV2", "ShuffleV1", "ShuffleV2", "medium_teacher"):
        model = make_model(name, 3, 10)
        logits: Tensor = model(torch.randn(4, 3, 16, 16))
        logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), name
