"""Every method on networks of torchvision, timm and transformers: does it train, and if not as it comes, with what?

``python -m benchmarks.models_tried FILE.json [MODEL ...]`` adds rows to the file; without models, it prints the file's
table for docs/models.md. Networks are untrained and small images are enough: the question is whether all parts fit.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.training import METHODS, Distillation, fit, make_method

IMAGES, CLASSES, SIZE = 8, 10, 64


WHO, SHAPE = re.compile(r"^\w+: ([A-Z]+: )?"), re.compile(r"(?<=, and )\([\d, ]+\)")  # so that like errors are one note


class Pair(NamedTuple):
    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    options: Mapping[str, Any] = MappingProxyType({})  # that all methods need
    words: bool = False


def vision(student: str, teacher: str, student_options: dict[str, Any] | None = None, **options: Any) -> Pair:
    def make(name: str, own: dict[str, Any]) -> Callable[[], nn.Module]:
        def run() -> nn.Module:
            import torchvision

            return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **own)

        return run

    return Pair(make(student, student_options or {}), make(teacher, {}), options)


def timm_vit(name: str) -> Callable[[], nn.Module]:
    def run() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, img_size=SIZE)

    return run


def bert(width: int, layers: int) -> Callable[[], nn.Module]:
    def run() -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"vocab_size": 100, "num_attention_heads": 2, "intermediate_size": 2 * width, "num_labels": CLASSES}
        return BertForSequenceClassification(BertConfig(hidden_size=width, num_hidden_layers=layers, **sizes))

    return run


PAIRS = {
    "resnet18 ← resnet34": vision("resnet18", "resnet34"),
    "vgg11_bn ← vgg13_bn": vision("vgg11_bn", "vgg13_bn"),
    "mobilenet_v2 ← resnet34": vision("mobilenet_v2", "resnet34"),
    "efficientnet_b0 ← efficientnet_b1": vision("efficientnet_b0", "efficientnet_b1"),
    "convnext_tiny ← resnet34": vision("convnext_tiny", "resnet34"),
    "densenet121 ← resnet34": vision("densenet121", "resnet34"),
    "regnet_y_400mf ← regnet_y_800mf": vision("regnet_y_400mf", "regnet_y_800mf"),
    "googlenet ← resnet34": vision("googlenet", "resnet34", {"init_weights": False}, output="logits"),
    "swin_t ← swin_s": vision("swin_t", "swin_s"),
    "vit_b_16 ← resnet34": vision("vit_b_16", "resnet34", {"image_size": SIZE}),
    "timm vit_tiny ← vit_small": Pair(timm_vit("vit_tiny_patch16_224"), timm_vit("vit_small_patch16_224")),
    "BERT 2 layers ← 4 layers": Pair(bert(32, 2), bert(64, 4), {"output": "logits"}, words=True),
}
# what an error may ask for, the least first; example= is a batch of the images
REMEDIES: list[dict[str, Any]] = [
    {},
    {"example": True},
    {"layout": "nlc"},
    {"layout": "nhwc"},
    {"layout": "nlc", "example": True},
    {"layout": "nhwc", "example": True},
    {"layout": ["nlc", "nchw"]},
    {"layout": ["nlc", "nchw"], "example": True},
    {"adapt": "map"},
    {"adapt": ["map", "pool"]},
    {"adapt": ["map", "pool"], "example": True},
]


def tried(pair: Pair, student: nn.Module, teacher: nn.Module, method: str, remedy: dict[str, Any]) -> None:
    """Two steps of ``fit``; raises what a user would see."""
    torch.manual_seed(0)
    x = torch.randint(100, (IMAGES, 16)) if pair.words else torch.randn(IMAGES, 3, SIZE, SIZE)
    y = torch.arange(IMAGES) % 4
    options = {**pair.options, **remedy}
    if options.pop("example", False):
        options["example"] = x[:2]
    layout = {"layout": options.pop("layout")} if "layout" in options else {}
    own = teacher if METHODS[method].needs_teacher else None
    module = Distillation(own, student, make_method(method, **layout), **options)
    try:
        (row,) = fit(module, DataLoader(TensorDataset(x, y), IMAGES // 2), epochs=1, lr=1e-4, progress=False)
    finally:
        module.close()
    if not math.isfinite(row["loss"]):
        raise ValueError(f"the loss is {row['loss']}")


def cell(pair: Pair, student: nn.Module, teacher: nn.Module, method: str) -> dict[str, Any]:
    """The remedy with which the method trains, or the error as it comes."""
    errors: list[str] = []
    for remedy in REMEDIES:
        if not all(f"{option}=" in "".join(errors) for option in remedy):
            continue  # nobody would think of it
        try:
            tried(pair, student, teacher, method, remedy)
        except Exception as error:  # what it is is the result
            errors.append(f"{type(error).__name__}: {error}")
            continue
        return {"with": remedy, "error": errors[:1]}
    return {"with": None, "error": errors[:1]}


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each pair, a column for each method that is not well everywhere, and the notes."""
    notes: dict[str, str] = {}

    def mark(result: dict[str, Any]) -> str:
        if result["with"] == {}:
            return "✓"
        text = ", ".join(f"{k}={'images' if v is True else repr(v)}" for k, v in (result["with"] or {}).items())
        text = f"`{text}`" if text else f"no: {re.sub(SHAPE, 'they', re.sub(WHO, '', result['error'][0]))}"
        return notes.setdefault(text, chr(ord("a") + len(notes)))

    well = [m for m in METHODS if all(row[m]["with"] == {} for row in found.values())]
    others = [m for m in METHODS if m not in well]
    lines = [f"| student ← teacher | {', '.join(well)} | {' | '.join(others)} |", "|---" * (len(others) + 2) + "|"]
    lines += [f"| {pair} | ✓ | {' | '.join(mark(row[m]) for m in others)} |" for pair, row in found.items()]
    return [*lines, "", *(f"* {letter}: {text}" for text, letter in notes.items())]


def main(path: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("kdkernels").setLevel(logging.ERROR)
    found = json.loads(path.read_text()) if path.is_file() else {}
    if not names:
        print("\n".join(table({pair: found[pair] for pair in PAIRS if pair in found})))
    for name in names:
        full = next(pair for pair in PAIRS if pair.startswith(name))
        pair = PAIRS[full]
        student, teacher = pair.student(), pair.teacher()
        found[full] = {}
        for method in METHODS:
            found[full][method] = result = cell(pair, student, teacher, method)
            print(full, method, result["with"], *result["error"], flush=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
