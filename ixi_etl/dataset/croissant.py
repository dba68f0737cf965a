"""`croissant.json`: a version in the words of MLCommons Croissant 1.1, with its Responsible-AI fields.

https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html and .../croissant-rai-spec.html define the terms. All
files are named relative to the version's folder, so a copy anywhere can be read. There is no `datePublished`, which
Croissant recommends: a version holds no time (`latest.json` does). Not listed are `croissant.json` itself,
`dataset.json`, which holds its SHA-256, and `metadata.UNHASHED` files, which may differ between equal versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from ixi_etl.core.text import quantity
from ixi_etl.dataset.columns import describe_columns
from ixi_etl.dataset.credit import IXI, MNIST, is_all_share_alike
from ixi_etl.dataset.datasheet import HOMEPAGES, Datasheet
from ixi_etl.dataset.metadata import MANIFEST, PICTURES
from ixi_etl.dataset.store import STORE

CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The standard context of Croissant 1.1, which its reader expects."""

CONFORMS_TO = ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"]
LICENCE_URL = "https://creativecommons.org/licenses/by-sa/3.0/"

DATA_TYPES = {"text": "sc:Text", "JSON": "sc:Text", "integer": "cr:Int64", "number": "cr:Float64"}
"""Type in `columns.csv` -> data type of Croissant."""

FORMATS = {
    "csv": "text/csv",
    "md": "text/markdown",
    "txt": "text/plain",
    "html": "text/html",
}
"""Ending of a file -> media type."""

FILE_SETS = {STORE: ("**", "application/vnd.zarr"), PICTURES: ("*.jpg", "image/jpeg")}
"""Folder -> pattern of its files, and media type. `dataset.json` has the SHA-256 of each."""


def croissant(
    summary: Mapping[str, Any], final: pd.DataFrame, sheet: Datasheet, files: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The content of `croissant.json`.

    Args:
        summary: the content of `dataset.json`.
        final: the final manifest.
        sheet: the datasheet of the version.
        files: relative path -> size and SHA-256 of every other hashed file.
    """
    creators = {
        IXI: "Biomedical Image Analysis Group, Imperial College London",
        MNIST: "Y. LeCun, C. Cortes, C. Burges",
    }
    described = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": f"{summary['name']}-{summary['version']}",
        "alternateName": f"{summary['name']}@{summary['version']}",
        "description": f"{sheet.what} {sheet.collection}",
        # The pipeline version, and as build metadata the name, which is a hash of everything that decides the bytes.
        "version": f"{summary['inputs']['pipeline_version']}.0.0+{summary['version']}",
        "license": LICENCE_URL if is_all_share_alike(summary["sources"]) else summary["licence"],
        "creditText": summary["credit"],
        "citeAs": sheet.citation,
        "keywords": ["image-to-image translation", summary["source"], summary["target"], "Zarr"],
        "distribution": [*_file_objects(files), *_file_sets(files)],
        "recordSet": [_record_set(summary, final.columns)],
        **_responsible_ai(summary, sheet),
    }
    if sheet.origin in creators:
        described["creator"] = {"@type": "sc:Organization", "name": creators[sheet.origin]}
        described["url"] = HOMEPAGES[sheet.origin]
    return described


def _file_objects(files: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "@type": "cr:FileObject",
            "@id": name,
            "name": name,
            "contentUrl": name,
            "contentSize": f"{file['size']} B",
            "encodingFormat": FORMATS[name.rpartition(".")[2]],
            "sha256": file["sha256"],
        }
        for name, file in sorted(files.items())
        if "/" not in name
    ]


def _file_sets(files: Mapping[str, Any]) -> list[dict[str, Any]]:
    folders = {name.partition("/")[0] for name in files if "/" in name}
    return [
        {
            "@type": "cr:FileSet",
            "@id": folder,
            "name": folder,
            "description": f"The files of {folder}; dataset.json has the SHA-256 of each.",
            "encodingFormat": FILE_SETS[folder][1],
            "includes": f"{folder}/{FILE_SETS[folder][0]}",
        }
        for folder in sorted(folders)
    ]


def _record_set(summary: Mapping[str, Any], columns: Iterable[str]) -> dict[str, Any]:
    """The manifest: one record per subject."""
    fields = []
    for row in describe_columns(summary["name"], columns).to_dict("records"):
        details = ", ".join(filter(None, [row["type"] if row["type"] == "JSON" else "", row["unit"]]))
        fields.append(
            {
                "@type": "cr:Field",
                "@id": f"manifest/{row['column']}",
                "name": row["column"],
                "description": row["meaning"] + (f" ({details})" if details else ""),
                "dataType": DATA_TYPES[row["type"]],
                "source": {"fileObject": {"@id": MANIFEST}, "extract": {"column": row["column"]}},
            }
        )
    return {
        "@type": "cr:RecordSet",
        "@id": "manifest",
        "name": "manifest",
        "description": "One record per subject: used, or excluded with its reason.",
        "key": {"@id": "manifest/subject_id"},
        "field": fields,
    }


def _responsible_ai(summary: Mapping[str, Any], sheet: Datasheet) -> dict[str, Any]:
    """The fields of the vocabulary `rai`. Those about annotation are left out: nothing is annotated."""
    people = [
        f"Age and sex, {row['split']}: {row['women']} women, {row['men']} men, {row['unknown']} unknown; mean age in "
        f"years (range) {row['mean age (range)']}."
        for row in sheet.people.to_dict("records")
    ]
    sites = []
    for row in sheet.sites.to_dict("records"):
        scanner = f" ({row['hospital']}, {row['scanner']})" if row.get("hospital") else ""
        sites.append(f"Site {row['site']}{scanner}: {row['used']} of {quantity(row['found'], 'subject')} used.")
    return {
        "rai:dataCollection": sheet.collection,
        "rai:dataCollectionMissingData": sheet.missing,
        "rai:dataCollectionRawData": f"The files under `sources` in dataset.json. {summary['credit']}",
        "rai:dataPreprocessingProtocol": list(sheet.preparation),
        "rai:dataUseCases": [*sheet.uses, *(f"Not intended: {use}" for use in sheet.no_uses)],
        "rai:dataLimitations": list(sheet.limits),
        "rai:dataBiases": [*sheet.biases, *sites, *people],
        "rai:personalSensitiveInformation": [*sheet.privacy, f"Consent: {sheet.consent}"],
        "rai:dataReleaseMaintenancePlan": "A version never changes. Other inputs or another preparation make another "
        "version with another name.",
    }
