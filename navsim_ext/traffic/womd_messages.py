"""The messages of the Waymo Open Motion Dataset as tables of field numbers.

Two sets of the same messages: ``FULL`` to write with, and ``READ``, in which the many small ones (states of objects,
map points) stay bytes, to be decoded by the thousand (:class:`navsim_ext.traffic.messages.FlatMessages`).
Fields 12 and 13 of a Scenario (compressed sensor data) are known and skipped.
"""

from __future__ import annotations

from navsim_ext.traffic.messages import FlatMessages, message_types

POINT = "1 x:double, 2 y:double, 3 z:double"
STATE = (
    "2 center_x:double, 3 center_y:double, 4 center_z:double, 5 length:float, 6 width:float, 7 height:float, "
    "8 heading:float, 9 velocity_x:float, 10 velocity_y:float, 11 valid:bool"
)
NEIGHBOR = (
    "1 feature_id:int64, 2 self_start_index:int32, 3 self_end_index:int32, 4 neighbor_start_index:int32, "
    "5 neighbor_end_index:int32, 6 boundaries*:BoundarySegment"
)
TABLE = {
    "Scenario": "5 scenario_id:string, 1 timestamps_seconds*:double, 10 current_time_index:int32, 2 tracks*:Track, "
    "7 dynamic_map_states*:DynamicMapState, 8 map_features*:MapFeature, 6 sdc_track_index:int32, "
    "4 objects_of_interest*:int32, 11 tracks_to_predict*:RequiredPrediction, 12 frames*:bytes, 13 tokens*:bytes",
    "Track": "1 id:int32, 2 object_type:int32, 3 states*:ObjectState",
    "ObjectState": STATE,
    "RequiredPrediction": "1 track_index:int32, 2 difficulty:int32",
    "DynamicMapState": "1 lane_states*:TrafficSignalLaneState",
    "TrafficSignalLaneState": "1 lane:int64, 2 state:int32, 3 stop_point:MapPoint",
    "MapFeature": "1 id:int64, 3 lane:LaneCenter, 4 road_line:RoadLine, 5 road_edge:RoadEdge, 7 stop_sign:StopSign, "
    "8 crosswalk:Area, 9 speed_bump:Area, 10 driveway:Area",
    "MapPoint": POINT,
    "LaneCenter": "1 speed_limit_mph:double, 2 type:int32, 3 interpolating:bool, 8 polyline*:MapPoint, "
    "9 entry_lanes**:int64, 10 exit_lanes**:int64, 13 left_boundaries*:BoundarySegment, "
    "14 right_boundaries*:BoundarySegment, 11 left_neighbors*:LaneNeighbor, 12 right_neighbors*:LaneNeighbor",
    "LaneNeighbor": NEIGHBOR,
    "BoundarySegment": "1 lane_start_index:int32, 2 lane_end_index:int32, 3 boundary_feature_id:int64, "
    "4 boundary_type:int32",
    "RoadEdge": "1 type:int32, 2 polyline*:MapPoint",
    "RoadLine": "1 type:int32, 2 polyline*:MapPoint",
    "StopSign": "1 lane*:int64, 2 position:MapPoint",
    "Area": "1 polygon*:MapPoint",
}
FULL = message_types("trivium.womd", TABLE)


def _many_as_bytes(fields: str) -> str:
    for kind, names in (("MapPoint", ("polyline", "polygon")), ("ObjectState", ("states",)),
                        ("BoundarySegment", ("boundaries", "left_boundaries", "right_boundaries"))):  # fmt: skip
        for name in names:
            fields = fields.replace(f"{name}*:{kind}", f"{name}*:bytes")
    return fields


READ = message_types("trivium.womd_read", {name: _many_as_bytes(fields) for name, fields in TABLE.items()})
STATES, POINTS = FlatMessages(STATE), FlatMessages(POINT)
