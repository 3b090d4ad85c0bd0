"""energy in Triton: one read of the activations, work on the small maps, a sum; back one read, one write.

Sizes: a tile of 4096 numbers of an activation per program and step, up to 256 wide, along the pixels where they follow
each other and along the channels in channels_last; maps in blocks of up to 1024 pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import grad_like, is_channels_last
from ..triton_common import aligned, device_reason, find, grouped, launch, pick, power_of_2, starts_of, store
from .op import AttentionPairs
from .triton_forward import attention_kernel, energy_kernel, pixel_offset, sum_kernel

STEP = 4096


def supports(*tensors: Tensor) -> str | None:
    return device_reason(*tensors)


@triton.jit
def _scale(pointer, target, k, at, b, n, c, N, C, stride_b, stride_c, ALIGN: tl.constexpr):
    """One tile of kappa A where pixels follow each other, with as wide accesses as N and the strides allow."""
    N = aligned(N, ALIGN)
    channel = c[:, None].to(tl.int64)
    mask = (c < C)[:, None] & (n < N)[None, :]
    source = pointer + b * aligned(stride_b, ALIGN) + channel * aligned(stride_c, ALIGN) + at[None, :]
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    store(target + (b * C + channel) * N + n[None, :], x * k[None, :], mask)


@triton.jit
def gradient_kernel(
    activations,  # tuple of [B, C, H, W]
    gradients,  # tuple of [B, C, H, W]: contiguous, or channels_last where LAST
    kappa,  # [P]
    grad,  # [L, B]
    starts,  # the first program of each activation
    layers,  # which layer each one is
    offsets,  # where its kappa begins
    channels,
    pixels,  # H W
    widths,
    strides_b,
    strides_c,
    strides_h,
    strides_w,
    grad_strides,
    LAST: tl.constexpr,
    GENERIC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dA[b, c, n] = grad[b] kappa[b, n] A[b, c, n], one program per sample, block of pixels and block of channels."""
    pid = tl.program_id(0)
    layer = find(starts, pid)
    local = pid - pick(starts, layer)
    N = pick(pixels, layer)
    C = pick(channels, layer)
    blocks = tl.cdiv(N, BLOCK_N)
    c_blocks = tl.cdiv(C, BLOCK_C)
    b = (local // (blocks * c_blocks)).to(tl.int64)
    n = (local // c_blocks) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (local % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    upstream = tl.load(grad + pick(layers, layer).to(tl.int64) * grad_strides[0] + b * grad_strides[1])
    k = tl.load(kappa + pick(offsets, layer) + b * N + n, mask=n < N, other=0.0) * upstream
    pointer = pick(activations, layer)
    target = pick(gradients, layer)
    stride_b = pick(strides_b, layer)
    stride_c = pick(strides_c, layer)
    if LAST:
        mask = (n < N)[:, None] & (c < C)[None, :]
        at = pixel_offset(n, 0, 0, 0, C, False)[:, None] + c[None, :]
        x = tl.load(pointer + b * stride_b + at, mask=mask, other=0.0).to(tl.float32)
        store(target + b * N * C + at, x * k[:, None], mask)
    else:
        at = pixel_offset(n, pick(widths, layer), pick(strides_h, layer), pick(strides_w, layer), 1, GENERIC)
        multiple = N | stride_b | stride_c
        if GENERIC:
            _scale(pointer, target, k, at, b, n, c, N, C, stride_b, stride_c, 1)
        elif multiple % 8 == 0:
            _scale(pointer, target, k, at, b, n, c, N, C, stride_b, stride_c, 8)
        elif multiple % 4 == 0:
            _scale(pointer, target, k, at, b, n, c, N, C, stride_b, stride_c, 4)
        else:
            _scale(pointer, target, k, at, b, n, c, N, C, stride_b, stride_c, 1)


class Map(NamedTuple):
    """An activation, its layer, and where its energies or its kappa begin."""

    x: Tensor
    layer: int
    offset: int


def _layout(x: Tensor) -> tuple[bool, bool]:
    """LAST, GENERIC"""
    _, _, height, width = x.shape
    _, _, stride_h, stride_w = x.stride()
    if is_channels_last(x):
        return True, False
    return False, not ((width == 1 or stride_w == 1) and (height == 1 or stride_h == width))


def _key(item: Map) -> tuple[Any, ...]:
    return item.x.dtype, *_layout(item.x)


def _blocks(group: list[Map], last: bool) -> tuple[int, int]:
    """BLOCK_C, BLOCK_N: the wide side is the one along which numbers follow each other."""
    widest = max(item.x.shape[1] if last else item.x.shape[2] * item.x.shape[3] for item in group)
    wide = power_of_2(widest, 16, 256)
    narrow = power_of_2(max(item.x.shape[2] * item.x.shape[3] if last else item.x.shape[1] for item in group), 1, 4096)
    narrow = min(narrow, STEP // wide)
    return (wide, narrow) if last else (narrow, wide)


def _arguments(group: list[Map]) -> dict[str, Any]:
    xs = [item.x for item in group]
    last, generic = _layout(xs[0])
    block_c, block_n = _blocks(group, last)
    return {
        "activations": tuple(xs),
        "offsets": tuple(item.offset for item in group),
        "channels": tuple(x.shape[1] for x in xs),
        "pixels": tuple(x.shape[2] * x.shape[3] for x in xs),
        "widths": tuple(x.shape[3] for x in xs),
        "strides_b": tuple(x.stride(0) for x in xs),
        "strides_c": tuple(x.stride(1) for x in xs),
        "strides_h": tuple(x.stride(2) for x in xs),
        "strides_w": tuple(x.stride(3) for x in xs),
        "LAST": last,
        "GENERIC": generic,
        "BLOCK_C": block_c,
        "BLOCK_N": block_n,
        "num_warps": 8 if block_c * block_n >= STEP else 4,
    }


def offsets_of(tensors: list[Tensor]) -> tuple[list[int], int]:
    starts, total = starts_of([x.shape[0] * x.shape[2] * x.shape[3] for x in tensors])
    return list(starts), total


def energies(activation: Tensor) -> Tensor:
    batch, _, height, width = activation.shape
    r = torch.empty(batch, height, width, dtype=torch.float32, device=activation.device)
    if r.numel():
        launch_energies([Map(activation, 0, 0)], r)
    return r


def launch_energies(items: list[Map], r: Tensor) -> None:
    """The energies of each item, from its offset in r on."""
    for group in grouped(items, _key):
        arguments = _arguments(group)
        counts = [
            item.x.shape[0] * triton.cdiv(n, arguments["BLOCK_N"])
            for item, n in zip(group, arguments["pixels"], strict=True)
        ]
        starts, programs = starts_of(counts)
        launch(energy_kernel, programs, r.device, r=r, starts=starts, **arguments)


class Energies(NamedTuple):
    """What the forward pass of a loss of maps starts from and writes."""

    pairs: list[Map]  # the student's layers that have pixels, and where they begin in r and kappa
    r: Tensor  # (2, P): student and teacher
    kappa: Tensor  # (P,), or empty
    losses: Tensor  # (L, B)


def energies_of_pairs(student: list[Tensor], teacher: list[Tensor], need_grad: bool) -> Energies:
    device, batch, layers = student[0].device, student[0].shape[0], len(student)
    float32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    offsets, total = offsets_of(student)
    kappa = torch.empty(total if need_grad else 0, **float32)
    pairs = [Map(s, i, offsets[i]) for i, s in enumerate(student) if batch * s.shape[2] * s.shape[3]]
    losses = (torch.empty if len(pairs) == layers else torch.zeros)(layers, batch, **float32)  # an empty map has 0
    r = torch.empty(2, total, **float32)
    launch_energies(pairs + [Map(teacher[i], i, offset + total) for _, i, offset in pairs], r)
    return Energies(pairs, r, kappa, losses)


def forward(x: AttentionPairs, need_grad: bool) -> tuple[Tensor, Tensor]:
    pairs, r, kappa, losses = energies_of_pairs(x.student, x.teacher, need_grad)
    batch, factors = losses.shape[1], x.factors()
    block = power_of_2(max((item.x.shape[2] * item.x.shape[3] for item in pairs), default=1), 16, 1024)
    for group in grouped(pairs, lambda item: None):
        launch(
            attention_kernel,
            len(group) * batch,
            losses.device,
            r=r,
            kappa=kappa,
            losses=losses,
            P=r.shape[1],
            B=batch,
            offsets=tuple(item.offset for item in group),
            pixels=tuple(item.x.shape[2] * item.x.shape[3] for item in group),
            channels_s=tuple(max(item.x.shape[1], 1) for item in group),
            channels_t=tuple(max(x.teacher[item.layer].shape[1], 1) for item in group),
            factors=tuple(factors[item.layer] for item in group),
            layers=tuple(item.layer for item in group),
            ABSOLUTE=x.absolute,
            NEED_GRAD=need_grad,
            BLOCK=block,
            num_warps=4 if block <= 512 else 8,
        )
    return reduced(losses, x.per_layer, x.per_sample), kappa


def reduced(losses: Tensor, per_layer: bool, per_sample: bool) -> Tensor:
    """(L, B) to (), (L,), (B,) or (L, B)."""
    layers, batch = losses.shape
    if per_layer and per_sample:
        return losses
    shape = [layers] * per_layer + [batch] * per_sample
    count, between, stride = layers * batch, 0, 1
    if per_layer:
        count, between = batch, batch
    elif per_sample:
        count, between, stride = layers, 1, batch
    loss = torch.empty(shape, dtype=losses.dtype, device=losses.device)
    block = power_of_2(count, 16, 1024)
    launch(sum_kernel, loss.numel(), losses.device, losses, loss, count, between, stride, BLOCK=block)
    return loss


def backward(grad: Tensor, student: list[Tensor], kappa: Tensor) -> list[Tensor]:
    gradients = [grad_like(s) for s in student]
    offsets, _ = offsets_of(student)
    items = [Map(s, i, offsets[i]) for i, s in enumerate(student) if s.numel()]
    for group in grouped(items, _key):
        arguments = _arguments(group)
        block_c, block_n = arguments["BLOCK_C"], arguments["BLOCK_N"]
        counts = [
            item.x.shape[0] * triton.cdiv(n, block_n) * triton.cdiv(item.x.shape[1], block_c)
            for item, n in zip(group, arguments["pixels"], strict=True)
        ]
        starts, programs = starts_of(counts)
        launch(
            gradient_kernel,
            programs,
            student[0].device,
            gradients=tuple(gradients[item.layer] for item in group),
            kappa=kappa,
            grad=grad,
            starts=starts,
            layers=tuple(item.layer for item in group),
            grad_strides=grad.stride(),
            **arguments,
        )
    return gradients
