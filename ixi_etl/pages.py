"""Pages that open from disk with no network: one file each, pictures and script inside, one look for all.

A page extends `templates/base.html`, whose Content-Security-Policy lets a browser fetch nothing, and whose script makes
tables searchable and sliders move. Without JavaScript all of a page is visible.
"""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from jinja2 import Environment

SHOWN_SIDE = 256  # pixels: larger pictures are made smaller before they go into a page
QUALITY = 80  # of JPEG: 6 to 15 kB a picture of that size


def render(template: str, package: str = "ixi_etl", **facts: Any) -> str:
    """The page that a template of `package` makes of `facts`. Equal facts give equal text."""
    return _pages(package).get_template(template).render(**facts)


@cache
def _pages(package: str) -> Environment:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loaders = [PackageLoader(name) for name in dict.fromkeys((package, "ixi_etl"))]
    return Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def jpeg_uri(picture: Image.Image) -> str:
    """A gray or colour picture as a data URI, in JPEG."""
    return _data_uri(picture, "JPEG", quality=QUALITY)


def png_uri(picture: Image.Image) -> str:
    """A picture as a data URI, in PNG, which keeps transparency."""
    return _data_uri(picture, "PNG", optimize=True)


def _data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    small, packed = picture.copy(), io.BytesIO()
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    small.save(packed, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(packed.getvalue()).decode()}"
