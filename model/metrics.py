"""How like a generated slice is to the true one: MAE, PSNR and SSIM, by slice, over the slice or within a mask.

Images are (B, 1, H, W) in [0, 1], so the data range is 1; masks (B, 1, H, W) bool.
"""

from __future__ import annotations

import torch
from torch import Tensor

DATA_RANGE = 1.0


def by_slice(generated: Tensor, target: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """(B,) each: `mae`, `mse`, `ssim`, and `pixels`, the number of those in the mask, over which they are means.

    SSIM after Wang et al. (2004), with a Gaussian window of sigma 1.5. A slice with no pixels in the mask gets 0.
    """
    # Here, since it imports SciPy's signals too: more than a second, for which a training need not wait.
    from torchmetrics.functional.image import structural_similarity_index_measure

    inside = torch.ones_like(target) if mask is None else mask.to(target.dtype)
    pixels = inside.sum((1, 2, 3))

    def mean(values: Tensor) -> Tensor:
        return (values * inside).sum((1, 2, 3)) / pixels.clamp(min=1)

    _, similarity = structural_similarity_index_measure(
        generated, target, data_range=DATA_RANGE, sigma=1.5, reduction="none", return_full_image=True
    )
    error = generated - target
    return {"mae": mean(error.abs()), "mse": mean(error**2), "ssim": mean(similarity), "pixels": pixels}


def over_subjects(slices: dict[str, Tensor], subject: Tensor, subjects: int) -> dict[str, Tensor]:
    """(S,) each: `mae` and `ssim` over all pixels of a subject's slices, and `psnr` (dB) from the MSE over them.

    `subject` (N,) says whose slice each is. A slice counts by its pixels in the mask.
    """
    weight = slices["pixels"].double()

    def pooled(values: Tensor) -> Tensor:
        total = torch.zeros(subjects, dtype=torch.float64).index_add_(0, subject, values.double() * weight)
        return total / torch.zeros(subjects, dtype=torch.float64).index_add_(0, subject, weight)

    mse = pooled(slices["mse"])
    return {"mae": pooled(slices["mae"]), "psnr": 10 * torch.log10(DATA_RANGE**2 / mse), "ssim": pooled(slices["ssim"])}
