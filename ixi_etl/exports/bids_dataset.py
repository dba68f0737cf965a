"""What both BIDS layouts have in common: names of participants and sessions, tables, descriptions and scanners.

BIDS is the Brain Imaging Data Structure, https://bids-specification.readthedocs.io. One participant is one person of
the manifest. A person with one scan has no session level; of a person with several scans, each is a session.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ixi_etl import __version__
from ixi_etl.core.files import to_json
from ixi_etl.dataset.credit import IXI, UNVERIFIED
from ixi_etl.dataset.manifest import to_records
from ixi_etl.dataset.schema import MIXED
from ixi_etl.dataset.splits import person_of
from ixi_etl.errors import ConfigError
from ixi_etl.exports.selection import Selection
from ixi_etl.sources.catalog import HOMEPAGE, LICENCE, SITES

BIDS_VERSION = "1.11.1"  # of the schema that the tests validate against
LICENCE_FILE = "LICENSE"  # the name that BIDS has
ABSENT = "n/a"
MAX_AGE = 89.0  # years; BIDS asks to give no higher age, for privacy

SUFFIXES = {"t1": "T1w", "t2": "T2w", "pd": "PDw", "mra": "angio"}
"""Array -> suffix of its files in BIDS."""

DATASET_BYTES, SUBJECT_BYTES = 32 << 10, 4 << 10  # at most, of the files that `size_of_tables` counts

COLUMNS = {
    "participant_id": {"Description": "The person: the part before the first - of the subject_id of the version."},
    "age": {
        "Description": "Age, from the table that was joined with the version; n/a if it has none, or several that "
        "differ. Higher ages than 89 are given as 89.",
        "Units": "year",
    },
    "sex": {"Description": "Sex, from the same table.", "Levels": {"M": "male", "F": "female"}},
    "site": {
        "Description": "Where the person was scanned, from the name of the scan. In IXI: "
        + ", ".join(f"{name} ({site.hospital})" for name, site in SITES.items())
        + ". n/a if unknown, or if there are several."
    },
    "split": {
        "Description": "Part of the data for training networks; n/a if the scans or slices of the person are in "
        "several parts.",
        "Levels": {"train": "training", "val": "validation", "test": "test"},
    },
    "scan_id": {
        "Description": "The subject_id in the manifest of the version; n/a for a person with several scans, which "
        "sessions.tsv lists."
    },
}
"""Columns of `participants.tsv`, and what `participants.json` says of them."""

SESSION_COLUMNS = {"session_id": {"Description": "One scan of the person."}} | {
    name: COLUMNS[name] for name in ("site", "split", "scan_id")
}


@dataclass(frozen=True)
class ScanName:
    """The names of one subject of a version: `sub-IXI002`, and a session if the person has several scans, else ""."""

    participant: str
    session: str

    @property
    def folder(self) -> str:
        return "/".join(filter(None, (self.participant, self.session, "anat")))

    def file(self, ending: str) -> str:
        """The name of a file relative to the dataset, for example `sub-IXI002/anat/sub-IXI002_T1w.nii.gz`."""
        return f"{self.folder}/{'_'.join(filter(None, (self.participant, self.session, ending)))}"


def name_scans(subject_ids: Iterable[str]) -> dict[str, ScanName]:
    """Subject id -> its names. Labels of BIDS have only letters and digits, so all other characters are left out.

    Raises:
        ConfigError: two persons, or two scans of one, would get the same label; case does not tell them apart.
    """
    given = list(subject_ids)
    scans = Counter(map(person_of, given))
    names, taken = {}, dict[str, str]()
    for subject_id in given:
        person = person_of(subject_id)
        rest = _label(subject_id[len(person) :]) or "0"
        name = ScanName(f"sub-{_label(person)}", f"ses-{rest}" if scans[person] > 1 else "")
        for label, owner in ((name.participant, person), (name.folder, subject_id)):
            if taken.setdefault(label.casefold(), owner) != owner:
                raise ConfigError(
                    f"{taken[label.casefold()]} and {owner} would both be {label.removesuffix('/anat')} in BIDS, whose "
                    "names have letters and digits only; make the version from files with other names (--pattern)"
                )
        names[subject_id] = name
    return names


def _label(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "", text)


def scanner_of(selection: Selection, name: str, site: str) -> dict[str, Any]:
    """What is published about the scanner, in the keys of BIDS: only of scans from IXI's own archives."""
    source = selection.metadata.get("sources", {}).get(name.upper(), {}).get("source")
    if source not in (IXI, UNVERIFIED) or site not in SITES:
        return {}
    known = SITES[site]
    return {
        "MagneticFieldStrength": known.tesla,
        "Manufacturer": known.manufacturer,
        "InstitutionName": known.hospital,
    }


def size_of_tables(selection: Selection) -> int:
    """Bytes, at most, of the files beside the images: `export.csv`, tables of participants and sessions, and texts."""
    return DATASET_BYTES + SUBJECT_BYTES * len(selection.subjects)


def write_participants(folder: Path, selection: Selection, names: Mapping[str, ScanName]) -> None:
    """Write `participants.tsv` and `.json`, and `sessions.tsv` and `.json` of each person with several scans."""
    scans = pd.DataFrame(
        {
            "participant_id": names[row["subject_id"]].participant,
            "session_id": names[row["subject_id"]].session,
            "age": ABSENT if pd.isna(row["age"]) else f"{min(float(row['age']), MAX_AGE):g}",
            "sex": row["sex"].upper() or ABSENT,
            "site": row["site"] or ABSENT,
            "split": ABSENT if row["split"] == MIXED else row["split"],
            "scan_id": row["subject_id"],
        }
        for row in to_records(selection.rows)
    )
    people = scans.groupby("participant_id", sort=True)[list(COLUMNS)[1:]].agg(_common)
    people.reset_index().to_csv(folder / "participants.tsv", sep="\t", index=False, lineterminator="\n")
    (folder / "participants.json").write_text(to_json(COLUMNS))
    for participant, rows in scans[scans["session_id"] != ""].groupby("participant_id"):
        table = folder / str(participant) / f"{participant}_sessions.tsv"
        table.parent.mkdir(parents=True, exist_ok=True)
        rows[list(SESSION_COLUMNS)].to_csv(table, sep="\t", index=False, lineterminator="\n")
        table.with_suffix(".json").write_text(to_json(SESSION_COLUMNS))


def _common(values: pd.Series[Any]) -> Any:
    """The value of all scans of a person; n/a if they differ."""
    return values.iloc[0] if values.nunique() == 1 else ABSENT


def write_description(folder: Path, selection: Selection, what: str, readme: str, **others: Any) -> None:
    """Write `dataset_description.json`, `README.md` and `.bidsignore`.

    Args:
        what: the dataset, in a few words.
        readme: text after the head of the README.
        others: further fields of the description, such as `DatasetType`.
    """
    metadata = selection.metadata
    credit, licence = (metadata.get(key, "not recorded") for key in ("credit", "licence"))
    sources = [source for source in metadata.get("sources", {}).values() if source["file"] != "IXI.xls"]
    is_ixi = [source["source"] in (IXI, UNVERIFIED) for source in sources]
    name = f"{selection.version}: {what}"
    description = {
        "Name": name,
        "BIDSVersion": BIDS_VERSION,
        "License": "CC-BY-SA-3.0" if licence == LICENCE else licence,
        "Acknowledgements": credit,
        "HowToAcknowledge": f"Pass on the credit and the licence in {LICENCE_FILE} with every copy of the data.",
        "GeneratedBy": [
            {
                "Name": "ixi-etl",
                "Version": __version__,
                "Description": f"export of the dataset version {selection.version}, which ixi-etl made with its "
                f"pipeline {metadata['inputs'].get('pipeline_version', 'not recorded')}",
            }
        ],
        "SourceDatasets": [
            ({"URL": HOMEPAGE} if ixi else {}) | {"Version": _identity(source)}
            for source, ixi in zip(sources, is_ixi, strict=True)
        ],
        **({"ReferencesAndLinks": [HOMEPAGE]} if any(is_ixi) else {}),
        **others,
    }
    (folder / "dataset_description.json").write_text(to_json(description))
    head = f"# {name}\n\nWritten by ixi-etl {__version__} from the dataset version {selection.version}.\n\n"
    end = (
        "## Tables\n\n`participants.tsv` has one row per person, described in `participants.json`.\n`export.csv` lists "
        "every image with its subject in the version; `export.json` describes the export.\n\n"
        f"## Credit and licence\n\nCredit: {credit}.\n\nLicence: {licence}.\n`{LICENCE_FILE}` says what to pass on "
        "with the files.\n"
    )
    (folder / "README.md").write_text(f"{head}{readme.strip()}\n\n{end}")
    (folder / ".bidsignore").write_text("export.csv\nexport.json\n")  # of every export, and unknown to BIDS


def _identity(source: Mapping[str, Any]) -> str:
    """A file that a version was made from, by its hash."""
    if source.get("files_sha256"):
        return f"{source['file']}, SHA-256 of their list {source['files_sha256']}"
    return f"{source['file']}, MD5 {source['md5'] or 'not known: single members were fetched'}"
