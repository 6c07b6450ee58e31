"""Reactive traffic of NAVSIM 2: vehicles on their lanes that answer to the planned car."""
