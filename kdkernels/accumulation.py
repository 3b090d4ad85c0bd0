"""Gradient accumulation for losses that compare the rows of a batch with each other.

Adding up the losses of micro-batches never compares rows of different micro-batches. This is exact:

    pass 1   features of every micro-batch, without graph
             the loss on all of them as one batch, and its gradient at the features
    pass 2   every micro-batch again, with graph, and that gradient back through it

Memory is one micro-batch's graph and the whole batch's features; the price is a second forward pass. (The scheme is
known as gradient caching: Gao et al. 2021, arXiv 2101.06983.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Forward = Callable[[Any], "Tensor | Sequence[Tensor]"]


def cached_backward(
    forward: Forward,
    batches: Iterable[Any],
    loss_fn: Callable[..., Tensor],
    *,
    modules: nn.Module | Iterable[nn.Module] | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Tensor:
    """Backpropagate the loss of the whole batch, one micro-batch's graph at a time.

        loss = cached_backward(lambda x: (student(x[0]), teacher(x[0]), x[1]), micro_batches, loss_fn, modules=student)
        optimizer.step()

    Args:
        forward: a micro-batch to a tensor or a sequence of tensors, rows in dimension 0: the features that need
            gradients, and whatever else the loss needs of the whole batch (a teacher's features, labels).
        batches: the micro-batches; they may differ in size.
        loss_fn: takes what ``forward`` returns, concatenated over the micro-batches; returns a scalar. Parameters that
            it uses itself (heads of a loss) get their gradients. With ``group=`` inside, the batch is that of all
            ranks.
        modules: the modules that ``forward`` runs. Their buffers are restored after pass 1, so BatchNorm's running
            statistics and other state are updated once. Needed unless ``forward`` is a module or a module's method.
        backward: called with the loss instead of ``loss.backward()``: ``accelerator.backward``, or
            ``lambda loss: scaler.scale(loss).backward()``.
        no_sync: a DistributedDataParallel module's ``no_sync``, entered for all micro-batches but the last, so that
            gradients are averaged once. (Every rank needs a last micro-batch; the numbers before it may differ.)

    Returns:
        The loss, detached. Gradients are added to the parameters' ``.grad``, as ``loss.backward()`` does.

    Random state: both passes draw the same numbers from PyTorch's generators, on the CPU and on every device of the
    modules, so dropout and augmentation agree. Draw from other generators (Python's, NumPy's) before the call.
    BatchNorm in training mode normalises with each micro-batch's own statistics, as in any accumulation: the result is
    exactly one batch only for models without it, or with frozen statistics.
    Autocast may be on around the call. ``forward`` runs twice per micro-batch, so it must have no other side effects.

    Raises:
        ValueError: no micro-batches.
        TypeError: ``modules`` is missing, or ``forward`` returns something else.
        RuntimeError: ``forward`` gave other shapes in pass 2, or nothing that needs a gradient.
    """
    modules = _modules(forward, modules)
    batches = list(batches)
    if not batches:
        raise ValueError("cached_backward: needs one micro-batch or more, got none")
    devices = _devices(modules, batches)

    states, parts = [], []
    with torch.no_grad(), _buffers_kept(modules):
        for batch in batches:
            states.append(_random_state(devices))
            parts.append([x.detach() for x in _outputs(forward(batch))])
    torch.clear_autocast_cache()  # weights cast without a graph must not be used again with one

    whole = [torch.cat(column).detach() for column in zip(*parts, strict=True)]
    sizes = [[len(x) for x in part] for part in parts]
    shapes = [[x.shape for x in part] for part in parts]
    del parts
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in whole]
    loss = loss_fn(*leaves)
    (backward or torch.Tensor.backward)(loss)
    gradients = [x.grad for x in leaves]
    del whole, leaves
    after = _random_state(devices)

    reached = False
    columns = zip(*sizes, strict=True)
    pieces = [[None] * len(batches) if g is None else g.split(list(n)) for g, n in zip(gradients, columns, strict=True)]
    for k, (batch, state) in enumerate(zip(batches, states, strict=True)):
        _set_random_state(state)
        context = no_sync() if no_sync is not None and k < len(batches) - 1 else nullcontext()
        with context:
            outputs = _outputs(forward(batch))
            if [x.shape for x in outputs] != shapes[k]:
                raise RuntimeError(
                    f"cached_backward: micro-batch {k} gave {[tuple(s) for s in shapes[k]]} in the first pass and "
                    f"{[tuple(x.shape) for x in outputs]} in the second; forward must repeat itself"
                )
            pairs = [(x, p[k]) for x, p in zip(outputs, pieces, strict=True) if x.requires_grad and p[k] is not None]
            if pairs:
                reached = True
                torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
    _set_random_state(after)
    if not reached:
        raise RuntimeError("cached_backward: no output of forward needs a gradient and gets one from loss_fn")
    return loss.detach()


@contextmanager
def _buffers_kept(modules: list[nn.Module]) -> Iterator[None]:
    """Put the modules' buffers back as they were when each module first ran.

    When it first ran, not before: DistributedDataParallel sends out rank 0's buffers between its own call and its
    module's, and those must stay.
    """
    before: dict[Tensor, Tensor] = {}
    seen = set()

    def keep(module: nn.Module, _: Any = None) -> None:
        if module not in seen:
            seen.add(module)
            before.update((b, b.detach().clone()) for b in module.buffers())

    hooks = []
    for module in modules:
        inner = module.module if isinstance(module, DistributedDataParallel) else module
        keep(inner)  # for modules whose methods are called, which run no hooks
        seen.discard(inner)
        hooks.append(inner.register_forward_pre_hook(keep))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)


def _modules(forward: Forward, modules: nn.Module | Iterable[nn.Module] | None) -> list[nn.Module]:
    if modules is None:
        owner = forward.__self__ if inspect.ismethod(forward) else forward
        if not isinstance(owner, nn.Module):
            raise TypeError(
                "cached_backward: name the modules that forward runs (modules=...), so that their buffers are updated "
                "once; modules=() if it runs none"
            )
        return [owner]
    return [modules] if isinstance(modules, nn.Module) else list(modules)


def _outputs(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    result = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if not all(isinstance(x, Tensor) and x.dim() for x in result):
        raise TypeError(
            "cached_backward: forward must return a tensor or a sequence of tensors with rows in dimension 0, got "
            + ", ".join(f"{type(x).__name__}{tuple(x.shape) if isinstance(x, Tensor) else ''}" for x in result)
        )
    return result


def _devices(modules: list[nn.Module], batches: list[Any]) -> list[torch.device]:
    """The accelerators whose generators forward may draw from."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    first = batches[0]
    tensors += [x for x in (first if isinstance(first, (tuple, list)) else [first]) if isinstance(x, Tensor)]
    return sorted({t.device for t in tensors if t.device.type in ("cuda", "xpu")}, key=str)


State = list[tuple[torch.device | None, Tensor]]


def _random_state(devices: list[torch.device]) -> State:
    return [(None, torch.get_rng_state())] + [(d, torch.get_device_module(d).get_rng_state(d)) for d in devices]


def _set_random_state(state: State) -> None:
    for device, value in state:
        if device is None:
            torch.set_rng_state(value)
        else:
            torch.get_device_module(device).set_rng_state(value, device)
