"""Which packages the optional parts of this project need, and one line where they are not installed."""

from __future__ import annotations

from importlib.util import find_spec

from ixi_etl.errors import IxiError

EXTRAS = {
    "train": ("torch", "safetensors", "scipy", "tensorboard", "torchmetrics"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
}
"""Extra of pyproject.toml -> the modules that its packages bring."""


class MissingExtraError(IxiError):
    """An optional part of the project is not installed."""


def require_extra(extra: str) -> None:
    """Raise `MissingExtraError` unless all modules of an extra are installed; nothing is imported.

    Call it before any other work: what needs torch at its end should not first make its dataset.
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f'this needs packages that are not installed ({", ".join(missing)}); run: pip install "ixi-etl[{extra}]" '
            f'(in a checkout: pip install -c constraints.txt -e ".[{extra}]")'
        )
