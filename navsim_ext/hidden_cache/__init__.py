"""The VLM's hidden states, cached or live, behind one protocol. See README.md."""

from navsim_ext.hidden_cache.cached import CachedHiddenStates
from navsim_ext.hidden_cache.schema import HiddenBatch, PackedHiddenBatch
from navsim_ext.hidden_cache.source import HiddenStateSource, LiveHiddenStates, require_states, states_fingerprint
from navsim_ext.hidden_cache.writer import HiddenCacheWriter

__all__ = [
    "CachedHiddenStates",
    "HiddenBatch",
    "HiddenCacheWriter",
    "HiddenStateSource",
    "LiveHiddenStates",
    "PackedHiddenBatch",
    "require_states",
    "states_fingerprint",
]
