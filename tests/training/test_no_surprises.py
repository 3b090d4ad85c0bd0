"""What would go wrong without a word, and is said or refused instead."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from checking import DEVICE
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from training_tools import images, loaders, make, network

from kdkernels.training import Distillation, Method, fit, make_method
from kdkernels.training.defaults import default_optimizer
from kdkernels.training.evaluation import evaluate
from kdkernels.training.models import BasicBlock, ConvNet, small_student
from kdkernels.training.triplets import TripletDataset, collate_triplets, triplet_loader


class Labelled(Dataset[tuple[Tensor, int]]):
    """A data set that is no TensorDataset and has no ``targets``."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.full((1, 8, 8), float(i)), i % 4


def test_corsd_refuses_batches_that_are_no_triplets() -> None:
    x, y = images()
    module = Distillation(None, network(), "corsd", example=x)
    with pytest.raises(ValueError, match=r"CORSD trains on triplets .*triplet_loader"):
        module(x, y)
    assert set(module.eval()(x, y).terms) == {"ce"}


def test_fit_makes_the_triplets_of_corsd() -> None:
    module = Distillation(None, network(), "corsd")
    (row,) = fit(module, DataLoader(Labelled(), 12, shuffle=True), epochs=1, progress=False)
    assert row["corsd"] > 0
    assert row["step"] == 6  # of 4 triplets each
    stream = DataLoader(Labelled(), batch_sampler=[[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="batches of triplets yourself"):
        fit(Distillation(None, network(), "corsd"), stream, epochs=1)


def test_triplets_keep_the_loaders_order_and_a_triplet_loader_stays() -> None:
    dataset = Subset(Labelled(), range(3, 22))
    drawn = triplet_loader(DataLoader(dataset, 9))
    batches = list(drawn)
    assert [len(target) for _, target, _ in batches] == [3] * 6  # of 19, the last one would be alone
    assert [int(x) for x in batches[0][0][::3, 0, 0, 0]] == [3, 4, 5]
    assert torch.cat([target for _, target, _ in batches]).tolist() == [i % 4 for i in range(3, 21)]
    assert triplet_loader(drawn) is drawn
    own = DataLoader(dataset, 9, collate_fn=list)
    assert triplet_loader(own) is own
    tensors = TensorDataset(*images(8))
    assert TripletDataset(tensors).labels == TripletDataset(Subset(tensors, range(8))).labels == [0, 1, 2, 3] * 2
    assert collate_triplets([TripletDataset(tensors)[0]])[0].shape == (3, 1, 8, 8)


@pytest.mark.parametrize("method", ["corsd", "alone"])
def test_a_teacher_that_would_be_ignored_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="learns from no teacher, and would ignore this one: give None"):
        Distillation(network(), network(), method)


class Tokens(nn.Module):
    """(B, 1, 8, 8) to (B, 16, width) tokens of 2 x 2 pixels, and logits of their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1, self.fc = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(x.reshape(len(x), 16, 4)).mean(1))


@pytest.mark.parametrize("with_example", [False, True])
def test_mlkd_averages_tokens_over_the_tokens(with_example: bool) -> None:
    x, y = images()
    student, teacher = Tokens(5).to(DEVICE), Tokens(7).to(DEVICE)
    method = make_method("mlkd", layout="nlc")
    module = Distillation(teacher, student, method, example=x[:2] if with_example else None).to(DEVICE)
    assert (method.loss.e_s.in_features, method.loss.e_t.in_features) == (5, 7)
    seen: list[Tensor] = []
    method.loss.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[:2]))
    batch = module.batch(x, y)
    module.loss(*module.outputs(batch.images), batch)
    for model, pooled in zip((student, teacher), seen, strict=True):
        torch.testing.assert_close(pooled, model.layer1(batch.images.reshape(-1, 16, 4)).mean(1))


def test_mlkd_guesses_no_axes() -> None:
    x, y = images()
    with pytest.raises(ValueError, match=r"\(2, 16, 5\) holds the channels is not clear: layout='nlc' \(tokens\)"):
        Distillation(Tokens(7).to(DEVICE), Tokens(5).to(DEVICE), "mlkd", example=x[:2])
    with pytest.raises(ValueError, match="layout='nlc'"):
        Distillation(Tokens(7).to(DEVICE), Tokens(5).to(DEVICE), "mlkd")(x, y)
    with pytest.raises(ValueError, match=r"layout='nlc' has 3 axes, and the features are \(24, 5, 2, 2\)"):
        Distillation(network(), network(), make_method("mlkd", layout="nlc")).to(DEVICE)(x, y)
    with pytest.raises(ValueError, match="'nchw', 'nhwc', 'nlc', 'ncl', got 'bchw'"):
        make_method("mlkd", layout="bchw")
    pair = make_method("mlkd", layout=("nchw", "nlc"))
    options = {"layers": "stages.2", "teacher_layers": "layer1"}
    assert Distillation(Tokens(7), network(), pair, **options).to(DEVICE)(x, y).loss.isfinite()


def test_maps_with_channels_last_are_not_guessed_to_be_channels_first() -> None:
    class Swapped(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).permute(0, 2, 3, 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1, self.fc = Swapped(1, 5, 2, 2), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.layer1(x).mean((1, 2)))

    x, _ = images()
    net = Net().to(DEVICE)
    with pytest.raises(ValueError, match=r"\(6, 4, 4, 5\).*'nchw' or 'nhwc'"):
        Distillation(network(), net, "mlkd", layers="layer1", teacher_layers="stages.2", example=x)
    method = make_method("mlkd", layout=("nhwc", "nchw"))
    Distillation(network(), net, method, layers="layer1", teacher_layers="stages.2", example=x)
    assert method.loss.e_s.in_features == 5


@pytest.mark.parametrize("method", ["mlkd", "corsd"])
@pytest.mark.parametrize("with_example", [False, True])
def test_float64_networks_get_float64_heads(method: str, with_example: bool) -> None:
    x, y = images()
    x = x.double()
    teacher = None if method == "corsd" else network(6, 7, 8)  # float32, and its images too
    if teacher is not None:
        teacher.register_forward_pre_hook(lambda module, inputs: inputs[0].float())
    module = Distillation(teacher, network().double(), method, example=x if with_example else None)
    result = module(x, y[:2], y[1:3]) if method == "corsd" else module(x, y)
    assert result.loss.dtype == torch.float64
    result.loss.backward()


def share(method: str | Method, size: int) -> float:
    """The gradient of the method's own term over that of cross entropy, at the start of a ResNet's training."""
    torch.manual_seed(0)
    teacher, student = (ConvNet(3, 100, widths, BasicBlock, (1, 2, 2, 2)) for widths in ((16,) * 4, (8,) * 4))
    x, y = torch.randn(8, 3, size, size), torch.randint(100, (8,))
    module = Distillation(teacher, student, method)
    outputs = module.outputs(x)
    terms = module.method.terms(*outputs, module.batch(x, y))
    parameters = list(student.stages.parameters())
    norms = []
    for loss in (terms["amd"], F.cross_entropy(outputs[0].logits, y)):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
    return norms[0] / norms[1]


@pytest.mark.parametrize("size", [16, 32])  # stages of 16 x 16 to 2 x 2, and of 32 x 32 to 4 x 4
def test_amd_as_it_comes_leaves_room_for_cross_entropy(size: int) -> None:
    assert 0.1 < share("amd", size) < 10
    assert share(make_method("amd", weight=3000.0, layer_weights=None), size) > 30  # so this test can fail


def test_a_term_that_drowns_the_others_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    train, _ = loaders(192)  # 6 steps
    with caplog.at_level(logging.WARNING, logger="kdkernels"):
        module = Distillation(small_student(1, 10), small_student(1, 10), make_method("sp", weight=1e5))
        fit(module, train, epochs=2, progress=False)
        fit(make("kd"), train, epochs=1, progress=False)
        weights = {"correlation_weight": 1e5, "warmup": 0.5}
        module = Distillation(small_student(1, 10), small_student(1, 10), make_method("mlkd", **weights))
        fit(module, train, epochs=2, lr=1e-9, progress=False)
    first, second = [r.getMessage() for r in caplog.records if "hardly count" in r.getMessage()]
    assert first.startswith("in step 4 'sp' is ")  # the first at its weight, after a fifth of 12
    assert first.endswith("it is scaled by weight= of SP")
    assert second.startswith("in step 7 'mlkd' is ")


@pytest.mark.parametrize("method", ["mlkd", "corsd"])
def test_an_optimizer_without_the_heads_is_refused(method: str) -> None:
    module = Distillation(None if method == "corsd" else network(), network(), method)
    loader = DataLoader(TensorDataset(*images(12)), 6)
    with pytest.raises(ValueError, match=r"misses parameters of \w+'s own heads \(loss\..* and \d+ more\): .*distil"):
        fit(module, loader, epochs=1, optimizer=default_optimizer(module.student.parameters(), 0.1))
    with pytest.raises(ValueError, match="none of the student's parameters"):
        fit(module, loader, epochs=1, optimizer=default_optimizer(module.method.parameters(), 0.1))
    head = torch.optim.SGD([*module.student.fc.parameters(), *module.method.parameters()], 0.1)
    assert fit(module, loader, epochs=1, optimizer=head, progress=False)  # a part of the student may be meant


@pytest.mark.parametrize("lr", [-1.0, 0.0, math.nan, math.inf])
def test_a_learning_rate_that_trains_nothing_is_refused(lr: float) -> None:
    with pytest.raises(ValueError, match="lr must be positive and finite"):
        fit(make(), *loaders(), epochs=1, lr=lr)


def test_batches_that_are_dicts_are_told_what_to_do() -> None:
    rows = [{"image": x, "label": i} for i, x in enumerate(images(4)[0].cpu())]
    with pytest.raises(TypeError, match=r"train_loader: .*got a dict with 'image', 'label': give .*collate_fn"):
        fit(make(), DataLoader(rows, 2), epochs=1, progress=False)
    with pytest.raises(TypeError, match=r"test_loader: .*got \(Tensor, str\)"):
        evaluate(network(), [(torch.zeros(2, 1, 8, 8), "label")])


class Logits(NamedTuple):
    logits: Tensor
    aux_logits: Tensor | None


class Returns(nn.Module):
    """A network whose output is what ``wrap`` makes of its logits."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.net, self.wrap = network(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.net(x))


@pytest.mark.parametrize(
    ("wrap", "message", "output"),
    [
        (lambda z: {"logits": z, "loss": None}, r"a dict with 'logits', 'loss', .*output='logits'", "logits"),
        (lambda z: Logits(z, None), r"a Logits with 'logits', 'aux_logits', .*output='logits'", "logits"),
        (lambda z: OrderedDict(scores=z), r"a OrderedDict with 'scores', .*output=, a name", "scores"),
        (lambda z: (z, z), r"a tuple of \(Tensor, Tensor\)", 0),
        (lambda z: [z], r"a list of \(Tensor\)", lambda z: z[0]),
    ],
)
def test_outputs_that_are_no_tensor_are_told_what_to_do(wrap: Any, message: str, output: Any) -> None:
    x, y = images()
    teacher = network(6, 7, 8)
    student = Returns(wrap)
    with pytest.raises(TypeError, match=f"the student returns {message}"):
        Distillation(teacher, student, "kd")(x, y)
    module = Distillation(teacher, student, "kd", output=output, teacher_output=lambda z: z)
    torch.testing.assert_close(module.eval()(x, y).logits, student.net(x))
    (row,) = fit(module, DataLoader(TensorDataset(x, y), 3), DataLoader(TensorDataset(x, y), 3), epochs=1, lr=1e-9)
    assert row["test_accuracy"] == pytest.approx(100 * (student.net.eval()(x).argmax(1) == y).float().mean().item())


def test_an_output_that_is_not_there_is_told() -> None:
    x, y = images()
    with pytest.raises(ValueError, match="output='logit': the teacher returns a dict with 'logits'"):
        Distillation(Returns(lambda z: {"logits": z}), network(), "kd", output="logit")(x, y)
    # a name is for models that need it: a tensor is taken as it is
    assert Distillation(network(), network(), "kd", output="logits")(x, y).loss.isfinite()
