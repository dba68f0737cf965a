"""Draw pictures for checking a pair by eye: T1, T2, and the T1's edges on the T2; likewise for other modalities.

Slices are [y, x]; x increases to the right, y to anterior (RAS+). They are drawn with anterior up and the subject's
right on the right.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ixi_etl.core.files import write_atomic
from ixi_etl.pairing.geometry import import_sitk

EDGE_COLOUR = (255, 150, 0)
QUALITY = 85  # of JPEG: about 40 kB a pair


@dataclass(frozen=True)
class PairLayers:
    """One slice of a pair as layers of equal size: both scans in grey, the moving one's edges on transparent ground."""

    moving: Image.Image
    reference: Image.Image
    edges: Image.Image


def pair_layers(moving: NDArray[Any], reference: NDArray[Any]) -> PairLayers:
    """The layers of two slices [y, x]."""
    left, right = _gray(moving), _gray(reference)
    edges = np.zeros((*left.shape, 4), np.uint8)
    edges[_edges(left)] = (*EDGE_COLOUR, 255)
    return PairLayers(*(Image.fromarray(np.ascontiguousarray(p[::-1])) for p in (left, right, edges)))


def pair_picture(moving: Sequence[NDArray[Any]], reference: NDArray[Any]) -> Image.Image:
    """One picture, side by side: the moving slices, the reference, and the reference with the edges of each of them."""
    gray = [_gray(each) for each in (*moving, reference)]
    panels = [np.repeat(each[..., None], 3, axis=-1) for each in gray]
    for each in gray[:-1]:
        overlay = panels[len(moving)].copy()
        overlay[_edges(each)] = EDGE_COLOUR
        panels.append(overlay)
    return Image.fromarray(np.concatenate(panels, axis=1)[::-1])


def save_picture(picture: Image.Image, path: Path) -> str:
    """Write a JPEG atomically and return its SHA-256. Equal pictures give equal bytes."""
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=QUALITY, subsampling=0)
    write_atomic(path, packed.getvalue())
    return hashlib.sha256(packed.getvalue()).hexdigest()


def contact_sheet(paths: Sequence[Path], captions: Sequence[str]) -> Image.Image:
    """Saved pictures below each other, each with its caption above it."""
    pictures = [Image.open(path) for path in paths]
    strip = 20
    width = max(p.width for p in pictures)
    page = Image.new("RGB", (width, sum(p.height + strip for p in pictures)), "black")
    draw, font, top = ImageDraw.Draw(page), ImageFont.load_default(13), 0
    for picture, caption in zip(pictures, captions, strict=True):
        draw.text((4, top + 2), caption, fill="white", font=font)
        page.paste(picture, (0, top + strip))
        top += picture.height + strip
    return page


def _gray(slice_yx: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey levels [y, x] from percentile 1 (black) to 99.5 (white)."""
    low, high = np.percentile(slice_yx, (1, 99.5))
    scaled = (slice_yx - low) / ((high - low) or 1.0)
    grey: NDArray[np.uint8] = (np.clip(scaled, 0, 1) * 255).astype(np.uint8)
    return grey


def _edges(grey: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Mask of Canny edges at a scale of about 1.5 voxels."""
    sitk = import_sitk()
    image = sitk.GetImageFromArray(grey.astype(np.float32))
    detected = sitk.CannyEdgeDetection(image, lowerThreshold=5, upperThreshold=12, variance=[2.0, 2.0])
    edges: NDArray[np.bool_] = sitk.GetArrayFromImage(detected) > 0
    return edges
