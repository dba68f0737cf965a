"""Make a dataset version from start to end, one recipe per dataset: `ixi` (IXI) and `digits` (MNIST)."""

__all__ = ["digits", "ixi"]
