"""A published version as an object that other libraries read: pandas, xarray, PyTorch, nibabel."""
