"""Formulas of the measures: PSNR and SSIM of slices and slabs, and what `model.protocols` needs beside them.

Legend: Z slices of one subject; B slices of any; N slices of S subjects; H, W are height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Images = NDArray[np.floating]

DATA_RANGE = 1.0  # of the images that a protocol is given
SSIM_SIDE = 7  # of the window of scikit-image, by default; smaller images have no SSIM
SSIM_3D_SIDE = 11  # of the Gaussian window
MS_SSIM_SIDE = 176  # 11 pixels at a 16th of the size, as torchmetrics requires


def center_crop(images: Images, height: int, width: int) -> Images:
    """Crop (Z, H, W) about the centre as torchvision's `CenterCrop`; smaller images are padded with zeros first."""
    missing = [max(0, wanted - size) for wanted, size in zip((height, width), images.shape[1:], strict=True)]
    images = np.pad(images, ((0, 0), *((n // 2, (n + 1) // 2) for n in missing)))
    top, left = (round((size - n) / 2) for n, size in zip((height, width), images.shape[1:], strict=True))
    return images[:, top : top + height, left : left + width]


def as_float64(*images: Images) -> list[NDArray[np.float64]]:
    return [x.astype(np.float64) for x in images]


def psnr_of_slices(generated: Images, target: Images, data_range: Images) -> NDArray[np.float64]:
    """PSNR (Z,) in dB of slices (Z, H, W), each with its own data range (Z,)."""
    mse = ((generated - target) ** 2).mean((1, 2))
    return np.asarray(10 * np.log10(data_range**2 / mse), np.float64)


def ssim_of_slices(generated: Images, target: Images, data_range: Images) -> NDArray[np.float64]:
    """scikit-image's default SSIM (Z,) of slices (Z, H, W), each with its own data range (Z,); NaN if too small."""
    from skimage.metrics import structural_similarity

    if min(target.shape[1:]) < SSIM_SIDE:
        return np.full(len(target), np.nan)
    slices = zip(target, generated, data_range, strict=True)
    return np.array([structural_similarity(t, g, data_range=largest) for t, g, largest in slices])


def ssim_3d(generated: Images, target: Images) -> float:
    """SSIM over a slab (Z, H, W) with the Gaussian window of Wang et al. (2004) along all axes; NaN if too small."""
    # Not that of torchmetrics, which convolves with all 11 x 11 x 11 weights and takes ten times as long.
    from skimage.metrics import structural_similarity

    if min(target.shape) < SSIM_3D_SIDE:
        return math.nan
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(*as_float64(target, generated), data_range=DATA_RANGE, **window))


def ms_ssim(generated: Tensor, target: Tensor) -> NDArray[np.float64]:
    """MS-SSIM (B,) of slices (B, 1, H, W); NaN if they are too small."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    if min(target.shape[2:]) < MS_SSIM_SIDE:
        return np.full(len(target), np.nan)
    similarity = multiscale_structural_similarity_index_measure(
        generated, target, data_range=DATA_RANGE, sigma=1.5, reduction="none"
    )
    return similarity.double().numpy()


def error_maps(generated: Tensor, target: Tensor) -> dict[str, Tensor]:
    """`mae`, `mse` and `ssim` at each pixel of slices (B, 1, H, W) in [0, 1].

    SSIM is that of Wang et al. (2004), with a Gaussian window of sigma 1.5.
    """
    # Imported here since it also imports scipy.signal, which takes more than a second.
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, similarity = structural_similarity_index_measure(
        generated, target, data_range=DATA_RANGE, sigma=1.5, reduction="none", return_full_image=True
    )
    error = generated - target
    return {"mae": error.abs(), "mse": error**2, "ssim": similarity}


def average_maps(maps: Mapping[str, Tensor], mask: Tensor | None = None) -> dict[str, Tensor]:
    """Means (B,) of `error_maps` over a mask (B, 1, H, W), and `pixels`, its size; 0 where the mask is empty."""
    first = maps["mae"]
    inside = first.new_ones(first.shape) if mask is None else mask.to(first.dtype)
    pixels = inside.sum((1, 2, 3))
    means = {name: (values * inside).sum((1, 2, 3)) / pixels.clamp(min=1) for name, values in maps.items()}
    return means | {"pixels": pixels}


def score_slices(generated: Tensor, target: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Scores (B,) of slices (B, 1, H, W) in [0, 1]: `mae`, `mse` and `ssim` over the mask, and `pixels`, its size.

    `score_subjects` computes PSNR from `mse`.
    """
    return average_maps(error_maps(generated, target), mask)


def score_subjects(slices: Mapping[str, Tensor], subject: Tensor, subjects: int) -> dict[str, Tensor]:
    """Scores (S,) of subjects from those of slices (N,): `mae`, `psnr` and `ssim`.

    `subject` (N,) is the subject of each slice. Slices are weighted by their `pixels`. `psnr` is in dB, from
    the MSE over all slices of a subject; it is infinite if the MSE is 0.
    """
    import torch

    weight = slices["pixels"].double()

    def pooled(values: Tensor) -> Tensor:
        total = torch.zeros(subjects, dtype=torch.float64).index_add_(0, subject, values.double() * weight)
        return total / torch.zeros(subjects, dtype=torch.float64).index_add_(0, subject, weight)

    mse = pooled(slices["mse"])
    return {"mae": pooled(slices["mae"]), "psnr": 10 * torch.log10(DATA_RANGE**2 / mse), "ssim": pooled(slices["ssim"])}
