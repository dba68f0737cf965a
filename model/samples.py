"""Draw sample sheets: sources, target, generated and absolute error of fixed subjects, in grey and in colour.

Of each source the slice at the target's place is shown, not its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ixi_etl.core.files import to_json, write_atomic
from model.config import Direction
from model.data import Pairs
from model.generator import as_predictor
from model.networks import UNetGenerator
from model.report import SAMPLED, source_kinds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUBJECTS_SHOWN = 6
COLOUR_MAPS = {"gray": ("gray", "gray"), "colour": ("viridis", "inferno")}  # for images, for errors
ERROR_SHOWN = 0.5  # upper end of the error's scale, as a share of the data range


def choose_slices(pairs: Pairs, shown: int = SUBJECTS_SHOWN) -> Tensor:
    """Indices (n,) of the middle slices of up to `shown` subjects, evenly spread over the split; deterministic.

    If the middle slice of a subject is in another split, it is the one nearest to it.
    """
    count, subject = len(pairs.subjects), pairs.subject.cpu()
    distance = (pairs.position.cpu() - pairs.slices // 2).abs()
    chosen = torch.linspace(0, count - 1, min(shown, count)).round().long().tolist()
    of_chosen = (torch.nonzero(subject == n).flatten() for n in chosen)
    return torch.stack([own[distance[own].argmin()] for own in of_chosen]).to(pairs.device)


@torch.no_grad()
def draw_samples(generator: UNetGenerator, pairs: Pairs, folder: Path, name: str) -> list[Path]:
    """Write the sheets `<name>-gray.png` and `<name>-colour.png`, and single images into `<name>/`; return the sheets.

    The generator runs as in synthesis, without dropout. Images are shown from -1 (black) to 1 (white).
    """
    index = choose_slices(pairs)
    source, target = pairs.normalised(index)
    generated = as_predictor(generator)(source, pairs.position[index])
    sources = pairs.centres(source).split(1, dim=1)
    rows = dict(zip(source_kinds(pairs.direction.sources), sources, strict=True))
    rows |= {"target": target, "generated": generated, "error": (generated - target).abs() / 2}
    flip = -1 if pairs.origin == "lower" else 1  # the first row of a PNG is its top
    images = {kind: values[:, 0].cpu().numpy()[:, ::flip] for kind, values in rows.items()}
    labels = [f"{pairs.subjects[int(pairs.subject[i])]} slice {int(pairs.position[i])}" for i in index]
    singles = folder / name
    singles.mkdir(parents=True, exist_ok=True)
    for kind, values in images.items():
        scale = (0.0, ERROR_SHOWN) if kind == "error" else (-1.0, 1.0)
        for label, image in zip(labels, values, strict=True):
            _save_gray(image, scale, singles / f"{label.replace(' slice ', '-')}-{kind}.png")
    shown = {"split": pairs.split, "direction": [*pairs.direction.sources, pairs.direction.target]}
    write_atomic(folder / SAMPLED, to_json(shown))
    around = f", neighbours {pairs.neighbours}" if pairs.neighbours else ""
    title = f"{name}, {pairs.direction}{around}, split {pairs.split}"
    paths = []
    for kind, maps in COLOUR_MAPS.items():
        path = folder / f"{name}-{kind}.png"
        _sheet(images, labels, pairs.direction, maps, title).savefig(path)
        paths.append(path)
    return paths


def _save_gray(image: np.ndarray, scale: tuple[float, float], path: Path) -> None:
    low, high = scale
    Image.fromarray(np.round((image - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)).save(path)


def _sheet(
    images: dict[str, np.ndarray], labels: Sequence[str], direction: Direction, maps: tuple[str, str], title: str
) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * len(images) + 0.8, 2.35 * len(labels) + 0.5), dpi=110, layout="constrained")
    axes = figure.subplots(len(labels), len(images), squeeze=False)
    names = [f"source ({name})" for name in direction.sources]
    titles = [*names, f"target ({direction.target})", "generated", "|error|"]
    for row, label in enumerate(labels):
        for column, kind in enumerate(images):
            axis = axes[row, column]
            error = kind == "error"
            shown = axis.imshow(
                images[kind][row],
                cmap=maps[error],
                vmin=0 if error else -1,
                vmax=ERROR_SHOWN if error else 1,
                interpolation="nearest",
            )
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(titles[column], fontsize=9)
            if column == 0:
                axis.set_ylabel(label, fontsize=7)
    figure.colorbar(shown, ax=axes[:, -1], label="|error| as a share of the data range", fraction=0.1)
    figure.suptitle(title, fontsize=10)
    return figure
