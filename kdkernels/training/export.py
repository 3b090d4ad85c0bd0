"""``kdkernels export``: a network as a torch.export program or ONNX file, its outputs compared with the network's."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from . import runs
from .checkpoint_model import Logits, complete, load, split_of

TRACED, COMPARED = 2, (1, 2, 5)  # images in a batch: when it is exported, when outputs are compared
TOLERANCE = 1e-4  # of the largest logit


def export(args: argparse.Namespace) -> str:
    """Write the file; return what it is, and by how much its outputs differ."""
    complete(args, data=args.shape is None)
    if args.shape is None:
        split = split_of(args)
        shape, classes = tuple(next(iter(split.test))[0].shape), split.classes
    elif len(args.shape) == 3:
        shape, classes = args.shape, args.classes
    else:
        raise ValueError(f"--shape must be channels, height and width, as 3x32x32, got {args.shape}")
    model = Logits(load(args.weights, args.model, shape[0], classes), args.model).eval()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, *shape, generator=generator) for n in COMPARED]
    runs_it = FORMATS[args.output.suffix](model, torch.randn(TRACED, *shape, generator=generator), args.output)
    difference = 0.0
    for images in batches:
        with torch.no_grad():
            expected = model(images)
            given = runs_it(images)
        difference = max(difference, float((given - expected).abs().max() / expected.abs().max().clamp(min=1e-12)))
    if not difference <= TOLERANCE:
        args.output.unlink()
        raise ValueError(f"the outputs of {args.output} were other than the network's, by {difference:.1e}: removed")
    size = args.output.stat().st_size / 1e6
    return (
        f"{args.output}: {args.model}, images (N, {', '.join(map(str, shape))}) to (N, {expected.shape[1]}), "
        f"{size:.1f} MB; batches of {', '.join(map(str, COMPARED))} images give the network's logits, but for "
        f"{difference:.0e} of the largest"
    )


def _torch(model: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_whole(path, lambda part: _saved(program, part))
    return torch.export.load(path).module()


def _saved(program: torch.export.ExportedProgram, path: Path) -> None:
    with path.open("wb") as file:  # by a path it asks for its usual suffix
        torch.export.save(program, file)


def _onnx(model: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"an .onnx file needs {', '.join(missing)}: pip install onnx onnxscript onnxruntime")
    import onnxruntime

    path.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of libraries that it could use
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own libraries' versions
        program = torch.onnx.export(
            model,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim.AUTO},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    runs.write_whole(path, lambda part: program.save(str(part)))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


FORMATS = {".pt2": _torch, ".onnx": _onnx}
