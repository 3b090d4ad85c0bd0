"""Features by forward hooks: their graph, wrappers, copies, and nothing left behind."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checking import DEVICE
from torch import Tensor, nn
from training_tools import hooks, images, network

from kdkernels.training import (
    Distillation,
    FeatureTaps,
    stage_names,
)


def test_taps_give_the_modules_outputs_with_their_graph() -> None:
    model, (x, _) = network(), images()
    with FeatureTaps(model, ["stages.1", "stages.2"]) as taps:
        logits = model(x)
        features = taps.pop()
        torch.testing.assert_close(features[1], model.stages(x))
        torch.testing.assert_close(model.stages[2](features[0]), features[1])
        torch.testing.assert_close(model.fc(features[1].mean((2, 3))), logits)
        features[0].sum().backward()
        assert model.stages[0][0].weight.grad is not None
    assert hooks(model) == 0


def test_taps_forget_and_say_what_is_missing() -> None:
    model, (x, _) = network(), images()
    taps = FeatureTaps(model, ["stages.0"])
    with pytest.raises(RuntimeError, match=r"no features from \['stages.0'\]"):
        taps.pop()
    model(x)
    assert len(taps.pop()) == 1
    with pytest.raises(RuntimeError, match="no features"):
        taps.pop()
    taps.remove()
    assert hooks(model) == 0
    with pytest.raises(ValueError, match=r"no modules \['layer9'\]; it has .*'stages.0'"):
        FeatureTaps(model, ["layer9"])
    with pytest.raises(ValueError, match="named twice"):
        FeatureTaps(model, ["fc", "fc"])


def test_taps_take_the_only_tensor_of_a_tuple() -> None:
    lstm = nn.Sequential(nn.LSTM(3, 4)).to(DEVICE)
    with FeatureTaps(lstm, ["0"]) as taps:
        out, _ = lstm(torch.randn(2, 3, device=DEVICE))
        assert torch.equal(taps.pop()[0], out)


def test_taps_work_on_a_compiled_model() -> None:
    torch._dynamo.reset()
    model, (x, _) = network(), images()
    expected = model.stages[:2](x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with FeatureTaps(compiled, ["stages.1"]) as taps:
        compiled(x).sum().backward()
        torch.testing.assert_close(taps.pop()[0], expected, rtol=1e-4, atol=1e-5)
    assert hooks(model) == 0


def test_taps_work_under_distributed_data_parallel(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, (x, _) = network(), images()
        expected = model.stages(x)
        wrapped = nn.parallel.DistributedDataParallel(model)
        with FeatureTaps(wrapped, ["stages.2"]) as taps:
            wrapped(x)
            torch.testing.assert_close(taps.pop()[0], expected)
    finally:
        dist.destroy_process_group()


class Skipping(nn.Module):
    """Leaves layer2 out where asked to, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2, self.skip = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(x)
        return (x if self.skip else self.layer2(x)).mean((2, 3))


def test_taps_do_not_show_features_of_an_earlier_pass() -> None:
    model, (x, _) = Skipping().to(DEVICE), images()
    with FeatureTaps(model, ["layer2"]) as taps:
        model(x)
        model.skip = True
        model(x)
        with pytest.raises(RuntimeError, match="no features from"):
            taps.pop()
    assert hooks(model) == 0


def test_copies_of_a_tapped_model_keep_to_themselves() -> None:
    model, (x, y) = network(), images()
    taps = FeatureTaps(model, ["stages.2"])
    model(x)  # features with a graph are there while it is copied
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    taps.pop()
    twin(x)
    with pytest.raises(RuntimeError, match="no features"):
        taps.pop()
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False).fc.weight, model.fc.weight)
    module = Distillation(network(6, 7, 8), model, "sp").eval()
    other = copy.deepcopy(module)
    torch.testing.assert_close(other(x, y).loss, module(x, y).loss)
    assert other._student_taps._features is not module._student_taps._features
    other.close()
    assert hooks(other._teacher[0]) == 0
    assert hooks(module._teacher[0]) == 2


def test_a_shared_module_has_two_names() -> None:
    model = nn.Sequential()
    for name, layer in {"a": nn.Linear(3, 3), "act": nn.Tanh()}.items():
        model.add_module(name, layer)
    model.add_module("b", model.a)
    with FeatureTaps(model.to(DEVICE), "b") as taps:
        out = model(torch.randn(2, 3, device=DEVICE))
        torch.testing.assert_close(taps.pop()[0], out)


def test_stage_names() -> None:
    assert stage_names(network()) == ["stages.0", "stages.1", "stages.2"]
    resnet = nn.ModuleDict({name: nn.Linear(1, 1) for name in ("conv1", "layer1", "layer2", "fc")})
    assert stage_names(resnet) == ["layer1", "layer2"]
    with pytest.raises(ValueError, match="name the layers"):
        stage_names(nn.Linear(2, 2))
