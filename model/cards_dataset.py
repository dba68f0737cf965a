"""Write the card of a dataset version: the README.md of a repository on the Hugging Face Hub. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from ixi_etl.config import SPLITS
from ixi_etl.core.text import markdown_table
from ixi_etl.dataset import metadata
from ixi_etl.dataset.command import how_to_make
from ixi_etl.dataset.credit import SOURCE_LABELS, has_simulated
from ixi_etl.dataset.schema import EXCLUDED, SCHEMAS
from ixi_etl.dataset.store import STORE, open_arrays
from model.cards import TASK, licence_head, licence_text, render, tags_of

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K"}
"""Number of subjects or images below which the Hub has this size category."""


def dataset_card(folder: Path, repository: str = "USER/NAME") -> str:
    """The card of the version in `folder`, which is, or will be, in this repository of the Hub.

    Raises:
        DatasetError: the version is damaged.
    """
    version = metadata.read_metadata(folder)
    manifest = metadata.read_manifest(folder, validate=False)
    simulated = has_simulated(version)
    reasons = SCHEMAS[version["name"]].reasons
    sources = version.get("sources", {})
    excluded = manifest[manifest["status"] == EXCLUDED]["reason"].value_counts()
    sites = [site for site, n in version["funnel"].get("found", {}).get("sites", {}).items() if n]
    arrays = open_arrays(folder)
    name = f"{version['name']}@{version['version']}"
    head = {
        **licence_head(version),
        "pretty_name": f"{name}, simulated (not IXI)" if simulated else name,
        "task_categories": [TASK],
        "size_categories": [next((text for limit, text in SIZES.items() if version["subjects"] < limit), "n>100K")],
        "tags": tags_of(version["name"], simulated, "zarr"),
        "viewer": False,  # the Hub shows no Zarr
    }
    return render(
        "dataset_card.md",
        head=head,
        is_model=False,
        repository=repository,
        name=name,
        version=version,
        simulated=simulated,
        is_digits=version["name"] == "digits",
        licence=licence_text(version),
        sources=markdown_table(
            {
                "source": label,
                "file": source["file"],
                "what it is": SOURCE_LABELS.get(source["source"], source["source"])
                + (f": {source['simulated_volumes']} volumes" if "simulated_volumes" in source else ""),
                "MD5": source["md5"] or "none",
            }
            for label, source in sources.items()
        ),
        arrays=markdown_table(
            {
                "array": key,
                "dtype": "string" if array.dtype.kind == "T" else str(array.dtype),
                "dimensions": ", ".join(getattr(array.metadata, "dimension_names", None) or ()),
                "shape": " x ".join(map(str, array.shape)),
            }
            for key, array in sorted(arrays.items())
        ),
        splits=markdown_table({"split": name, "subjects": version["splits"].get(name, 0)} for name in SPLITS),
        funnel=markdown_table(
            {"step": step, "all": counts["all"], **{site: counts["sites"].get(site, 0) for site in sites}}
            for step, counts in sorted(version["funnel"].items(), key=lambda item: -item[1]["all"])
        ),
        excluded=markdown_table(
            {"reason": reason, "subjects": int(n), "meaning": reasons.get(str(reason), "")}
            for reason, n in excluded.items()
        ),
        lost=[site for site in sites if not version["funnel"].get("used", {}).get("sites", {}).get(site, 1)],
        config=json.dumps(version["inputs"]["config"], indent=1, sort_keys=True),
        libraries=", ".join(f"{k} {v}" for k, v in sorted(version["inputs"].get("libraries", {}).items())),
        made_by=how_to_make(version),
        store=STORE,
        files=sum(file["size"] for file in version["files"].values()) / 1e6,
    )
