"""Check that an optional dependency group is installed."""

from __future__ import annotations

from importlib.util import find_spec

from ixi_etl.errors import MissingExtraError

EXTRAS = {
    "train": ("torch", "matplotlib", "safetensors", "scipy", "skimage", "tensorboard", "torchmetrics"),
    "bids": ("ancpbids",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "mat": ("h5py",),
    "xarray": ("xarray",),
    "hub": ("huggingface_hub",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
"""Extra of pyproject.toml -> the modules that its packages provide."""


def require_extra(extra: str, *modules: str) -> None:
    """Raise `MissingExtraError` unless all modules of an extra, or those given, are installed; nothing is imported.

    Call it before any other work, so that a command that trains at its end does not first spend hours on its dataset.
    """
    missing = [name for name in modules or EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f'this needs packages that are not installed ({", ".join(missing)}); run: pip install "ixi-etl[{extra}]" '
            f'(in a checkout: pip install -c constraints.txt -e ".[{extra}]")'
        )
