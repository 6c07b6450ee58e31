"""Waymo's end-to-end data (WOD-E2E): TFRecord files unpacked and written, submissions to its challenge."""
