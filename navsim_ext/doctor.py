"""Is this machine able to give right numbers?  ``python -m navsim_ext.doctor``

It prints every check of the scorer's arithmetic (:mod:`navsim_ext.pdm.arithmetic`: a system on which published scores
went wrong, two scenes against NAVSIM's own results), and versions, cores, memory and free disk.
Exit code 0: the numbers are right; 3: this machine would give wrong ones.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from navsim_ext.files import write_json_atomic
from navsim_ext.fingerprint import package_versions
from navsim_ext.pdm.arithmetic import Finding, examine
from navsim_ext.runtime.config import job

MIN_FREE_DISK = 1e9  # bytes, below it a warning
PACKAGES = ("numpy", "scipy", "numba", "shapely", "torch", "pyarrow", "pandas")
EXIT_WRONG_NUMBERS = 3


def machine(folder: str | os.PathLike[str] = ".") -> dict[str, str]:
    """Versions, processor, cores, memory and free disk in ``folder``, as text."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        **package_versions(*PACKAGES),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": f"{usable} usable of {os.cpu_count()}",
        "memory": f"{pages * page / 1e9:.1f} GB",
        "free disk": f"{shutil.disk_usage(folder).free / 1e9:.1f} GB in {Path(folder).resolve()}",
    }


def report(findings: list[Finding], about: dict[str, str], console: Console) -> bool:
    """Prints both tables and the verdict; returns whether the numbers are right."""
    table = Table("this machine", "", box=None, show_header=False)
    for key, value in about.items():
        table.add_row(key, value)
    console.print(table)
    table = Table("check", "found", "verdict")
    for finding in findings:
        table.add_row(finding.name, finding.found, "[green]right[/]" if finding.right else "[red bold]WRONG[/]")
    console.print(table)
    right = all(finding.right for finding in findings)
    if right:
        console.print("[green]This machine gives right numbers.[/]")
    else:
        console.print("[red bold]This machine would give WRONG numbers: do not cache, train or score on it.[/]")
    return right


@job("doctor")
def main(cfg: DictConfig) -> None:
    console = Console()
    folder = Path(cfg.output_dir) if cfg.output_dir is not None else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    about = machine(folder if folder is not None else ".")
    findings = examine()
    right = report(findings, about, console)
    if shutil.disk_usage(folder if folder is not None else ".").free < MIN_FREE_DISK:
        console.print("[yellow]Less than 1 GB of disk is free: caches and checkpoints will not fit.[/]")
    if folder is not None:
        checks = [{"name": f.name, "found": f.found, "right": f.right} for f in findings]
        write_json_atomic(folder / "doctor.json", {"right": right, "machine": about, "checks": checks})
    if not right:
        sys.exit(EXIT_WRONG_NUMBERS)


if __name__ == "__main__":
    main()
