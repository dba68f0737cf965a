"""Make a dataset version from start to end, one recipe per dataset: `ixi` (IXI T1 and T2) and `digits` (MNIST)."""

__all__ = ["digits", "ixi"]
