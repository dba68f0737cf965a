"""Named checks of a version: healthy data pass, and each kind of broken data fails the check that is meant for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import SHRINK, config_for
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

from ixi_etl.core.files import read_json, to_json
from ixi_etl.dataset import checks, checks_history, checks_version, manifest, metadata, verify
from ixi_etl.dataset.checks_measures import (
    BELOW_HALF,
    VersionFacts,
    at_most_share,
)
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.dataset.schema import IXI
from ixi_etl.recipes.ixi import refresh
from ixi_etl.testing.phantom import grid_affine, pack_nifti, write_phantom, write_tar

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def ixi(published: PublishedVersion) -> VersionFacts:
    """A version like one of IXI with the modal rule: 582 subjects, 577 pairs, and no subject of IOP (146 slices)."""
    summary = metadata.read_metadata(published.folder)
    row = manifest.used_rows(metadata.read_manifest(published.folder)).iloc[0]
    table = pd.DataFrame([row] * 582).reset_index(drop=True)
    table["site"] = ["Guys"] * 320 + ["HH"] * 188 + ["IOP"] * 74
    table["subject_id"] = [f"IXI{n:03}-{site}-{n:04}" for n, site in enumerate(table["site"])]
    generator = np.random.default_rng(1)
    table["nmi_before"], table["nmi_after"] = 0.12, generator.normal(0.15, 0.01, 582)
    table["registration_error_mm"] = generator.gamma(4, 0.08, 582)
    table["motion_mm"], table["motion_deg"] = generator.gamma(2, 0.5, 582), generator.gamma(2, 0.4, 582)
    table["t1_p_low"], table["t1_p_high"] = 0.0, generator.uniform(111, 4479, 582)
    table["t2_p_low"], table["t2_p_high"] = 0.0, generator.uniform(300, 3000, 582)
    table["split"] = generator.choice(["train", "val", "test"], 582, p=summary["inputs"]["config"]["split"])
    table = excluded(table, [100, 200, 300, 400], "missing_t2")
    table = excluded(table, [500], "missing_t1")
    table = excluded(table, [*range(330, 370), *range(508, 582)], "depth_not_modal")
    histogram = [
        {"modality": "T1", "depth": depth, "all": n, "sites": {}}
        for depth, n in ((150, 503), (146, 74), (140, 2), (130, 2))
    ]
    histogram += [{"modality": "T2", "depth": depth, "all": n, "sites": {}} for depth, n in ((130, 464), (136, 114))]
    summary |= {"histogram": histogram, "modal_depth": {"T1": 150, "T2": 130}}
    summary["inputs"]["config"]["registration"] = "rigid"
    return facts_of(summary, table, {"t1": [1e-6] * 463, "t2": [1e-6] * 463})


def facts_of(summary: dict[str, Any], table: pd.DataFrame, saturation: dict[str, list[float]]) -> VersionFacts:
    used = table["status"] == "used"
    table["store_row"] = table["store_row"].mask(used, used.cumsum() - 1).astype("Int64")
    counts = manifest.counts(table, IXI)
    return VersionFacts(json.loads(json.dumps(summary | counts)), table, saturation)


def excluded(table: pd.DataFrame, rows: Any, reason: str) -> pd.DataFrame:
    table = table.copy()
    table.loc[rows, ["status", "reason", "detail", "split"]] = ["excluded", reason, "why", ""]
    table.loc[rows, "store_row"] = pd.NA
    return table


def results_of(facts: VersionFacts) -> dict[str, checks.Result]:
    return {result["name"]: result for result in checks.run_checks(checks_version.CHECKS, facts)}


def failed_names(facts: VersionFacts) -> set[str]:
    return {name for name, result in results_of(facts).items() if not result["passed"]}


def test_a_version_like_one_of_ixi_passes(ixi: VersionFacts) -> None:
    found = results_of(ixi)
    assert [result["name"] for result in found.values() if not result["passed"]] == []
    assert found["modal_depth"]["value"] == pytest.approx(464 / 578, abs=1e-6)
    assert found["used_share"]["details"]["IOP"] == 0  # by the rule of the modal depth, which is no fault
    assert found["lost_sites"]["value"] == 0
    assert found["missing_scans"]["details"] == {"missing_t1": 1, "missing_t2": 4}
    assert found["nmi"]["details"]["T1 median"] == found["nmi"]["value"]
    assert found["known_ages"]["value"] is None


def test_the_phantom_with_its_oddities_passes(published: PublishedVersion) -> None:
    assert checks.failed_checks(published.folder) == []
    results = metadata.read_metadata(published.folder)["checks"]
    assert [result["name"] for result in results] == [check.name for check in checks_version.CHECKS]
    assert {result["passed"] for result in results} == {True}


@pytest.mark.parametrize(
    "dataset",
    [
        {"pairing": "index", "split_by": "file"},
        pytest.param({"depth": "any", "normalisation": "range"}, marks=pytest.mark.stack),
        pytest.param({"modalities": ("T1", "T2", "PD", "MRA"), "incomplete": "keep"}, marks=pytest.mark.stack),
    ],
)
def test_other_versions_of_a_phantom_pass(dataset: dict[str, Any], archives: Path, tmp_path: Path) -> None:
    if "modalities" in dataset:
        archives = tmp_path / "archives"
        write_phantom(archives, seed=3, shrink=SHRINK, modalities=dataset["modalities"])
    assert checks.failed_checks(refresh(config_for(tmp_path, archives, pictures=False, **dataset)).folder) == []


Break = Callable[[VersionFacts], VersionFacts]


def with_values(**columns: Any) -> Break:
    return lambda facts: facts_of(dict(facts.summary), facts.final.assign(**columns), dict(facts.saturation))


def without(choose: Callable[[pd.DataFrame], Any], reason: str) -> Break:
    def broken(facts: VersionFacts) -> VersionFacts:
        rows = (facts.final["status"] == "used") & choose(facts.final)
        table = excluded(facts.final, facts.final.index[rows], reason)
        return facts_of(dict(facts.summary), table, dict(facts.saturation))

    return broken


def with_summary(**entries: Any) -> Break:
    def broken(facts: VersionFacts) -> VersionFacts:
        inputs = {**facts.summary["inputs"], **entries.get("inputs", {})}
        return VersionFacts({**facts.summary, **entries, "inputs": inputs}, facts.final, facts.saturation)

    return broken


def missing_in(site: str, reason: str) -> Break:
    """A reason for all subjects of a site, whatever theirs was: a missing scan comes before all other reasons."""

    def broken(facts: VersionFacts) -> VersionFacts:
        table = excluded(facts.final, facts.final["site"] == site, reason)
        return facts_of(dict(facts.summary), table, dict(facts.saturation))

    return broken


def chain(*steps: Break) -> Break:
    return lambda facts: reduce(lambda found, step: step(found), steps, facts)


def every(n: int, of: int) -> Callable[[pd.DataFrame], Any]:
    return lambda table: table.index % of < n


MOST = every(9, 10)


def in_most(**columns: Any) -> Break:
    """These values in nine of ten rows."""
    return lambda facts: with_values(
        **{name: facts.final[name].mask(MOST(facts.final), value) for name, value in columns.items()}
    )(facts)


ALL_IN_TRAIN = with_values(split=lambda table: table["split"].where(table["status"] != "used", "train"))
SAME_PERSON = with_values(subject_id=lambda table: "IXI001-" + table["subject_id"])

BROKEN: dict[str, tuple[Break, set[str]]] = {
    "a site is gone": (
        without(lambda table: table["site"] == "HH", "bad_affine"),
        {"lost_sites", "technical_exclusions"},
    ),
    "a small site has no T2": (missing_in("IOP", "missing_t2"), {"lost_sites"}),
    "half of the subjects cannot be read": (without(every(1, 2), "unreadable"), {"technical_exclusions"}),
    "nearly all subjects are excluded": (
        without(every(9, 10), "low_similarity"),
        {"used_share"},
    ),
    "an archive is incomplete": (without(every(1, 2), "missing_t1"), {"missing_scans"}),
    "every depth is another": (
        lambda facts: with_summary(
            histogram=[
                {"modality": m, "depth": d, "all": 6, "sites": {}} for m in ("T1", "T2") for d in range(130, 230)
            ]
        )(facts),
        {"modal_depth"},
    ),
    "no pair is aligned": (with_values(nmi_before=0.03, nmi_after=0.03), {"nmi"}),
    "few pairs are aligned, and the others are excluded": (
        chain(in_most(nmi_before=0.03, nmi_after=0.03), without(MOST, "low_similarity")),
        {"nmi", "used_share"},
    ),
    "the registration changes no pair": (with_values(flags="registration_no_gain"), {"no_gain_pairs"}),
    "most registrations are off by millimetres, and these pairs are excluded": (
        chain(
            in_most(registration_error_mm=2.5, flags="registration_uncertain"),
            without(MOST, "registration_uncertain"),
        ),
        {"registration_error", "uncertain_pairs", "used_share"},
    ),
    "half of the registrations are uncertain": (
        with_values(flags=lambda table: np.where(table.index % 2, "registration_uncertain", "")),
        {"uncertain_pairs"},
    ),
    "registrations are off by millimetres": (with_values(registration_error_mm=2.5), {"registration_error"}),
    "the headers are in two spaces": (with_values(motion_mm=80.0, motion_deg=40.0), {"motion", "rotation"}),
    "all subjects are in train": (ALL_IN_TRAIN, {"split"}),
    "a person is in all splits": (SAME_PERSON, {"leaking_persons"}),
    "scans are there twice": (with_values(flags="duplicate_scan,forms_differ"), {"duplicate_scans"}),
    "values are clipped": (
        lambda facts: VersionFacts(facts.summary, facts.final, {**facts.saturation, "t2": [0.01] * 463}),
        {"saturated_slabs"},
    ),
    "slabs are nearly constant": (with_values(t1_p_high=3.0), {"intensity_levels"}),
    "scales differ by thousands": (
        with_values(t2_scale=lambda table: np.where(table.index % 2, 1e-2, 1e2)),
        {"intensity_range"},
    ),
    "the table of ages is of other people": (
        lambda facts: with_summary(inputs={"demographics_sha256": "0" * 64})(with_values(age=np.nan)(facts)),
        {"known_ages"},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_fail_the_check_that_is_meant_for_them(name: str, ixi: VersionFacts) -> None:
    broken, expected = BROKEN[name]
    assert failed_names(broken(ixi)) == expected


def test_every_check_but_that_of_the_count_is_seen_to_fail() -> None:
    assert set().union(*(expected for _, expected in BROKEN.values())) | {"subjects"} == {
        check.name for check in checks_version.CHECKS
    }


def test_all_failures_are_found_at_once(ixi: VersionFacts) -> None:
    names = ["no pair is aligned", "the headers are in two spaces", "all subjects are in train", "values are clipped"]
    broken, expected = ixi, set[str]()
    for name in names:
        broken, expected = BROKEN[name][0](broken), expected | BROKEN[name][1]
    broken = VersionFacts(broken.summary, broken.final, BROKEN["values are clipped"][0](ixi).saturation)
    assert failed_names(broken) == expected


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"pairing": "index"}, "nmi"),
        ({"depth": "any"}, "modal_depth"),
        ({"split_by": "order", "split_counts": [300, 60, 103]}, "leaking_persons"),
    ],
)
def test_a_check_that_does_not_apply_has_no_value_and_passes(
    config: dict[str, Any], name: str, ixi: VersionFacts
) -> None:
    changed = {"inputs": {"config": {**ixi.config, **config}}}
    found = results_of(with_summary(**changed)(with_values(nmi_before=0.2, nmi_after=0.01)(ixi)))[name]
    assert (found["value"], found["passed"]) == (None, True)
    assert checks.describe_value(found) == "-"


def test_pairs_that_were_not_registered_have_no_share_of_flags(ixi: VersionFacts) -> None:
    found = results_of(with_values(motion_mm=np.nan, flags="registration_no_gain,registration_uncertain")(ixi))
    assert [found[name]["value"] for name in ("no_gain_pairs", "uncertain_pairs")] == [None, None]


@pytest.mark.parametrize(("subjects", "value"), [(9, None), (10, 1.0)])
def test_a_few_heads_that_did_not_move_are_no_fault(subjects: int, value: float | None, ixi: VersionFacts) -> None:
    few = ixi.final.head(subjects).assign(flags="registration_no_gain")
    found = results_of(facts_of(dict(ixi.summary), few, {"t1": [0.0], "t2": [0.0]}))["no_gain_pairs"]
    assert (found["value"], found["passed"]) == (value, value is None)


@pytest.mark.parametrize("limit", [2, 100])  # the subject after the 100th lacks its T2
def test_subjects_after_the_limit_count_in_no_share(limit: int, ixi: VersionFacts) -> None:
    """All later ones that can be used are beyond the limit, and the others keep their reasons: 119 of IXI."""
    used = ixi.final.index[ixi.final["status"] == "used"]
    table = excluded(ixi.final, used[limit:], "beyond_limit")
    facts = facts_of(dict(ixi.summary), table, {"t1": [0.0] * limit, "t2": [0.0] * limit})
    found = results_of(facts)
    shares = {"used_share", "missing_scans", "technical_exclusions", "lost_sites"}
    assert shares & failed_names(facts) == set()
    assert (found["used_share"]["value"], found["missing_scans"]["value"]) == (1, 0)


@pytest.mark.parametrize(("lacking", "subjects", "lost"), [(38, 74, 1), (37, 74, 0), (3, 3, 1), (2, 2, 0)], ids=str)
def test_a_site_is_lost_if_most_of_its_subjects_lack_a_scan(
    lacking: int, subjects: int, lost: int, ixi: VersionFacts
) -> None:
    """The others have another depth than the modal one, which is no fault."""
    table = ixi.final.head(508 + subjects)
    table = excluded(table, table.index[508 : 508 + lacking], "missing_t2")
    facts = facts_of(dict(ixi.summary), table, dict(ixi.saturation))
    assert results_of(facts)["lost_sites"]["value"] == lost


def test_a_split_by_order_must_be_exact(ixi: VersionFacts) -> None:
    used = ixi.summary["subjects"]
    config = {**ixi.config, "split_by": "order", "split_counts": [used - 20, 10, 10]}
    for off, passed in ((0, True), (1, False)):
        splits = {"train": used - 20 - off, "val": 10 + off, "test": 10}
        assert results_of(with_summary(splits=splits, inputs={"config": config})(ixi))["split"]["passed"] is passed


def test_the_split_of_a_few_persons_may_be_far_off(ixi: VersionFacts) -> None:
    def limit(persons: int) -> float:
        few = facts_of(dict(ixi.summary), ixi.final.head(persons).copy(), {"t1": [0.0], "t2": [0.0]})
        return float(results_of(few)["split"]["at_most"])

    assert limit(5) > 0.5 > 0.2 > limit(90)


def test_clipped_scans_fail_their_check(tmp_path: Path) -> None:
    shape_kji = (20, 24, 16)
    affine, values = grid_affine(shape_kji[::-1], (1.0, 1.0, 1.0), "RAS"), np.random.default_rng(2)
    for modality, largest in (("T1", 30_000), ("T2", 2000)):
        members = {
            f"IXI00{n}-Guys-000{n}-{modality}.nii.gz": pack_nifti(
                np.minimum(values.integers(0, 30_000, shape_kji), largest).astype("<i2"), affine
            )
            for n in range(1, 5)
        }
        write_tar(tmp_path / f"IXI-{modality}.tar", members)
    results = metadata.read_metadata(refresh(config_for(tmp_path / "root", tmp_path)).folder)["checks"]
    [found] = [result for result in results if result["name"] == "saturated_slabs"]
    assert (found["details"], found["passed"]) == ({"T1": 0, "T2": 1}, False)


@given(share=st.floats(0, 1), subjects=st.integers(1, 2000))
@settings(max_examples=examples(200))
def test_a_limit_of_a_share_is_never_below_it_and_never_allows_half_by_the_allowance(
    share: float, subjects: int
) -> None:
    limit = at_most_share(share, subjects)
    assert share <= limit <= max(share, BELOW_HALF)
    assert limit >= at_most_share(share, subjects + 1)
    if subjects >= 7:
        assert limit >= 3 / subjects


@given(
    measured=st.dictionaries(
        st.sampled_from([check.name for check in checks_version.CHECKS]),
        st.builds(checks.Measurement, *[st.none() | st.floats(-10, 10).map(lambda x: round(x, 6))] * 3),
        min_size=1,
    )
)
@settings(max_examples=examples(15))
def test_exactly_the_values_beyond_a_limit_fail(measured: dict[str, checks.Measurement]) -> None:
    expected = {
        name
        for name, m in measured.items()
        if m.value is not None
        and ((m.at_least is not None and m.value < m.at_least) or (m.at_most is not None and m.value > m.at_most))
    }
    assert checks.find_failures(measured) == expected


def test_a_failure_is_one_line_with_value_and_limit(ixi: VersionFacts) -> None:
    broken = results_of(with_values(registration_error_mm=2.5)(ixi))["registration_error"]
    assert checks.describe_failure(broken) == "registration_error: 2.5 mm, limit at most 1"
    low = results_of(with_values(nmi_before=0.03, nmi_after=0.03)(ixi))["nmi"]
    assert checks.describe_failure(low) == "nmi: 0.03, limit at least 0.06"


@pytest.fixture
def failing(published: PublishedVersion, tmp_path: Path) -> Path:
    """A copy of a version that failed the check `nmi`, published under `--checks warn`."""
    folder = Path(shutil.copytree(published.folder, tmp_path / published.version))
    summary = metadata.read_metadata(folder)
    results = [result | {"passed": result["name"] != "nmi"} for result in summary["checks"]]
    (folder / metadata.METADATA).write_text(to_json(metadata.with_digest(summary | {"checks": results})))
    path = folder / metadata.COMPARED
    compared = read_json(path) | {"mode": "warn", "failed": checks.failed(results), "held_by": []}
    path.write_text(to_json(metadata.with_digest(compared)))
    return folder


def test_the_own_checks_hold_a_version_whose_comparison_is_lost(failing: Path) -> None:
    """Nobody knows then whether they should only warn."""
    path = failing / metadata.COMPARED
    assert checks.held_by(failing) == []
    path.write_text(path.read_text().replace('"warn"', '"none"'))
    assert checks.held_by(failing) == ["nmi"]
    path.unlink()
    assert checks.held_by(failing) == [result["name"] for result in checks.failed_checks(failing)] == ["nmi"]
    assert f"{path} is missing" in verify.verify(failing)


def test_a_version_without_checks_is_free(failing: Path) -> None:
    """Such as one of an older ixi-etl, or of another dataset than IXI."""
    summary = metadata.read_metadata(failing)
    del summary["checks"]
    (failing / metadata.METADATA).write_text(to_json(metadata.with_digest(summary)))
    for name in (metadata.COMPARED, metadata.COMPARED_PAGE):
        (failing / name).unlink()
    assert checks.held_by(failing) == checks.failed_checks(failing) == []
    assert verify.verify(failing) == []


def rows_after(header: str, text: str) -> Iterator[list[str]]:
    for line in text.partition(f"{header}\n|---|---|---|---|\n")[2].splitlines():
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_page_lists_every_check_with_its_limit_and_reason() -> None:
    text = (DOCS / "checks.md").read_text()
    header = "| check | what it measures | limit | why |"
    first, second = text.partition("## Compared with the last version")[::2]
    for part, defined in ((first, checks_version.CHECKS), (second, checks_history.CHECKS)):
        documented = list(rows_after(header, part))
        assert documented == [[f"`{check.name}`", check.what, check.limit, check.why] for check in defined]
