"""What scripts/gpu_check.sh needs beside torch: one distribution a line, with --missing those that cannot be imported.

torch, numpy, pandas, transformers, lightning, peft, accelerate, numba, scipy and pillow come with the machine.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDS = {  # module: distribution
    "hydra": "hydra-core", "omegaconf": "omegaconf", "diffusers": "diffusers", "shapely": "shapely",
    "geopandas": "geopandas", "pyogrio": "pyogrio", "pyproj": "pyproj", "pandas": "pandas", "pyarrow": "pyarrow",
    "rich": "rich", "markdown_it": "markdown-it-py", "mdurl": "mdurl", "pygments": "pygments", "xxhash": "xxhash",
    "zstandard": "zstandard", "jaxtyping": "jaxtyping", "wadler_lindig": "wadler-lindig", "beartype": "beartype",
    "pytest": "pytest", "pluggy": "pluggy", "iniconfig": "iniconfig", "hypothesis": "hypothesis",
    "sortedcontainers": "sortedcontainers", "tensorboard": "tensorboard", "jinja2": "jinja2", "psutil": "psutil",
}  # fmt: skip
SOURCES = {"antlr4": "antlr4-python3-runtime==4.9.3"}  # published as source alone, pure Python
LARGE = ("pandas", "pyarrow")  # expected on the machine: too large to bring along


def main(arguments: list[str]) -> None:
    if arguments == ["--missing"]:
        known = NEEDS | {module: need.partition("==")[0] for module, need in SOURCES.items()}
        lines = [" ".join(need for module, need in known.items() if find_spec(module) is None)]
    else:
        lines = [f"{need} wheel" for module, need in NEEDS.items() if module not in LARGE]
        lines += [f"{need} source" for need in SOURCES.values()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
