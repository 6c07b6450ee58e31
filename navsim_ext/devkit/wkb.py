"""Well-known binary of unknown origin -> shapely geometry, looked through first.

GEOS reads collections by recursion, so one nested deep enough overflows the C stack. NAVSIM's caches hold points,
lines, polygons and their multiples; nothing else is admitted, every count is compared with the bytes that are left.

Format: OGC 06-103r4, section 8.2, with the extensions of PostGIS (flags for Z, M and SRID in the type).
"""

from __future__ import annotations

from struct import Struct
from typing import Any

import numpy as np
import shapely

from navsim_ext.pickles import BadContent

_POINT, _LINE, _POLYGON = 1, 2, 3
_MULTIPLES = {4: _POINT, 5: _LINE, 6: _POLYGON}
_Z, _M, _SRID = 0x80000000, 0x40000000, 0x20000000
_COUNTS = {0: Struct(">I"), 1: Struct("<I")}


def geometry(content: Any) -> shapely.Geometry:
    """The geometry of WKB bytes. Raises BadContent for anything but whole points, lines, polygons, or multiples of one
    of them, with finite coordinates."""
    if not isinstance(content, bytes):
        raise BadContent(f"a geometry from {type(content).__name__}; WKB bytes were expected")
    if _end_of(content, 0, None) != len(content):
        raise BadContent("a geometry with bytes left over")
    try:
        found = shapely.from_wkb(content)
    except shapely.GEOSException as error:
        raise BadContent(f"a geometry that GEOS refuses ({error!s:.80})") from error
    if not np.isfinite(shapely.get_coordinates(found)).all():
        raise BadContent("a geometry with coordinates that are not finite")
    return found


def _end_of(content: bytes, start: int, expected: int | None) -> int:
    """Where the geometry that begins at ``start`` ends; ``expected`` is the type inside a multiple."""
    if content[start] not in _COUNTS:
        raise BadContent(f"a geometry in byte order {content[start]}")
    count = _COUNTS[content[start]]
    (kind,) = count.unpack_from(content, start + 1)
    position = start + 5 + (4 if kind & _SRID else 0)
    thousands, simple = divmod(kind & 0x1FFFFFFF, 1000)
    if thousands > 3 or (expected is not None and simple != expected):
        raise BadContent(f"a geometry of type {kind} where {expected} was expected")
    lengths = 2 + bool(kind & _Z) + bool(kind & _M) if not thousands else 4 if thousands == 3 else 3
    if simple == _POINT:
        return position + 8 * lengths
    if simple not in (_LINE, _POLYGON, *_MULTIPLES):
        raise BadContent(f"a geometry of type {kind}; points, lines and polygons are admitted")
    (parts,) = count.unpack_from(content, position)
    position += 4
    if simple == _LINE:
        return position + 8 * lengths * parts
    for _ in range(min(parts, len(content))):
        if position >= len(content):
            raise BadContent(f"a geometry of {parts:,} parts that ends early")
        if simple == _POLYGON:
            position += 4 + 8 * lengths * count.unpack_from(content, position)[0]
        else:
            position = _end_of(content, position, _MULTIPLES[simple])
    return position
