"""Ten steps of every stage give the losses that were committed, on any CPU.

A change that moves them on purpose regenerates them: python tests/golden/regenerate_loss_traces.py
"""

import pytest
from loss_traces import TRACES, golden, largest_difference, trace


@pytest.mark.parametrize("name", TRACES)
def test_losses_are_those_that_were_committed(name, tmp_path):
    found, kept = trace(name, tmp_path), golden(name)
    assert largest_difference(found, kept) <= 1.0, f"{name}: {found} instead of {kept}"


def test_what_is_not_tolerated():
    kept = golden("stage2")
    assert largest_difference(kept, kept) == 0.0
    assert largest_difference([kept[0] * 1.0004, *kept[1:]], kept) > 1.0
    assert largest_difference(kept[:-1], kept) == float("inf")
    assert largest_difference([*kept[:-1], float("nan")], kept) == float("inf")
