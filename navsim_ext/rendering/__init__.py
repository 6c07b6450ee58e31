"""Cameras and views from above of any scene that has a map."""
