"""Feature ids of a town's map: one range per layer and location, so that an id never means two things."""

from __future__ import annotations

from navsim_ext.scene import MAP_LOCATIONS
from navsim_ext.synthetic.town import Town

_GROUP, _LANE, _CONNECTOR, _GROUP_CONNECTOR, _INTERSECTION, _ROAD = 1_000, 2_000, 3_000, 5_000, 7_000, 8_000
_OTHER = 20_000  # boundaries, baselines, kerbside features: numbered by the writer from here


class Fids:
    """Ids of one town."""

    def __init__(self, town: Town) -> None:
        self._base = 100_000 * (MAP_LOCATIONS.index(town.location) + 1)
        pairs = [(town.lanes[c.from_lane].group, town.lanes[c.to_lane].group) for c in town.connectors]
        self._group_pairs = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        self._pair_of_connector = pairs
        self._next = self._base + _OTHER

    def lane(self, index: int) -> int:
        return self._base + _LANE + index

    def group(self, index: int) -> int:
        """Lane group, called roadblock by the map interface."""
        return self._base + _GROUP + index

    def connector(self, index: int) -> int:
        return self._base + _CONNECTOR + index

    def group_connector(self, connector: int) -> int:
        """Roadblock connector that a lane connector belongs to."""
        return self._base + _GROUP_CONNECTOR + self._group_pairs[self._pair_of_connector[connector]]

    @property
    def group_pairs(self) -> tuple[tuple[int, int], ...]:
        """(from group, to group) of every roadblock connector, in id order."""
        return tuple(self._group_pairs)

    def intersection(self, node: int) -> int:
        return self._base + _INTERSECTION + node

    def road(self, index: int) -> int:
        return self._base + _ROAD + index

    def new(self) -> int:
        """The next free id for features that nothing refers to by index."""
        self._next += 1
        return self._next
