"""What the datasheet of a version says about its scans: how they were prepared, and what they cannot show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ixi_etl.core.text import quantity
from ixi_etl.dataset.credit import UNVERIFIED
from ixi_etl.dataset.manifest import GRID_DIFFERS
from ixi_etl.dataset.schema import pair_column
from ixi_etl.modalities import DATASETS, ECHOES, moving


def preparation_of_scans(summary: Mapping[str, Any]) -> list[str]:
    """Sentences on what was done to the scans of a version, given the content of `dataset.json`."""
    config = summary["inputs"]["config"]
    if config["pairing"] == "index":
        sentences = ["Slice k of one scan is paired with slice k of the other, as stored; nothing is resampled."]
    else:
        sentences = [_alignment(summary)]
    margin = f", and {config['margin']} more on either side as neighbours" if config.get("margin") else ""
    if config.get("slice_rule") == "area":
        rule = f"the {quantity(config['slices'], 'adjacent slice')} with the largest area of head"
    elif config["window"] == "middle":
        rule = f"the middle {quantity(config['slices'], 'slice')}"
    else:
        rule = f"slices {config['window'][0]} to {config['window'][1] - 1}"
    sentences.append(f"Stored of each volume: {rule}{margin}.")
    sentences.append("Intensities are those of the scanner, not normalised; nothing is denoised or bias-corrected.")
    if "preparation" in summary:
        name = summary["preparation"]["name"]
        sentences.append(f"This follows the published preparation {name}; dataset.json lists all deviations from it.")
    return sentences


def _alignment(summary: Mapping[str, Any]) -> str:
    """How the scans of a version with anatomical pairing came onto the same planes."""
    config, (modalities, reference) = summary["inputs"]["config"], DATASETS[summary["name"]]
    resampled, echo = _resampled_and_echo(summary)
    corrected = {
        "none": "by the affines of their headers alone",
        "rigid": "by the affines of their headers and, where that makes the pair more similar, a rigid registration",
        "affine": "by the affines of their headers and, where that makes the pair more similar, an affine registration",
    }
    text = f"Slices of the {reference} are cut and never resampled."
    if resampled:
        text += (
            f" The {_listed(resampled)} {'is' if len(resampled) == 1 else 'are'} interpolated once, linearly, onto "
            f"exactly those planes, {corrected[config['registration']]}."
        )
    if echo:
        flag = pair_column(moving(modalities, reference), echo, GRID_DIFFERS)
        text += (
            f" The {echo}, an echo of the {reference}, is cut at the same slices and not interpolated, unless its grid "
            f"differs (flag {flag})."
        )
    return f"{text} So voxel (z, y, x) of all arrays is the same place in the head."


def _resampled_and_echo(summary: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """The modalities that are interpolated onto the reference's planes; and its other echo, if that is not, or ""."""
    modalities, reference = DATASETS[summary["name"]]
    others = moving(modalities, reference)
    is_cut = {m: {m, reference} <= ECHOES and not summary["inputs"]["config"].get("register_echoes") for m in others}
    return tuple(m for m in others if not is_cut[m]), "".join(m for m in others if is_cut[m])


def _listed(names: Sequence[str]) -> str:
    """`T1`, `T1 and T2`, `T1, T2 and PD`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def limits_of_scans(summary: Mapping[str, Any], used: pd.DataFrame) -> list[str]:
    """Sentences on what the scans of a version cannot show, given its `dataset.json` and its used rows."""
    config = summary["inputs"]["config"]
    sentences = ["Only some slices of each head are stored: what is above and below them is missing."]
    if config["pairing"] == "index":
        planes = summary["planes"]
        if len(set(planes.values())) > 1:
            shown = " and ".join(f"{m} slices are {plane}" for m, plane in planes.items())
            sentences.append(f"{shown}: the pictures of a pair show different planes of the head.")
        sentences.append("Pairs by index exist for comparison with published results. Do not use them otherwise.")
    else:
        sentences += _limits_of_alignment(summary)
    unverified = [label for label, source in summary["sources"].items() if source["source"] == UNVERIFIED]
    if unverified:
        sentences.append(f"Not verified: no published MD5 was checked for {_listed(unverified)}.")
    flags = used["flags"].str.split(",").explode()
    for flag, count in flags[flags != ""].value_counts().sort_index().items():
        sentences.append(f"Used subjects with the flag {flag}: {count}.")
    return sentences


def _limits_of_alignment(summary: Mapping[str, Any]) -> list[str]:
    resampled, echo = _resampled_and_echo(summary)
    sentences = []
    if resampled and summary["inputs"]["config"]["registration"] == "none":
        sentences.append("Pairs are aligned by headers alone: motion between the scans is not corrected.")
    elif resampled:
        sentences.append(
            f"The registration of the {_listed(resampled)} is an estimate: the manifest has its estimated error for "
            "each pair."
        )
    if echo:
        _, reference = DATASETS[summary["name"]]
        sentences.append(f"No motion is corrected between {echo} and {reference}, which count as echoes of one scan.")
    return sentences
