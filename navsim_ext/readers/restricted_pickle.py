"""The readers' name for :mod:`navsim_ext.pickles`."""

from navsim_ext.pickles import BadContent, DamagedPickle, Holder, RefusedObject, holders, load, loads

__all__ = ["BadContent", "DamagedPickle", "Holder", "RefusedObject", "holders", "load", "loads"]
