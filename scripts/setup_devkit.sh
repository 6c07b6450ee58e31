#!/usr/bin/env bash
# Makes the separate environment .devkit/ with nuplan-devkit v1.2 and NAVSIM v1.1 and v2.2 from their git URLs.
# Trivium itself needs none of it; navsim_ext/devkit/ uses it for submissions and for comparison with the original.
#   bash scripts/setup_devkit.sh                       clone and install (about 3 GB, minutes)
#   NAVSIM_GIT_URL=... NUPLAN_GIT_URL=... bash ...     from mirrors or local clones (in a clone that serves by file://:
#       git config uploadpack.allowFilter true && git config uploadpack.allowAnySHA1InWant true)
# Then: PYTHONPATH=.devkit/navsim_v1.1:.devkit/nuplan-devkit:. .devkit/venv/bin/python ...   (or navsim_v2.2)
# Test: TRIVIUM_DEVKIT=.devkit .venv/bin/python -m pytest tests/navsim_ext/test_devkit_agent.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder="${TRIVIUM_DEVKIT:-.devkit}"
python="${PYTHON:-python3}"
navsim_url="${NAVSIM_GIT_URL:-https://github.com/autonomousvision/navsim.git}"
nuplan_url="${NUPLAN_GIT_URL:-https://github.com/motional/nuplan-devkit.git}"
mkdir -p "$folder"

sources() { # url, ref, target folder, paths to check out ...
  local url="$1" ref="$2" target="$3"; shift 3
  [[ -f "$target/.complete" ]] && return
  rm -rf "$target"
  # Blobs on demand: only the package is fetched, not the repositories' pictures and notebooks.
  # Each fetch of a blob would also ask for a repacking of the repository.
  git clone --quiet -c gc.auto=0 --filter=blob:none --no-checkout "$url" "$target"
  git -C "$target" checkout --quiet "$ref" -- "$@"
  git -C "$target" rev-parse "$ref" > "$target/.complete"
}
# In the NAVSIM repository v1.1 and v2.2 are branch and tag at once; the branches carry the fixes.
sources "$navsim_url" origin/v1.1 "$folder/navsim_v1.1" navsim setup.py requirements.txt
sources "$navsim_url" origin/v2.2 "$folder/navsim_v2.2" navsim setup.py requirements.txt
sources "$nuplan_url" nuplan-devkit-v1.2 "$folder/nuplan-devkit" nuplan setup.py requirements.txt

if [[ ! -f "$folder/venv/.complete" ]]; then
  [[ -x "$folder/venv/bin/python" ]] || "$python" -m venv "$folder/venv"
  "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
  "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check -r scripts/devkit_requirements.txt
  touch "$folder/venv/.complete"
fi
for version in v1.1 v2.2; do
  PYTHONPATH="$folder/navsim_$version:$folder/nuplan-devkit" "$folder/venv/bin/python" - "$version" <<'PY'
import sys

import navsim.evaluate.pdm_score  # the import that fails when a pin has slipped

print(f"NAVSIM {sys.argv[1]} imports: {navsim.__path__[0]}")
PY
done
