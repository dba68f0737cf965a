"""Render self-contained HTML pages, with pictures and scripts inside, that need no network.

A page extends `templates/base.html`, whose Content-Security-Policy blocks all requests, and whose script makes tables
searchable and sliders work. Without JavaScript everything on a page is visible.
"""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import TYPE_CHECKING, Any

from PIL import Image

from ixi_etl.core.text import quantity

if TYPE_CHECKING:
    from jinja2 import Environment

SHOWN_SIDE = 256  # pixels; larger pictures are scaled down
QUALITY = 80  # of JPEG; a picture of that size has 6 to 15 kB


def render_page(template: str, package: str = "ixi_etl", **values: Any) -> str:
    """Render a template of `package` with `values`. Equal values give equal text.

    Templates have the filter `quantity`: `{{ n | quantity("subject") }}`.
    """
    return _environment(package).get_template(template).render(**values)


@cache
def _environment(package: str) -> Environment:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loaders = [PackageLoader(name) for name in dict.fromkeys((package, "ixi_etl"))]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quantity"] = quantity
    return environment


def jpeg_uri(picture: Image.Image) -> str:
    """A grey or colour picture as a data URI in JPEG."""
    return _data_uri(picture, "JPEG", quality=QUALITY)


def png_uri(picture: Image.Image) -> str:
    """A picture as a data URI in PNG, which keeps transparency."""
    return _data_uri(picture, "PNG")


def _data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    small, packed = picture.copy(), io.BytesIO()
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    small.save(packed, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(packed.getvalue()).decode()}"
