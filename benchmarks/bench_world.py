"""Speed and memory of the synthetic world: scenes per second without pictures and with the front picture of now.

python benchmarks/bench_world.py --output benchmarks/results/world.json

Each figure comes from real builds in processes of their own. The rate is that of the additional scenes between a small
and a large build, so that starting, compiling and the maps do not count; the whole large build is reported as well.
Memory is the proportional set size of the build and all its workers, sampled ten times a second. Baseline: one worker.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row

PICTURES = {"without pictures": ["recipe.cameras=[]", "recipe.qa=false"], "front picture 960x540": ["recipe.qa=false"]}
TARGETS = {"without pictures": ">= 25", "front picture 960x540": ">= 8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="benchmarks/results/<name>.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of scenes")
    arguments = parser.parse_args()
    rows = []
    sizes = {"without pictures": (200, 2200), "front picture 960x540": (40, 240)}
    for what, (small, large) in sizes.items():
        counts = (max(int(small * arguments.scale), 8), max(int(large * arguments.scale), 40))
        for workers in dict.fromkeys((arguments.workers, 1)):
            runs = [[build(count, workers, PICTURES[what]) for count in counts] for _ in range(arguments.repeats)]
            times = [min(run[k][0] for run in runs) for k in range(2)]
            memory = [max(run[k][1] for run in runs) for k in range(2)]
            rate = (counts[1] - counts[0]) / (times[1] - times[0])
            promised = workers == arguments.workers
            name = f"{what}, {workers} worker(s)" + ("" if promised else " (baseline)")
            rows.append(row(name, round(rate, 1), "scenes/s", TARGETS[what] if promised else None))
            if promised:
                rows.append(row(f"{name}: whole build of {counts[1]}", round(times[1], 1), "s"))
                for count, peak in zip(counts, memory):
                    rows.append(row(f"{name}: peak memory for {count}", round(peak / 2**20), "MB", "< 1000"))
    report("Synthetic world", rows, baseline="the same build with one worker", output=arguments.output)


def build(scenes: int, workers: int, options: list[str]) -> tuple[float, int]:
    """(seconds, peak memory in bytes) of one build in a fresh folder."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "navsim_ext.synthetic.build", f"output_dir={folder}/data"]
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, f"scenes={scenes}", f"workers={workers}", *options],
            env=os.environ | threads,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        watch = Watch(process.pid)
        _, errors = process.communicate()
        seconds = time.perf_counter() - start
        peak = watch.stop()
    if process.returncode:
        raise RuntimeError(f"the build of {scenes} scenes failed:\n{errors.decode()[-2000:]}")
    return seconds, peak


class Watch(threading.Thread):
    """Largest memory of a process and its children, until stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process, self._peak, self._over = psutil.Process(pid), 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.1):
            total = 0
            try:
                for process in (self._process, *self._process.children(recursive=True)):
                    total += process.memory_full_info().pss
            except psutil.Error:  # a process ended while it was being looked at
                continue
            self._peak = max(self._peak, total)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self._peak


if __name__ == "__main__":
    main()
