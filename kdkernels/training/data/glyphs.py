"""Glyphs: 100 characters in the fonts that come with matplotlib, as coloured images of 32 x 32; nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

# Latin, digits, Greek and Cyrillic without the letters that look like Latin ones
CHARACTERS = (
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    "\u0393\u0394\u0398\u039b\u039e\u03a0\u03a3\u03a6\u03a8\u03a9"
    "\u03b1\u03b2\u03b3\u03b4\u03b5\u03b6\u03b7\u03b8\u03bb\u03bc\u03be\u03c0\u03c1\u03c3\u03c6\u03c8\u03c9"
    "\u0411\u0414\u0416\u0418\u0426\u0427\u0428\u042d\u042e\u042f\u042b"
)
# those that have all of them; cm has Latin letters alone, and LastResort draws boxes
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
SIDE, SIZES = 32, range(20, 29)  # of an image; of the fonts, in pixels
TURN, SHEAR, SHIFT = 12.0, 0.15, 2.0  # at most: degrees, slope, pixels
CONTRAST = (0.25, 0.7)  # of the mean of the colours; text is lighter than its ground
NOISE = 0.06
NEIGHBOUR, PATCH = 1 / 5, 1 / 7  # share of images with another character at the edge, with a patch over them


def font_folder() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def glyphs(count: int, seed: int) -> TensorDataset:
    """``count`` images (3, 32, 32), each standardised, and labels that are places in ``CHARACTERS``; for a seed always
    the same ones (with one version of Pillow, which draws them).

    Font, size, rotation, shear, shift and colours are random; some have a neighbour at the edge, or a patch over them;
    all have noise. The classes are equally frequent.
    """
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % len(CHARACTERS))
    images = torch.from_numpy(_paint(random, _masks(random, labels)))
    mean, std = images.mean((1, 2, 3), keepdim=True), images.std((1, 2, 3), keepdim=True)
    return TensorDataset((images - mean) / std, torch.from_numpy(labels.astype(np.int64)))


def _masks(random: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """(N, 32, 32) from 0 to 1: where the text is."""
    from PIL import Image, ImageDraw, ImageFont

    folder = font_folder()
    fonts: dict[tuple[str, int], Any] = {}
    masks = np.empty((len(labels), SIDE, SIDE), np.float32)
    for mask, label in zip(masks, labels, strict=True):
        key = FONTS[random.integers(len(FONTS))], SIZES[random.integers(len(SIZES))]
        if key not in fonts:
            fonts[key] = ImageFont.truetype(str(folder / f"{key[0]}.ttf"), key[1])
        image = Image.new("L", (SIDE, SIDE))
        draw, middle = ImageDraw.Draw(image), SIDE / 2
        _centred(draw, fonts[key], CHARACTERS[label], middle, middle)
        if random.random() < NEIGHBOUR:
            side = middle + random.choice([-1, 1]) * random.uniform(20, 24)
            _centred(draw, fonts[key], CHARACTERS[random.integers(len(CHARACTERS))], side, middle)
        image = image.transform((SIDE, SIDE), Image.Transform.AFFINE, _movement(random), Image.Resampling.BILINEAR)
        mask[:] = np.asarray(image, np.float32) / 255
    return masks


def _centred(draw: Any, font: Any, text: str, x: float, y: float) -> None:
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    draw.text((x - (left + right) / 2, y - (top + bottom) / 2), text, fill=255, font=font)


def _movement(random: np.random.Generator) -> tuple[float, ...]:
    """The coefficients of a rotation and a shear about the middle, and a shift."""
    angle, shear = np.deg2rad(random.uniform(-TURN, TURN)), random.uniform(-SHEAR, SHEAR)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, shear], [0, 1]])
    middle = np.full(2, SIDE / 2)
    offset = middle - matrix @ (middle + random.uniform(-SHIFT, SHIFT, 2))
    return *matrix[0], offset[0], *matrix[1], offset[1]


def _paint(random: np.random.Generator, masks: np.ndarray) -> np.ndarray:
    """(N, 3, 32, 32): colours, patches and noise."""
    n = len(masks)
    ground = random.uniform(0, 0.5, (n, 3, 1, 1))
    tint = random.uniform(-0.15, 0.15, (n, 3, 1, 1))
    text = random.uniform(*CONTRAST, (n, 1, 1, 1)) + tint - tint.mean(1, keepdims=True)
    images = ground + text * masks[:, None]
    for i in np.flatnonzero(random.random(n) < PATCH):
        (height, width), colour = random.integers(4, 11, 2), random.uniform(0, 1, (3, 1, 1))
        y, x = random.integers(SIDE - height + 1), random.integers(SIDE - width + 1)
        images[i, :, y : y + height, x : x + width] = colour
    return (images + NOISE * random.standard_normal(images.shape)).astype(np.float32)
