"""Make a pair of slabs of each subject: choose the planes, register the scans, resample, cut, and draw pictures."""

__all__ = ["cut", "geometry", "pictures", "register", "slabs"]
