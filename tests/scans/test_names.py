"""Names say subject, site and modality: IXI's, plain ones, and those that fit a template of the user."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

from ixi_etl.dataset.splits import person_of
from ixi_etl.errors import ConfigError
from ixi_etl.scans.names import VolumeName, is_nifti_name, namer, parse_pattern, plain_name

WORDS = st.text(string.ascii_letters + string.digits, min_size=1, max_size=12)
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("IXI002-Guys-0828-T1.nii.gz", ("IXI002-Guys-0828", "Guys", "T1")),
        ("IXI002-Guys-0828-T1.nii", ("IXI002-Guys-0828", "Guys", "T1")),
        ("a/b/anna_T1.nii.gz", ("anna", "", "T1")),
        ("anna-t1W.NII", ("anna", "", "T1")),
        ("anna_PDw.nii", ("anna", "", "PD")),
        ("anna_angio.nii.gz", ("anna", "", "MRA")),
        ("anna_T1_T2.nii", ("anna_T1", "", "T2")),
        ("sub-01_T2w.nii.gz", ("sub_01", "", "T2")),  # what precedes the first - is the person
        ("-x y_T1.nii.gz", ("x_y", "", "T1")),
        ("Zoë_MRA.nii.gz", ("Zo_", "", "MRA")),
        ("日本_T1.nii.gz", None),
        ("anna.nii.gz", None),
        ("T1.nii.gz", None),
        ("annaT1.nii.gz", None),
        ("anna_FLAIR.nii.gz", None),
        (f"{'a' * 121}_T1.nii.gz", None),
    ],
)
def test_names_of_loose_files(name: str, expected: tuple[str, str, str] | None) -> None:
    assert is_nifti_name(name)
    assert plain_name(name) == (None if expected is None else VolumeName(*expected))


@pytest.mark.parametrize(
    ("template", "name", "expected"),
    [
        ("{subject}_{site}_{modality}.nii.gz", "x/y/7_HH_t1w.nii.gz", ("7-HH", "HH", "T1")),
        ("{subject}_{site}_{modality}.nii.gz", "7_HH_Ealing_t1.nii.gz", None),  # which of them has the _ is unclear
        ("{subject}_{modality}.nii.gz", "7_a-b_T2.nii.gz", ("7_a_b", "", "T2")),  # alone in its segment
        ("T1={subject}/mprage.nii.gz", "7-a/mprage.nii.gz", ("7_a", "", "T1")),
        ("T1={subject}/mprage.nii.gz", "old/7/mprage.nii.gz", None),
        ("pdw={site}/{subject}/{session}/*.nii", "HH/7/2019-01/pd x.nii", ("7-HH-2019_01", "HH", "PD")),
        ("MRA=*/{subject}/*.nii", "a/b/7/x.nii", None),  # * is not /
        ("{subject}/ses-{session}/{subject}_{modality}.nii", "7/ses-1/7_T1.nii", ("7-1", "", "T1")),
        ("{subject}/ses-{session}/{subject}_{modality}.nii", "7/ses-1/8_T1.nii", None),
        ("T2={subject}.nii", "7xnii", None),
        ("T2=./{subject}/(x).nii", "./7/(x).nii", ("7", "", "T2")),
        ("T2={subject}*_echo2.nii", "7_a_echo2.nii", ("7", "", "T2")),
    ],
)
def test_names_that_fit_a_template(template: str, name: str, expected: tuple[str, str, str] | None) -> None:
    assert parse_pattern(template).read(name) == (None if expected is None else VolumeName(*expected))


def test_the_first_template_that_fits_counts() -> None:
    read = namer(["T1={subject}/a.nii", "T2={subject}/*.nii"], plain_name)
    assert [read(name) for name in ("7/a.nii", "7/b.nii", "anna_T1.nii")] == [
        VolumeName("7", "", "T1"),
        VolumeName("7", "", "T2"),
        None,
    ]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{site}_{modality}.nii", "has no {subject}"),
        ("{subject}_{sit}_T1.nii", r"has the part {sit}; the parts are {subject}, {site}, {session}, {modality}"),
        ("{subject}.nii.gz", "names no modality"),
        ("T9={subject}.nii.gz", "names no modality"),
        ("T1={subject}_{modality}.nii", r"names the modality twice: leave out T1= or {modality}"),
        ("T1={subject", "has a brace without its partner"),
        ("T1={subject}{site}.nii", "has two parts with nothing between them"),
        ("T1=*{subject}.nii", "has two parts with nothing between them"),
        ("T1={subject}/../x.nii", "is not a name relative to --source"),
        ("T1=/data/{subject}.nii", "is not a name relative to --source"),
        ("T1=*_*_*_*_{subject}.nii", "has more than 3 *"),
    ],
)
def test_an_invalid_template_is_a_one_line_error(template: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        parse_pattern(template)
    assert str(caught.value).startswith(f"--pattern {template!r} ")
    assert str(caught.value).isprintable()


@settings(max_examples=examples(60))
@given(WORDS, WORDS, WORDS, st.sampled_from(["T1", "t2w", "PD", "MRA"]))
def test_the_parts_of_a_name_come_back(subject: str, site: str, session: str, modality: str) -> None:
    template = "{site}/{subject}_{session}-{modality}.nii"
    found = parse_pattern(template).read(f"{site}/{subject}_{session}-{modality}.nii")
    assert found == VolumeName(f"{subject}-{site}-{session}", site, modality.upper().removesuffix("W"))
    assert person_of(found.subject_id) == subject


@settings(max_examples=examples(100))
@given(st.text(max_size=40), st.sampled_from(["_T1", "-t2w", "_Angio", "-A-1-PD", ""]))
def test_any_name_gives_a_safe_id_or_none(start: str, end: str) -> None:
    found = plain_name(f"{start}{end}.nii.gz")
    assert found is None or SAFE_ID.fullmatch(found.subject_id)


@settings(max_examples=examples(100))
@given(st.text("{}subjecticmodality*/T1=_.é\n", max_size=30), st.text(max_size=20))
def test_any_template_is_compiled_or_refused_in_one_line(template: str, name: str) -> None:
    try:
        parse_pattern(f"T1={{subject}}{template}").read(name)
    except ConfigError as error:
        assert str(error).isprintable()
