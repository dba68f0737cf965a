"""The datasheet of a version: collection, consent, uses, limits and biases, for `README.md` and `croissant.json`.

What is said about scans depends on `credit.origin_of` their archives: only archives of IXI are described as IXI's. All
numbers are counted in the version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ixi_etl.config import SPLITS
from ixi_etl.core.text import quantity
from ixi_etl.dataset.credit import IXI, MNIST, OWN, SIMULATED, origin_of
from ixi_etl.dataset.datasheet_scans import limits_of_scans, preparation_of_scans
from ixi_etl.dataset.manifest import used_rows
from ixi_etl.dataset.schema import MIXED
from ixi_etl.dataset.splits import person_of
from ixi_etl.modalities import DATASETS, moving
from ixi_etl.sources.catalog import HOMEPAGE, SITES

HOMEPAGES = {IXI: HOMEPAGE, MNIST: "http://yann.lecun.com/exdb/mnist"}
"""Origin -> page of the data that a version is made from."""

_COLLECTION = {
    IXI: "Nearly 600 MR images of normal, healthy subjects, collected by the project IXI (Information eXtraction from "
    "Images, EPSRC GR/S21533/02) at three hospitals in London.",
    SIMULATED: "Simulated or generated volumes: their headers say so. No person was scanned for them.",
    OWN: "Files of whoever made this version. This project knows nothing about how they were collected.",
    MNIST: "Images of handwritten digits, 28 x 28 pixels: the four published files of MNIST, with the published MD5s.",
}
_CONSENT = {
    IXI: "IXI publishes the scans openly, under the licence below. The statements of IXI that this project has read "
    "give neither the wording of the subjects' consent nor an ethics approval; ask the providers of IXI for them.",
    SIMULATED: "Not applicable: no scans of people.",
    OWN: "Unknown to this project; ask the provider of the files.",
    MNIST: "Nothing about consent is part of the published files.",
}
_FACES = (
    "This project removes neither face nor skull, so slices may show parts of a face. Do not try to identify anybody."
)
_PRIVACY = {
    IXI: (
        "IXI names the scans by a number of the subject, the hospital and a number of the scan, not by the person. "
        "What else IXI did to de-identify them is not in the statements that this project has read.",
        _FACES,
    ),
    SIMULATED: ("None: no scans of people.",),
    OWN: (
        "Whether the files identify anybody is unknown to this project.",
        _FACES,
    ),
    MNIST: ("The files do not name the writers.",),
}
_USES = (
    "Training and evaluating models that synthesise one contrast of a scan from another.",
    "Comparing such models on the same subjects, slices and split.",
)
_NO_USES = (
    "Diagnosis, or any other decision about a patient.",
    "Identifying the persons who were scanned.",
)


@dataclass(frozen=True)
class Datasheet:
    """What a user of a version must know, as plain sentences.

    Attributes:
        origin: of the data: see `credit.origin_of`.
        what: what the version is.
        collection, consent, privacy: of the data that the version is made from.
        preparation: what was done to them.
        missing: which subjects or values are absent.
        uses, no_uses: intended uses, and others that it must not be put to.
        limits: what the data cannot show.
        biases: how the data differ from those that a user might expect.
        sites: one row per site, with scanner and counts; empty if sites are unknown.
        people: age and sex by split; empty if no demographics were joined.
        citation: BibTeX.
    """

    origin: str
    what: str
    collection: str
    consent: str
    privacy: tuple[str, ...]
    preparation: tuple[str, ...]
    missing: str
    uses: tuple[str, ...]
    no_uses: tuple[str, ...]
    limits: tuple[str, ...]
    biases: tuple[str, ...]
    sites: pd.DataFrame
    people: pd.DataFrame
    citation: str


def make_datasheet(summary: Mapping[str, Any], final: pd.DataFrame) -> Datasheet:
    """The datasheet of a version.

    Args:
        summary: the content of `dataset.json`.
        final: the final manifest.
    """
    origin, used = origin_of(summary["sources"]), used_rows(final)
    is_scans = summary["name"] in DATASETS
    return Datasheet(
        origin=origin,
        what=_what(summary),
        collection=_COLLECTION[origin],
        consent=_CONSENT[origin],
        privacy=_PRIVACY[origin],
        preparation=tuple(preparation_of_scans(summary) if is_scans else _PREPARATION_OF_DIGITS),
        missing=f"Excluded: {len(final) - len(used)} of {quantity(len(final), 'subject')}; the manifest says why.",
        uses=_USES if is_scans else ("Trying out the training of pix2pix: generate a digit from its outline.",),
        no_uses=_NO_USES if is_scans else ("Results about medical images.",),
        limits=tuple(limits_of_scans(summary, used)) if is_scans else _LIMITS_OF_DIGITS,
        biases=tuple(_biases(summary, origin, used)),
        sites=_sites(summary, origin, used),
        people=people_by_split(used),
        citation=_citation(summary, origin),
    )


def _what(summary: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {split}" for split, count in summary["splits"].items())
    if summary["name"] not in DATASETS:
        return f"{quantity(summary['subjects'], 'handwritten digit')} with outlines ({counts})."
    modalities, reference = DATASETS[summary["name"]]
    scans = " and ".join((*moving(modalities, reference), reference))
    return f"Paired slices of brain MRI, {scans}, of {quantity(summary['subjects'], 'subject')} ({counts})."


_PREPARATION_OF_DIGITS = (
    "Images are padded by two empty pixels on each side, to 32 x 32 pixels.",
    "The outline of a digit is drawn from the digit: ink (above 127) with a 4-neighbour that is not ink.",
    "The test file of MNIST is test, the last twelfth of its training file val, the rest train.",
)
_LIMITS_OF_DIGITS = (
    "The files do not name the writers, so digits of one writer may be in both train and val.",
    "An outline determines its digit almost completely, so the task is easy.",
)


def _biases(summary: Mapping[str, Any], origin: str, used: pd.DataFrame) -> list[str]:
    if origin == MNIST:
        return ["Whose handwriting it is, is not part of the files."]
    sentences = {
        IXI: ["Normal, healthy subjects only: no patients, so a model learns no disease."],
        SIMULATED: ["Simulated heads: results on them say nothing about scans of people."],
        OWN: ["Unknown to this project: it knows the files, not how their subjects were chosen."],
    }[origin]
    if origin == IXI:
        sentences.append(
            "Each hospital used one scanner, so differences between sites may be those of scanners, or of people."
        )
    sentences += _lost_by_depth(summary)
    config = summary["inputs"]["config"]
    if config.get("split_by") == "order":
        sentences.append("The split follows the order of the ids, so two scans of one person can be in two splits.")
    if config.get("split_by") == "file":
        sentences.append(
            f"The split is by slice: those of {quantity(summary['leaking_subjects'], 'subject')} are in both train and "
            "test, so results on test are too good."
        )
    repeated = used["subject_id"].map(person_of).value_counts()
    if (count := int((repeated > 1).sum())) > 0:
        subjects = int(repeated[repeated > 1].sum())
        sentences.append(f"Persons who were scanned more than once: {count}, with {subjects} of the used subjects.")
    return sentences


def _lost_by_depth(summary: Mapping[str, Any]) -> list[str]:
    """What the rule of the modal depth costs each site."""
    before, after = (summary["funnel"][step]["sites"] for step in ("readable", "modal depth"))
    sentences = []
    for site, count in before.items():
        if (lost := count - after[site]) > 0:
            everything = ", the whole site" if lost == count else ""
            sentences.append(
                f"Only volumes of the most common depth are used, which excludes {lost} of {count} readable pairs of "
                f"site {site}{everything}."
            )
    return sentences


def _sites(summary: Mapping[str, Any], origin: str, used: pd.DataFrame) -> pd.DataFrame:
    """One row per site: scanner (of IXI's sites), subjects found and used, and those of each split."""
    rows = []
    for site, found in summary["funnel"]["found"]["sites"].items():
        part = used[used["site"] == site]
        known = _hospital_and_scanner(site) if origin == IXI else {}
        splits = {split: int((part["split"] == split).sum()) for split in splits_in(used)}
        rows.append({"site": site, **known, "found": found, "used": len(part), **splits})
    return pd.DataFrame(rows)


def _hospital_and_scanner(site: str) -> dict[str, str]:
    """Columns of a site of IXI; empty texts if the site is unknown."""
    known = SITES.get(site)
    return {
        "hospital": known.hospital if known else "",
        "scanner": f"{known.manufacturer}, {known.tesla:g} T" if known else "",
    }


def splits_in(used: pd.DataFrame) -> list[str]:
    """All splits, and `mixed` if subjects have slices in several."""
    return [*SPLITS, *[MIXED][: int((used["split"] == MIXED).any())]]


def people_by_split(used: pd.DataFrame) -> pd.DataFrame:
    """Age and sex by split; empty if no demographics were joined.

    Columns: split, women, men, unknown (counts), mean age (range), in years.
    """
    if "age" not in used or (used["age"].isna().all() and (used["sex"] == "").all()):
        return pd.DataFrame()
    rows = []
    for split in splits_in(used):
        part = used[used["split"] == split]
        sexes = {name: int((part["sex"] == sex).sum()) for name, sex in (("women", "f"), ("men", "m"), ("unknown", ""))}
        age = f"{part['age'].mean():.1f} ({part['age'].min():.0f} to {part['age'].max():.0f})"
        known = part["age"].notna().any()
        rows.append({"split": split, **sexes, "mean age (range)": age if known else "-"})
    return pd.DataFrame(rows)


def _citation(summary: Mapping[str, Any], origin: str) -> str:
    """BibTeX of the version: its name identifies every byte. No year, because a version holds no time."""
    name = f"{summary['name']}@{summary['version']}"
    authors = {
        IXI: "{Biomedical Image Analysis Group, Imperial College London}",
        MNIST: "LeCun, Yann and Cortes, Corinna and Burges, Christopher J. C.",
    }
    fields = {"title": f"{{{name}}}, made by ixi-etl, pipeline version {summary['inputs']['pipeline_version']}"}
    fields |= {"author": authors[origin]} if origin in authors else {}
    fields |= {"note": f"{summary['credit']}. Licence: {summary['licence']}"}
    fields |= {"url": HOMEPAGES[origin]} if origin in HOMEPAGES else {}
    lines = [f"  {key} = {{{value}}}" for key, value in fields.items()]
    return "\n".join([f"@misc{{{name.replace('@', '-')},", ",\n".join(lines), "}"])
