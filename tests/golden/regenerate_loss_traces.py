"""Writes the loss traces of the stages anew, after a change that is meant to move them.

    python tests/golden/regenerate_loss_traces.py [stage1 stage2 sim_agents stage3]

Says how far each has moved, in units of what the test tolerates. Commit the files together with the change, and say in
the commit why the losses moved.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loss_traces import GOLDEN, TRACES, golden, largest_difference, trace

from navsim_ext.files import write_json_atomic


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - set(TRACES))
    if unknown:
        sys.exit(f"there are no traces {', '.join(unknown)}; there are {', '.join(TRACES)}")
    for name in names or TRACES:
        with tempfile.TemporaryDirectory() as folder:
            losses = [float(f"{loss:.6g}") for loss in trace(name, Path(folder))]
        file = GOLDEN / f"{name}.json"
        moved = f"moved by {largest_difference(losses, golden(name)):.2f} tolerances" if file.exists() else "new"
        write_json_atomic(file, {"what": " ".join(TRACES[name].__doc__.split()), "losses": losses})
        print(f"{name}: {len(losses)} steps, {moved}")


if __name__ == "__main__":
    main(sys.argv[1:])
