"""The thin trainer: taps, Distillation, methods, the loop, the command line."""

from __future__ import annotations

import copy
import csv
import io
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from checking import DEVICE, backends_under_test
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import kdkernels
from kdkernels import cli
from kdkernels.training import (
    Batch,
    Distillation,
    FeatureTaps,
    Method,
    Outputs,
    data,
    fit,
    make_method,
    stage_names,
)
from kdkernels.training.demo import loss_time, run_demo
from kdkernels.training.exact import exact_step
from kdkernels.training.loop import evaluate, make_accelerator
from kdkernels.training.models import ConvNet, small_student, small_teacher


def network(*channels: int) -> ConvNet:
    return ConvNet(1, 4, channels or (3, 4, 5)).to(DEVICE)


def images(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 8, 8, device=DEVICE), torch.arange(n, device=DEVICE) % 4


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- taps


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


def test_taps_refuse_modules_that_return_something_else() -> None:
    lstm = nn.Sequential(nn.LSTM(3, 4)).to(DEVICE)
    taps = FeatureTaps(lstm, ["0"])
    lstm(torch.randn(2, 3, device=DEVICE))
    with pytest.raises(TypeError, match="'0' returns a tuple"):
        taps.pop()


def test_taps_work_on_a_compiled_model() -> None:
    torch._dynamo.reset()
    model, (x, _) = network(), images()
    expected = model.stages[:2](x)
    compiled = torch.compile(model, fullgraph=True)
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


# ---- Distillation


@pytest.mark.parametrize("method", ["alone", "kd", "sp", "stkd", "amd"])
def test_distillation_is_the_sum_of_the_methods_terms(method: str) -> None:
    teacher, student, (x, y) = network(6, 7, 8), network(), images()
    module = Distillation(teacher, student, method).eval()  # eval: nothing is mixed
    result = module(x, y)
    with torch.no_grad():
        z_s, z_t, f_s, f_t = student(x), teacher(x), student.stages(x), teacher.stages(x)
        ce = F.cross_entropy(z_s, y)
        kd = kdkernels.kd_loss(z_s, z_t)
        stages_s, stages_t = ([m.stages[: i + 1](x) for i in range(3)] for m in (student, teacher))
        expected = {
            "alone": ce,
            "kd": 0.1 * ce + 0.9 * kd,
            "sp": ce + 3000 * kdkernels.sp_loss(f_s, f_t),
            "stkd": 0.1 * ce + 0.9 * kd,
            "amd": 0.1 * ce + 0.9 * kd + 3000 * kdkernels.amd_loss(stages_s, stages_t),
        }[method]
    torch.testing.assert_close(result.loss.detach(), expected)
    torch.testing.assert_close(sum(result.terms.values()), expected)
    torch.testing.assert_close(result.logits, z_s)
    result.loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    module.close()
    assert hooks(student) == hooks(teacher) == 0


def test_the_teacher_stays_out_of_the_way() -> None:
    teacher, student = network(6, 7, 8), network()
    module = Distillation(teacher, student, "kd")
    module.train()
    assert student.training
    assert not teacher.training
    assert set(module.state_dict()) == {f"student.{name}" for name in student.state_dict()}
    assert len(list(module.parameters())) == len(list(student.parameters()))
    before = teacher.stages[0][1].running_mean.clone()
    module(*images())
    assert torch.equal(teacher.stages[0][1].running_mean, before)
    module.double()
    assert teacher.fc.weight.dtype == torch.float64


def test_stkd_trains_on_mixed_images_and_both_networks_see_them() -> None:
    seen: list[Tensor] = []
    teacher, student = network(6, 7, 8), network()
    for model in (teacher, student):
        model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, y = images()
    Distillation(teacher, student, "stkd").train()(x, y)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], x)


def test_layers_can_be_named() -> None:
    teacher, student, (x, y) = network(6, 7, 8), network(), images()
    module = Distillation(teacher, student, "sp", layers=["stages.0"], teacher_layers=["stages.1"]).eval()
    expected = 3000 * kdkernels.sp_loss(student.stages[:1](x), teacher.stages[:2](x))
    torch.testing.assert_close(module(x, y).terms["sp"], expected.detach())
    with pytest.raises(ValueError, match="as many teacher as student layers"):
        Distillation(teacher, student, "sp", layers=["stages.0"], teacher_layers=["stages.0", "stages.1"])


def test_one_layer_can_be_named_by_a_string() -> None:
    module = Distillation(network(6, 7, 8), network(), "sp", layers="stages.1")
    assert module._student_taps.names == module._teacher_taps.names == ["stages.1"]


def test_a_distillation_that_fails_leaves_no_hooks() -> None:
    teacher, student = network(6, 7, 8), network()
    with pytest.raises(ValueError, match="no modules"):
        Distillation(teacher, student, "sp", layers=["stages.2"], teacher_layers=["nope"])
    with pytest.raises(ValueError, match="cannot be read off"):
        Distillation(teacher, student, "mlkd", layers=["stages.2.2"])
    with pytest.raises(ValueError, match="as many teacher as student"):
        Distillation(teacher, student, "sp", teacher_layers=[])
    with pytest.raises(ValueError, match="same module"):
        Distillation(torch.compile(student), student, "kd")
    assert hooks(student) == hooks(teacher) == 0


class HeadFirst(nn.Module):
    """Its last layer is not registered last, and its stage returns more channels than its last layer."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.conv(x)], 1)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.layer1, self.layer2, self.layer3 = self.Dense(), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def test_logits_width_read_wrongly_is_told() -> None:
    x, y = images()
    layers = ["layer2", "layer3"]
    with pytest.raises(ValueError, match=r"\(\[8, 8, 8\], \[\]\), but they are \(\[8, 8, 4\], \[\]\).*example="):
        Distillation(None, HeadFirst(), "corsd", layers=layers).to(DEVICE)(x, y[:2], y[1:3])
    module = Distillation(None, HeadFirst().to(DEVICE), "corsd", layers=layers, example=x)
    assert module(x, y[:2], y[1:3]).loss.isfinite()


def test_features_width_read_wrongly_is_told() -> None:
    x, y = images()
    options = {"layers": "layer1", "teacher_layers": "stages.2"}
    with pytest.raises(ValueError, match=r"\(\[3\], \[5\]\), but they are \(\[4\], \[5\]\).*example="):
        Distillation(network(), HeadFirst(), "mlkd", **options).to(DEVICE)(x, y)
    assert Distillation(network(), HeadFirst().to(DEVICE), "mlkd", example=x, **options)(x, y).loss.isfinite()
    # mlkd's heads do not depend on the logits, so theirs may be read wrongly
    Distillation(network(), HeadFirst(), "mlkd", layers="layer2", teacher_layers="stages.2").to(DEVICE)(x, y)


def test_a_methods_heads_belong_to_one_distillation() -> None:
    method = make_method("mlkd")
    Distillation(network(), network(), method)
    with pytest.raises(ValueError, match="MLKD has heads for another Distillation already"):
        Distillation(network(), network(), method)


def test_submodules_keep_their_modes() -> None:
    student, (x, y) = network(), images()
    student.stages[0].eval()
    modes = [module.training for module in student.modules()]
    Distillation(network(), student, "mlkd", example=x)
    assert [module.training for module in student.modules()] == modes
    evaluate(student, DataLoader(TensorDataset(x, y)))
    assert [module.training for module in student.modules()] == modes


def test_float64_stays() -> None:
    x, y = images()
    module = Distillation(network().double(), network().double(), "kd")
    assert module(x.double(), y).loss.dtype == torch.float64


def test_bad_methods_are_named() -> None:
    with pytest.raises(ValueError, match=r"'alone', 'kd', 'sp', 'stkd', 'amd', 'mlkd', 'corsd', got 'rkd'"):
        Distillation(network(), network(), "rkd")
    with pytest.raises(ValueError, match="SP needs a teacher"):
        Distillation(None, network(), "sp")


def test_a_method_of_ones_own_trains_its_own_parameters() -> None:
    class Projected(Method):
        stages = "last"

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(5, 8, 1)

        def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
            return {"hint": F.mse_loss(self.head(student.features[0]), teacher.features[0])}

    module = Distillation(network(6, 7, 8), network(), Projected().to(DEVICE))
    module(*images()).loss.backward()
    assert module.method.head.weight.grad.norm() > 0
    assert any(p is module.method.head.weight for p in module.parameters())


# ---- the loop


def loaders(n: int = 96) -> tuple[DataLoader, DataLoader]:
    split = data.digits()
    small = TensorDataset(*(x[:n] for x in split.train.tensors))
    return data.loader(small, 32, train=True), data.loader(split.test, 500, train=False)


def make(method: str = "kd", seed: int = 0) -> Distillation:
    torch.manual_seed(seed)
    return Distillation(small_teacher(1, 10), small_student(1, 10), method)


def test_fit_writes_metrics_and_checkpoints(tmp_path: Path) -> None:
    module = make()
    train, test = loaders()
    history = fit(module, train, test, epochs=4, eval_every=2, output=tmp_path, progress=False)
    assert [row["step"] for row in history] == [3, 6, 9, 12]
    assert ["test_accuracy" in row for row in history] == [False, True, False, True]
    assert all(math.isclose(row["loss"], row["ce"] + row["kd"], rel_tol=1e-5) for row in history)
    assert history[-1]["loss"] < history[0]["loss"]
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in history]
    last = small_student(1, 10)
    load_model(last, str(tmp_path / "last.safetensors"))
    for name, value in last.state_dict().items():
        assert torch.equal(value, module.student.state_dict()[name].cpu()), name
    best = small_student(1, 10)
    load_model(best, str(tmp_path / "best.safetensors"))
    assert evaluate(best.to(DEVICE), test) == pytest.approx(max(row.get("test_accuracy", 0) for row in history))


def test_fit_learns_and_repeats_under_a_seed() -> None:
    runs = []
    for _ in range(2):
        module = make("alone")
        train, test = loaders(960)
        history = fit(module, train, test, epochs=3, seed=5, progress=False)
        runs.append([(row["loss"], row.get("test_accuracy")) for row in history])
    assert runs[0] == runs[1]
    assert runs[0][-1][1] > 75


def test_fit_accumulates_micro_batches() -> None:
    weights = []
    for accumulate, batch in ((1, 64), (2, 32)):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # no batch norm: it would see the micro-batches
        module = Distillation(None, student, "alone")
        dataset = TensorDataset(*(x[:64] for x in data.digits().train.tensors))
        fit(module, DataLoader(dataset, batch), epochs=2, accumulate=accumulate, progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in module.student.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def recorded_steps(method: str, batches: int, interrupt_at: int | None = None, **options: object) -> list[Tensor]:
    """The gradient of every optimizer step of an epoch with accumulate=4 over equal batches."""
    gradients: list[Tensor] = []

    class Recorder(torch.optim.SGD):
        def step(self, *args: object, **kwargs: object) -> None:
            gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))

    teacher, student = plain(8, 1).float(), plain(6, 2).float()
    calls: list[int] = []

    def count(*_: object) -> None:
        calls.append(1)
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt

    student.register_forward_pre_hook(count)
    torch.manual_seed(0)
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    loader = DataLoader(TensorDataset(x.repeat(batches, 1, 1, 1), y.repeat(batches)), 4)
    module = Distillation(teacher, student, method)
    fit(module, loader, epochs=1, optimizer=Recorder(student.parameters()), accumulate=4, progress=False, **options)
    return gradients


def test_a_partial_accumulation_window_weighs_as_much_as_a_whole_one() -> None:
    whole, partial = recorded_steps("kd", 5)
    torch.testing.assert_close(whole, partial)


@pytest.mark.parametrize("method", ["kd", "sp"])
def test_a_run_after_an_interrupted_one_steps_as_ever(method: str) -> None:
    expected = recorded_steps(method, 8)
    accelerator = make_accelerator("no", 4)
    with pytest.raises(KeyboardInterrupt):
        recorded_steps("kd", 8, interrupt_at=2, accelerator=accelerator)
    gradients = recorded_steps(method, 8, accelerator=accelerator)
    assert len(gradients) == 2
    torch.testing.assert_close(gradients, expected)


def test_evaluate_leaves_accumulation_alone() -> None:
    accelerator = make_accelerator("no", 4)
    evaluate(network(), DataLoader(TensorDataset(*images())))
    assert accelerator.gradient_accumulation_steps == 4


def test_checkpoints_of_a_compiled_student_load_into_a_plain_one(tmp_path: Path) -> None:
    student = torch.compile(small_student(1, 10), backend="eager")
    fit(Distillation(None, student, "alone"), loaders()[0], epochs=1, output=tmp_path, progress=False)
    load_model(small_student(1, 10), str(tmp_path / "last.safetensors"))


@pytest.mark.parametrize("name", ["epochs", "eval_every", "accumulate"])
def test_fit_names_numbers_below_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        fit(make(), *loaders(), **({"epochs": 1} | {name: 0}))


def test_fit_wants_loaders_with_batches() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[tuple[Tensor, int]]:
            yield torch.zeros(1, 8, 8), 0

    train, _ = loaders()
    empty = DataLoader(TensorDataset(*images(0)))
    with pytest.raises(ValueError, match="test_loader has no batches"):
        fit(make(), train, empty, epochs=1)
    with pytest.raises(ValueError, match="no images"):
        evaluate(network(), empty)
    with pytest.raises(TypeError, match="train_loader must have a length"):
        fit(make(), DataLoader(Stream()), epochs=1)


def test_weights_out_of_range_are_refused() -> None:
    for method, options in (
        ("kd", {"weight": 3.0}),
        ("kd", {"weight": -0.1}),
        ("sp", {"weight": math.nan}),
        ("amd", {"weight": -1.0}),
        ("amd", {"kd_weight": 1.5}),
        ("stkd", {"ce_weight": -1.0}),
        ("mlkd", {"weights": (1.0, -1.0, 1.0)}),
    ):
        with pytest.raises(ValueError, match=rf"{method.upper()}: {next(iter(options))} must be .*, got"):
            make_method(method, **options)


def test_fit_stops_at_a_loss_that_is_not_a_number() -> None:
    train, _ = loaders()
    module = make("alone")
    with torch.no_grad():
        module.student.fc.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="epoch 1 is nan"):
        fit(module, train, epochs=2, progress=False)


def test_bf16_training_runs_on_fp32_losses() -> None:
    train, test = loaders()
    history = fit(make("sp"), train, test, epochs=2, mixed_precision="bf16", progress=False)
    assert all(math.isfinite(row["loss"]) for row in history)


# ---- data, the command line, the demo


def test_digits_are_standardised_and_always_the_same() -> None:
    split = data.digits()
    x = split.train.tensors[0]
    assert x.shape == (1000, 1, 8, 8)
    assert len(split.test) == 797
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(x, data.digits().train.tensors[0])
    subset = data.labelled_subset(split.train, 7, seed=1)
    assert torch.bincount(subset.tensors[1]).tolist() == [7] * 10
    with pytest.raises(ValueError, match="1000 were asked for"):
        data.labelled_subset(split.train, 1000, seed=0)


def saved(path: Path, **arrays: object) -> str:
    """An .npz file of nine small images and labels, some of its arrays others."""
    x, y = np.random.default_rng(0).random((9, 5, 6)), np.arange(9) % 3
    np.savez(path, **({"x_train": x, "y_train": y, "x_test": x[:3], "y_test": y[:3]} | arrays))
    return str(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_train": np.eye(9)}, r"y_train must hold one label per image, got shape \(9, 9\)"),
        ({"y_train": np.arange(9) + 0.5}, "y_train must hold whole numbers"),
        ({"y_train": np.arange(9) * 1j}, "y_train must hold whole numbers"),
        ({"y_train": np.full(9, np.nan)}, "y_train must hold whole numbers"),
        ({"y_train": np.array(list("abcabcabc"))}, "y_train must hold whole numbers"),
        ({"y_test": np.array([-1, 0, 1])}, "y_test must hold whole numbers"),
        ({"x_train": np.full((9, 5, 6), np.nan)}, "x_train has NaN"),
        ({"x_test": np.full((3, 5, 6), np.inf)}, "x_test has NaN or infinite"),
        ({"x_train": np.ones((9, 5, 6))}, "x_train has 9 images, all pixels the same"),
        ({"x_train": np.ones((0, 5, 6)), "y_train": np.arange(0)}, "x_train has 0 images"),
        ({"x_test": np.ones((3, 3, 5, 6))}, "have 1 channels, those of x_test 3"),
    ],
)
def test_bad_data_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(saved(tmp_path / "bad.npz", **arrays))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((9, 1, 4, 4), (1, 4, 4)), ((9, 1, 9, 2), (1, 9, 2)), ((9, 4, 4, 3), (3, 4, 4)), ((9, 4, 4, 1), (1, 4, 4))],
)
def test_one_channel_may_come_first_in_small_images(
    tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    x = np.random.default_rng(0).random(shape)
    split = data.load(saved(tmp_path / "set.npz", x_train=x, x_test=x[:3], y_train=np.arange(9.0)[:, None] % 3))
    assert split.train.tensors[0].shape[1:] == expected
    assert split.train.tensors[1].tolist() == [0, 1, 2] * 3


def test_no_batch_of_a_single_triplet() -> None:
    subset = data.labelled_subset(data.digits().train, 1, seed=0)  # 10 images, in batches of 3 triplets
    assert [len(batch[1]) for batch in data.loader(subset, 11, train=True, triplets=True)] == [3, 3, 3]


@pytest.mark.parametrize("shape", [(20, 5, 6), (20, 5, 6, 3), (20, 3, 5, 6)])
def test_npz_files(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x, y = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8), np.arange(20) % 4
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    split = data.load(str(tmp_path / "set.npz"))
    assert split.train.tensors[0].shape == (20, 1 if len(shape) == 3 else 3, 5, 6)
    assert split.classes == 4
    np.savez(tmp_path / "bad.npz", x_train=x)
    with pytest.raises(ValueError, match="lacks"):
        data.load(str(tmp_path / "bad.npz"))
    with pytest.raises(ValueError, match="'imagenet'"):
        data.load("imagenet")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "set.npz").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"whole \.npz file, got .*cut"):
        data.load(str(tmp_path / "cut.npz"))


def test_train_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["train", "--epochs", "2", "--teacher-epochs", "1", "--per-class", "10"]
    assert cli.main([*common, "--method", "sp", "--weight", "300", "--output", str(tmp_path / "a")]) == 0
    assert "sp: " in capsys.readouterr().out
    teacher = tmp_path / "a" / "teacher" / "last.safetensors"
    assert (tmp_path / "a" / "metrics.csv").is_file()
    assert cli.main([*common, "--method", "amd", "--teacher", str(teacher), "--output", str(tmp_path / "b")]) == 0
    assert cli.main([*common, "--method", "nothing"]) == 2
    assert "'alone', 'kd'" in capsys.readouterr().err
    assert cli.main([*common, "--teacher", "missing.safetensors"]) == 2


def test_the_command_line_fails_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(*options: str, method: str = "kd") -> str:
        assert (
            cli.main(["train", "--method", method, "--epochs", "1", "--output", str(tmp_path / "out"), *options]) == 2
        )
        (line,) = capsys.readouterr().err.splitlines()
        return line

    file = tmp_path / "file"
    file.write_text("text")
    assert str(file) in message("--output", str(file), method="alone")
    assert "holds no teacher" in message("--teacher", str(file))
    student = tmp_path / "student.safetensors"
    save_model(small_student(1, 10), str(student))
    assert "holds no teacher" in message("--teacher", str(student))
    assert "weight must be in [0, 1]" in message("--weight", "3")
    teacher = tmp_path / "teacher.safetensors"
    save_model(small_teacher(1, 10), str(teacher))
    unavailable = mock.Mock(side_effect=kdkernels.BackendError("no such kernels"))
    monkeypatch.setattr("kdkernels.training.methods.kd.kd_loss", unavailable)
    assert message("--teacher", str(teacher)) == "kdkernels train: no such kernels"
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--epochs", "abc"])
    assert "must be a whole number, 1 or more, got 'abc'" in capsys.readouterr().err


def test_a_teacher_trained_first_does_not_change_the_students_accumulation(tmp_path: Path) -> None:
    options = ["--accumulate", "4", "--mixed-precision", "bf16", "--epochs", "1", "--teacher-epochs", "1"]
    assert cli.main(["train", *options, "--output", str(tmp_path)]) == 0
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["8"]  # 31 batches of 32
    assert AcceleratorState().mixed_precision == "bf16"


def test_demo_tables_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.training import demo

    monkeypatch.setattr(demo, "STUDENT_EPOCHS", 2)
    monkeypatch.setattr(demo, "TEACHER_EPOCHS", 1)
    few = {name: demo.DEMO_METHODS[name] for name in ("alone", "stkd", "corsd")}
    monkeypatch.setattr(demo, "DEMO_METHODS", few)
    results = run_demo(tmp_path, seeds=2)
    assert [result.name for result in results] == list(demo.DEMO_METHODS)
    for result in results:
        assert len(result.accuracies) == 2
        assert all(0 < accuracy < 100 for accuracy in result.accuracies)
        assert result.loss_ms > 0
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "stkd-1" / "last.safetensors").is_file()
    mean, error = demo.gain(results[1], results[0])
    by_hand = [b - a for a, b in zip(results[0].accuracies, results[1].accuracies, strict=True)]
    assert mean == pytest.approx(sum(by_hand) / 2)
    assert error == pytest.approx(abs(by_hand[0] - by_hand[1]) / 2)


def test_loss_time_is_of_the_loss_alone() -> None:
    split = data.digits()
    milliseconds = loss_time(make_method("kd"), small_teacher(1, 10), small_student(1, 10), split.train, 32)
    assert 0 < milliseconds < 1000


# ---- methods that compare rows, over micro-batches and over processes


def plain(width: int, seed: int) -> nn.Module:
    """A network without batch norm, which would see the micro-batches: its stages are named as usual."""
    torch.manual_seed(seed)
    layers = {
        "layer1": nn.Linear(64, width),
        "act": nn.Tanh(),
        "layer2": nn.Linear(width, width),
        "fc": nn.Linear(width, 4),
    }
    model = nn.Sequential(nn.Flatten())
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model.to(DEVICE).double()


@pytest.mark.parametrize("method", ["sp", "mlkd", "kd"])
def test_micro_batches_are_one_batch(method: str) -> None:
    x, y = torch.randn(12, 1, 8, 8, dtype=torch.float64, device=DEVICE), torch.arange(12, device=DEVICE) % 4
    teacher, student = plain(8, 1), plain(6, 2)
    losses, gradients = [], []
    for parts in ([(x, y)], [(x[:5], y[:5]), (x[5:], y[5:])]):
        torch.manual_seed(3)  # mlkd's heads, whose batch norm sees the whole batch either way
        module = Distillation(teacher, student, method, example=x[:2]).double()
        student.zero_grad()
        losses.append(exact_step(module, parts, Tensor.backward, nullcontext).loss)
        gradients.append([p.grad.clone() for p in student.parameters()])
        if len(parts) == 1:
            torch.testing.assert_close(losses[0], module(x, y).loss.detach())
        module.close()
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_micro_batches_may_each_be_mixed() -> None:
    x, y = torch.randn(8, 1, 8, 8, dtype=torch.float64, device=DEVICE), torch.arange(8, device=DEVICE) % 4
    module = Distillation(plain(8, 1), plain(6, 2), "stkd")
    torch.manual_seed(0)
    together = exact_step(module, [(x[:4], y[:4]), (x[4:], y[4:])], Tensor.backward, nullcontext).loss
    torch.manual_seed(0)
    apart = [module(x[k], y[k]).loss.detach() for k in (slice(4), slice(4, None))]
    torch.testing.assert_close(together, sum(apart) / 2)


def test_fit_takes_micro_batches_of_a_relational_method_as_one_batch() -> None:
    weights = []
    for accumulate, batch in ((1, 64), (2, 32)):
        torch.manual_seed(0)
        teacher, student = plain(8, 1).float(), plain(6, 2).float()
        student.fc, teacher.fc = nn.Linear(6, 10), nn.Linear(8, 10)
        torch.manual_seed(1)
        nn.init.normal_(student.fc.weight)
        nn.init.zeros_(student.fc.bias)
        module = Distillation(teacher, student, make_method("sp", weight=10.0)).to(DEVICE)
        dataset = TensorDataset(*(x[:64] for x in data.digits().train.tensors))
        fit(module, DataLoader(dataset, batch), epochs=3, accumulate=accumulate, progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["mlkd", "corsd"])
@pytest.mark.parametrize("with_example", [False, True])
def test_methods_with_heads_find_the_widths_and_train_them(method: str, with_example: bool) -> None:
    teacher, student, (x, y) = network(6, 7, 8), network(), images(6)
    teacher = None if method == "corsd" else teacher
    module = Distillation(teacher, student, method, example=x[:2] if with_example else None).to(DEVICE)
    result = module(x, y[:2], y[1:3]) if method == "corsd" else module(x, y)
    assert set(result.terms) == {"ce", method}
    result.loss.backward()
    heads = [p for name, p in module.named_parameters() if name.startswith("method.")]
    assert heads
    assert all(p.grad is not None for p in heads)
    assert set(module.eval()(x, y).terms) >= {"ce"}


def test_mlkd_sees_four_views_and_scores_the_upright_ones() -> None:
    teacher, student, (x, y) = network(6, 7, 8).eval(), network(), images(6)
    module = Distillation(teacher, student, "mlkd", example=x[:2])
    result = module(x, y)
    assert len(result.logits) == 24
    torch.testing.assert_close(result.terms["ce"], F.cross_entropy(result.logits[::4], y).detach())


@pytest.mark.parametrize("method", ["mlkd", "corsd"])
def test_two_processes_from_the_command_line(method: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "kdkernels",
        "train",
    ]
    options = ["--method", method, "--epochs", "1", "--teacher-epochs", "1", "--output", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    batch = 32 if method == "mlkd" else 10
    assert int(row["step"]) == 1000 // batch // 2  # each process sees its own half
    assert math.isfinite(float(row[method]))
    assert ("rows are compared over the batches of all 2 processes" in done.stdout) == (method == "mlkd")


def test_widths_that_cannot_be_read_off_need_an_example() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x], 1)

    student = nn.Sequential()
    for name, layer in {"stage1": Doubled(), "pool": nn.Flatten(), "fc": nn.Linear(128, 4)}.items():
        student.add_module(name, layer)
    x = torch.randn(3, 1, 8, 8, device=DEVICE)
    student, teacher = student.to(DEVICE), network(6, 7, 8)
    with pytest.raises(ValueError, match=r"MLKD has parameters of its own.*'stage1'.*example="):
        Distillation(teacher, student, "mlkd", layers=["stage1"], teacher_layers=["stages.2"])
    module = Distillation(teacher, student, "mlkd", layers=["stage1"], teacher_layers=["stages.2"], example=x)
    assert module(x, torch.tensor([0, 1, 2], device=DEVICE)).loss.isfinite()


def losses_of_200_steps(method: str, backend: str) -> list[float]:
    torch.manual_seed(0)
    x, y = data.digits().train.tensors
    teacher, student = ConvNet(1, 10, (8, 16, 32)).to(DEVICE), small_student(1, 10).to(DEVICE)
    options = {"sp": {"weight": 300.0}, "amd": {"weight": 0.2, "layer_weights": "area", "reduction": "sum"}}
    module = Distillation(teacher, student, make_method(method, **options.get(method, {})))
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
    losses = []
    with kdkernels.use_backend(backend):
        for step in range(200):
            index = torch.arange(32 * step, 32 * step + 32) % len(x)
            loss = module(x[index].to(DEVICE), y[index].to(DEVICE)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.skipif("native" not in backends_under_test(), reason="the native kernels are not available here")
@pytest.mark.parametrize("method", ["sp", "stkd", "amd"])
def test_200_steps_with_native_follow_the_reference(method: str) -> None:
    assert losses_of_200_steps(method, "native") == pytest.approx(losses_of_200_steps(method, "reference"), rel=1e-4)
