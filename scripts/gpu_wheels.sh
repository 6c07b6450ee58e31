#!/usr/bin/env bash
# Fills a folder with what scripts/gpu_check.sh may lack on a machine without network: run it where there is a network.
#   bash scripts/gpu_wheels.sh [FOLDER]          (wheels)
# FOR    Python version of that machine (3.12), on Linux x86-64
# PYTHON the interpreter whose pip is used (python3)
# torch, numpy, transformers and what comes with them are taken as there; see scripts/gpu_needs.py for the list.
set -euo pipefail
folder="${1:-wheels}"
[[ "$folder" == /* ]] || folder="$PWD/$folder"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}" version="${FOR:-3.12}"
mkdir -p "$folder"
constraints="$(mktemp)"
trap 'rm -f "$constraints"' EXIT
sed '/^torch==/d' constraints.txt > "$constraints"
platform=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any)
while read -r need kind; do
  if [[ "$kind" == source ]]; then # pure Python that is published as source alone
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$need"
  else
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" "${platform[@]}" \
      -c "$constraints" --dest "$folder" "$need"
  fi
done < <("$python" scripts/gpu_needs.py)
printf '%s: %s wheels, %s MB\n' "$folder" "$(find "$folder" -name '*.whl' | wc -l)" "$(du -sm "$folder" | cut -f1)"
