"""Read scans: index tar archives, inflate members, parse NIfTI headers, survey depths, and measure intensities."""

__all__ = ["affines", "demographics", "intensity", "nifti", "site_tables", "survey", "tar"]
