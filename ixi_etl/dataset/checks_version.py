"""The checks of one version, with their limits and the reasons of these. docs/checks.md has them as a table."""

from __future__ import annotations

from ixi_etl.dataset import checks_measures as measures
from ixi_etl.dataset.alignment import NO_GAIN, UNCERTAIN
from ixi_etl.dataset.checks import Check

CHECKS = (
    Check(
        "subjects",
        "Number of used subjects.",
        "subjects",
        "at least 1",
        "a version without subjects is never published; the counts by site are for the history",
        measures.measure_subjects,
    ),
    Check(
        "used_share",
        "Share of the subjects found that are used; those beyond a limit of subjects do not count.",
        "share",
        "at least 0.2",
        "the demo's archives, of which half are faulty on purpose, keep 0.33 of their subjects",
        measures.measure_used_share,
    ),
    Check(
        "missing_scans",
        "Share of the subjects found that lack a scan, or have one twice.",
        "share",
        "at most 0.25",
        "IXI lacks the T1 or the T2 of 5 of 582 subjects; more than a quarter is an incomplete archive",
        measures.measure_missing_scans,
    ),
    Check(
        "technical_exclusions",
        "Largest share of the paired subjects that one technical reason excludes: of the steps readable and cut.",
        "share",
        "at most 0.05",
        "the default of `--max-unreadable`; no broken scan of IXI is known",
        measures.measure_technical_exclusions,
    ),
    Check(
        "lost_sites",
        "Number of sites that are lost: over half of 3 or more subjects lack a scan or have one twice, or none of 3 "
        "or more that the modal rules keep is used.",
        "sites",
        "at most 0",
        "the rule of the modal depth excludes a whole site of IXI (IOP), so a site that it excludes does not count",
        measures.measure_lost_sites,
    ),
    Check(
        "modal_depth",
        "Lowest share of the volumes of a modality that have the modal depth; not with --depth any.",
        "share",
        "at least 0.4",
        "503 of the 581 T1 of IXI have 150 slices, and most T2 have 130; below, the rule excludes most subjects",
        measures.measure_modal_depth,
    ),
    Check(
        "nmi",
        "Lowest median of the NMI of the pairs, of any moving modality; not for index pairing.",
        "NMI",
        "at least `min_nmi`",
        "scans of two people have at most 0.058, aligned pairs at least 0.090 (registration.md)",
        measures.measure_nmi,
    ),
    Check(
        "no_gain_pairs",
        "Share of the subjects with the flag registration_no_gain; only for 10 or more registered subjects.",
        "share",
        "at most 0.9",
        "even of simulated heads that did not move, only 3 of 5 have it; if nearly all do, the search fails, or the "
        "scans were registered before",
        measures.measure_flagged_pairs(NO_GAIN, 0.9, measures.MIN_REGISTERED),
    ),
    Check(
        "uncertain_pairs",
        "Share of the subjects whose registration failed, or may be off by more than max_registration_error.",
        "share",
        "at most 0.25",
        "estimates of real pairs with one fault reach 0.66 mm of 1 mm; a quarter above is a fault of the data",
        measures.measure_flagged_pairs(UNCERTAIN, 0.25),
    ),
    Check(
        "registration_error",
        "Largest median of the estimated error of the registration, of any moving modality.",
        "mm",
        "at most `max_registration_error`",
        "above it, more than half of the pairs are uncertain",
        measures.measure_median_alignment("registration_error_mm", None),
    ),
    Check(
        "motion",
        "Largest median of the corrected motion between the scans, of any moving modality.",
        "mm",
        "at most 15",
        "the flag `large_motion` begins there; a few millimetres are usual, and more in half of the pairs means that "
        "headers are wrong",
        measures.measure_median_alignment("motion_mm", measures.LARGE_MOTION_MM),
    ),
    Check(
        "rotation",
        "Largest median of the corrected rotation between the scans, of any moving modality.",
        "degrees",
        "at most 15",
        "as for `motion`",
        measures.measure_median_alignment("motion_deg", measures.LARGE_MOTION_DEG),
    ),
    Check(
        "split",
        "Largest difference between the share of a split and the share asked for.",
        "share",
        "at most 4 standard errors of a random assignment of the persons; 2 slices by file; 0 by order",
        "a hash assigns each person, so chance exceeds this in fewer than one of 5,000 versions; the others are exact",
        measures.measure_split,
    ),
    Check(
        "leaking_persons",
        "Number of persons with subjects in several splits; only if the split is by person.",
        "persons",
        "at most 0",
        "a split by person has none by design",
        measures.measure_leaking_persons,
    ),
    Check(
        "duplicate_scans",
        "Share of the used subjects with a scan that another subject has too.",
        "share",
        "at most 0.05",
        "equal voxels are one scan under two names; more is an archive that was assembled wrongly",
        measures.measure_duplicate_scans,
    ),
    Check(
        "saturated_slabs",
        "Largest share of the slabs of an array of which over 0.1% of the voxels have the slab's largest value.",
        "share",
        "at most 0.1",
        "noise spreads the largest values of a scan; equal ones were clipped",
        measures.measure_saturated_slabs,
    ),
    Check(
        "intensity_levels",
        "Lowest median of the integers between the percentiles 0.1 and 99.9 of the slabs of an array.",
        "levels",
        "at least 32",
        "a genuine T1 of IXI has 111 levels, the fewest known; slabs with far fewer are nearly constant",
        measures.measure_intensity_levels,
    ),
    Check(
        "intensity_range",
        "Largest ratio, of any array, of the 95% to the 5% quantile of the range of intensities of a slab.",
        "times",
        "at most 100",
        "the maxima of scans of IXI are 114 to 4479, a ratio of 40",
        measures.measure_intensity_range,
    ),
    Check(
        "known_ages",
        "Share of the used subjects whose age the demographics have; only with --demographics.",
        "share",
        "at least 0.5",
        "IXI.xls lacks 15 of the 581 subjects with a T1; less than half is the table of other people",
        measures.measure_known_ages,
    ),
)
"""The checks of a version, in the order of its page."""
