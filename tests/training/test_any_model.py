"""Networks of many kinds: how their stages are found, their outputs read and their features bridged."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from checking import DEVICE
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training_tools import images, network

import kdkernels
from kdkernels.training import Distillation, FeatureTaps, Method, Outputs, fit, make_method, stage_names
from kdkernels.training.defaults import default_optimizer
from kdkernels.training.models import ConvNet


def tree(*names: str, **layers: nn.Module) -> nn.Module:
    """A model that has modules of these names; those that are not given are linear."""
    root = nn.Module()
    for name in names:
        here = root
        *outer, last = name.split(".")
        for part in outer:
            if part not in here._modules:
                here.add_module(part, nn.Module())
            here = here.get_submodule(part)
        here.add_module(last, layers.get(last) or nn.Linear(1, 1))
    return root


def conv(stride: int = 1) -> nn.Module:
    return nn.Conv2d(1, 1, 3, stride, 1)


def flat(*layers: nn.Module) -> nn.Module:
    model = nn.Module()
    model.features, model.classifier = nn.Sequential(*layers), nn.Linear(1, 1)
    return model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        # torchvision's and timm's ResNet; RegNet
        (tree("conv1", "layer1", "layer2", "layer3", "layer4", "fc"), [f"layer{i}" for i in range(1, 5)]),
        (tree("stem", "trunk_output.block1", "trunk_output.block2"), ["trunk_output.block1", "trunk_output.block2"]),
        (tree("stem", "s1", "s2", "head"), ["s1", "s2"]),  # timm's
        # layer1 inside the stages of HRNet-likes is not looked at
        (tree("stages.0.layer1", "stages.0.layer2", "stages.1.layer1", "head"), ["stages.0", "stages.1"]),
        # timm's ViT and EfficientNet; its and torchvision's ConvNeXt and Swin; transformers
        (tree("patch_embed", "blocks.0", "blocks.1", "head"), ["blocks.0", "blocks.1"]),
        (tree("conv_proj", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1", "heads"),
         ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]),
        (tree("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "classifier"),
         ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        (tree("transformer.wte", "transformer.h.0", "transformer.h.1"), ["transformer.h.0", "transformer.h.1"]),
        # VGG: in front of each pooling
        (flat(conv(), nn.ReLU(), nn.MaxPool2d(2), conv(), nn.ReLU(), nn.MaxPool2d(2)), ["features.1", "features.4"]),
        # MobileNet, EfficientNet, ConvNeXt: in front of each stride, and the last
        (flat(conv(2), conv(), nn.Sequential(conv(2), conv()), conv(), conv(2), conv()),
         ["features.1", "features.3", "features.5"]),
        # GoogLeNet: no list at all
        (tree("conv1", "pool1", "mixed", "pool2", "last", "aux2", "avgpool", "fc",
              conv1=conv(2), pool1=nn.MaxPool2d(2), mixed=conv(), pool2=nn.MaxPool2d(2), last=conv(),
              avgpool=nn.AdaptiveAvgPool2d(1)), ["conv1", "mixed", "last"]),
    ],
)  # fmt: skip
def test_stages_of_the_usual_families(model: nn.Module, expected: list[str]) -> None:
    assert stage_names(model) == expected


def test_a_transformer_that_returns_a_model_output() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 20, "num_attention_heads": 2, "intermediate_size": 8, "num_labels": 4}
    teacher, student = (
        BertForSequenceClassification(BertConfig(hidden_size=width, num_hidden_layers=layers, **sizes)).to(DEVICE)
        for width, layers in ((8, 4), (4, 2))
    )
    assert stage_names(student) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    words, y = torch.randint(20, (6, 9), device=DEVICE), torch.arange(6, device=DEVICE) % 4
    with pytest.raises(TypeError, match=r"a SequenceClassifierOutput with 'logits'.*output='logits'"):
        Distillation(teacher, student, "kd")(words, y)
    methods = ["kd", ("sp", {"weight": 1.0}), Same()]
    module = Distillation(teacher, student, methods, adapt="conv", example=words, output="logits")
    assert module._teacher_taps.names == ["bert.encoder.layer.1", "bert.encoder.layer.3"]
    result = module(words, y)
    assert result.terms.keys() == {"ce", "kd", "sp", "hint"}
    result.loss.backward()
    assert all(p.grad is not None for p in module.adapters.parameters())


def test_swin_s_merging_ends_a_stage() -> None:
    class PatchMerging(nn.Module):
        pass

    model = flat(conv(4), nn.LayerNorm(1), PatchMerging(), nn.LayerNorm(1))
    assert stage_names(model) == ["features.1", "features.3"]


def test_unknown_names_are_answered_with_close_ones() -> None:
    model = tree(*(f"encoder.layer.{i}.output.dense" for i in range(30)), "classifier")
    with pytest.raises(
        ValueError, match=r"no modules \['encoder.layers.3'\]; close to it are \[.*'encoder.layer.3'"
    ) as e:
        FeatureTaps(model, ["encoder.layers.3"])
    assert len(str(e.value)) < 300
    with pytest.raises(ValueError, match=r"it has \['encoder', 'encoder.layer', 'classifier'\]$"):
        FeatureTaps(model, ["xyz"])


class Returns(nn.Module):
    """A layer that returns what ``wrap`` makes of its features, then a head."""

    def __init__(self, wrap: Any, width: int = 5) -> None:
        super().__init__()
        self.layer1 = tree("body", body=nn.Linear(64, width))
        self.layer1.forward = lambda x: wrap(self.layer1.body(x))
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.layer1(x.flatten(1))
        return self.fc(self.layer1.body(x.flatten(1)))


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda z: (z,), "layer1"),
        (lambda z: (z, None), "layer1"),
        (lambda z: (None, 2 * z, z), "layer1[2]"),
        (lambda z: {"hidden": z, "other": -z}, "layer1[hidden]"),
        (lambda z: torch.return_types.max((z, z)), "layer1[values]"),
    ],
)
def test_modules_that_return_more_than_a_tensor_can_be_tapped(wrap: Any, name: str) -> None:
    model, (x, _) = Returns(wrap).to(DEVICE), images()
    with FeatureTaps(model, name) as taps:
        model(x)
        torch.testing.assert_close(taps.pop()[0], model.layer1.body(x.flatten(1)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer1", r"returns a tuple of \(Tensor, Tensor\): name the tensor in it, as 'layer1\[0\]'"),
        ("layer1[2]", r"returns a tuple of \(Tensor, Tensor\), of which 2 is no tensor"),
    ],
)
def test_a_part_has_to_be_named_where_there_are_several(name: str, message: str) -> None:
    model, (x, _) = Returns(lambda z: (z, z)).to(DEVICE), images()
    with FeatureTaps(model, name) as taps:
        model(x)
        with pytest.raises(TypeError, match=message):
            taps.pop()


def test_two_parts_of_one_module() -> None:
    model, (x, _) = Returns(lambda z: (z, -z)).to(DEVICE), images()
    with FeatureTaps(model, ["layer1[0]", "layer1[1]"]) as taps:
        model(x)
        a, b = taps.pop()
    torch.testing.assert_close(a, -b)


def test_layers_as_pairs() -> None:
    teacher, student, (x, y) = network(6, 7, 8), network(), images()
    module = Distillation(teacher, student, "sp", layers={"stages.0": "stages.1", "stages.1": "stages.2"}).eval()
    stages = [student.stages[:1](x), student.stages[:2](x)], [teacher.stages[:2](x), teacher.stages(x)]
    torch.testing.assert_close(module(x, y).terms["sp"], 3000 * kdkernels.sp_loss(*stages).detach())
    with pytest.raises(ValueError, match="leave out teacher_layers"):
        Distillation(teacher, student, "sp", layers={"stages.0": "stages.1"}, teacher_layers=["stages.1"])


class WithFeatures(nn.Module):
    """What RepDistiller's models do with is_feat=True."""

    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.net = network(*channels)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for stage in self.net.stages:
            features.append(x := stage(x))
        return self.net.fc(x.mean((2, 3))), features


def test_features_that_the_model_returns() -> None:
    teacher, student, (x, y) = WithFeatures(6, 7, 8), WithFeatures(3, 4, 5), images()
    module = Distillation(teacher, student, "amd", layers="returned").eval()
    expected = Distillation(teacher.net, student.net, "amd").eval()
    torch.testing.assert_close(module(x, y).terms, expected(x, y).terms)
    mixed = Distillation(network(6, 7, 8), student, "sp", layers="returned", teacher_layers="stages.2").eval()
    result = mixed(x, y)
    torch.testing.assert_close(
        result.terms["sp"], 3000 * kdkernels.sp_loss(student(x)[1][-1], mixed.teacher.stages(x)).detach()
    )
    with pytest.raises(ValueError, match="layers='returned', but the teacher returns logits alone"):
        Distillation(network(6, 7, 8), student, "sp", layers="returned")(x, y)
    swapped = Distillation(teacher, student, "kd", output=lambda out: out[0])
    assert fit(
        swapped, DataLoader(TensorDataset(x, y), 3), DataLoader(TensorDataset(x, y), 3), epochs=1, progress=False
    )


def test_of_unequally_many_stages_the_last_are_compared(caplog: pytest.LogCaptureFixture) -> None:
    x, y = images()
    teacher = ConvNet(1, 4, (6,) * 6, strides=(1, 1, 1, 1, 2, 2)).to(DEVICE)
    with caplog.at_level(logging.WARNING, logger="kdkernels"):
        module = Distillation(teacher, network(), "amd")
    assert module._teacher_taps.names == ["stages.3", "stages.4", "stages.5"]
    assert "3 and 6 stages; compared are layers={'stages.0': 'stages.3', 'stages.1': 'stages.4'" in caplog.text
    assert module(x, y).loss.isfinite()


class Same(Method):
    """FitNets' hint: it wants features of one shape."""

    stages = "all"

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Any) -> dict[str, Tensor]:
        pairs = zip(student.features, teacher.features, strict=True)
        return {"hint": sum(nn.functional.mse_loss(s, t) for s, t in pairs)}


class Transformer(nn.Module):
    """(B, 1, 8, 8) to a class token and 16 tokens of 2 x 2 pixels."""

    def __init__(self, width: int, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(nn.functional.unfold(x, 2, stride=2).transpose(1, 2))
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def test_adapters_bridge_widths_sizes_and_tokens() -> None:
    x, y = images()
    teacher, student = Transformer(6).to(DEVICE), network()
    options = {"layers": {"stages.0": "blocks.0", "stages.2": "blocks.1"}, "example": x}
    module = Distillation(teacher, student, Same(), adapt=("map", "pool", "conv"), **options).to(DEVICE)
    s, t = module.outputs(x)
    assert [f.shape for f in s.features] == [f.shape for f in t.features] == [(6, 6, 4, 4), (6, 6, 2, 2)]
    torch.testing.assert_close(s.features[0], module.adapters[0](nn.functional.avg_pool2d(student.stages[:1](x), 2)))
    module(x, y).loss.backward()
    assert all(p.grad.norm() > 0 for p in module.adapters.parameters())
    assert {name for name in module.state_dict() if name.startswith("adapters")} == {
        "adapters.0.weight",
        "adapters.1.weight",
    }
    optimizer = default_optimizer(student.parameters(), 0.1)
    with pytest.raises(ValueError, match="the optimizer misses parameters"):
        fit(module, DataLoader(TensorDataset(x, y), 3), epochs=1, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"same H and W, got .*; adapt=\['map', 'pool'\] makes maps of one size"):
        Distillation(teacher, student, "amd", layers=options["layers"], adapt="map")(x, y)
    # a method with maps of one size, whose channels are free, needs no parameters and so no example
    amd = Distillation(teacher, student, "amd", layers=options["layers"], adapt=["map", "pool"])
    assert amd(x, y).terms["amd"].isfinite()
    assert not list(amd.adapters.parameters())


def test_adapters_are_checked() -> None:
    with pytest.raises(ValueError, match="adapt must be of 'map', 'pool', 'conv', got 'mlp'"):
        Distillation(network(), network(), "sp", adapt="mlp")
    with pytest.raises(ValueError, match=r"adapt='conv' depends on the features' widths: give .*example="):
        Distillation(network(6, 7, 8), network(), "sp", adapt="conv")
    with pytest.raises(ValueError, match="method CORSD has no teacher: 'map' alone is of use to it"):
        Distillation(None, network(), "corsd", adapt=["map", "pool"])


def test_a_transformer_teaches_itself() -> None:
    torch.manual_seed(0)
    x, y = images()
    net = Transformer(6, layers=12).to(DEVICE)
    module = Distillation(None, net, "corsd", adapt="map").to(DEVICE)
    assert module._student_taps.names == ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]
    s, _ = module.outputs(x)
    assert [f.shape for f in s.features] == [(6, 6, 4, 4)] * 4
    tokens = net.embed(nn.functional.unfold(x, 2, stride=2).transpose(1, 2))
    deep = nn.Sequential(*net.blocks)(tokens)  # without the class token, which is no place of the map
    torch.testing.assert_close(s.features[3], deep.transpose(1, 2).unflatten(2, (4, 4)))
    result = module(x, y[::3], y[2::3])
    result.loss.backward()
    assert result.terms["corsd"] > 0
    assert all(p.grad is not None for p in module.method.parameters())
    assert net.blocks[0].weight.grad.norm() > 0


def test_heads_are_built_for_adapted_features() -> None:
    x, y = images()
    method = make_method("mlkd")
    module = Distillation(network(6, 7, 8), network(), method, adapt="conv", example=x)
    assert method.loss.e_s.in_features == 8
    assert module.to(DEVICE)(x, y).loss.isfinite()
