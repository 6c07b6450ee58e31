#!/usr/bin/env bash
# Makes .venv beside the checkout and installs Trivium into it. A second run with nothing changed is a no-op.
#   bash scripts/setup.sh              install from the configured package index
#   bash scripts/setup.sh --offline    PIP_NO_INDEX: install the checkout only, into an environment that already
#                                      holds the dependencies (or from TRIVIUM_WHEELHOUSE, a folder of wheels)
#   TRIVIUM_VENV=/path                 use another environment (a container's own, for instance)
#   PYTHON=python3.12                  interpreter that makes the environment
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${TRIVIUM_VENV:-.venv}"
python="${PYTHON:-python3}"
offline=0
[[ "${1:-}" == "--offline" || "${PIP_NO_INDEX:-0}" == "1" ]] && offline=1

stamp="$venv/.trivium-installed"
want="$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1) $PWD"
if [[ -f "$stamp" && "$(cat "$stamp")" == "$want" ]]; then
  exit 0
fi

"$python" - <<'PY' || { echo "setup.sh: set PYTHON to a Python 3.11 or 3.12 interpreter" >&2; exit 1; }
import sys
ok = (3, 11) <= sys.version_info[:2] <= (3, 12)
if not ok:
    print(f"setup.sh: Python {sys.version.split()[0]} found, 3.11 or 3.12 needed", file=sys.stderr)
sys.exit(not ok)
PY
[[ -x "$venv/bin/python" ]] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

if (( offline )); then
  if [[ -n "${TRIVIUM_WHEELHOUSE:-}" ]]; then
    PIP_NO_INDEX=1 "${pip[@]}" install --quiet --find-links "$TRIVIUM_WHEELHOUSE" -c constraints.txt -e '.[ray,dev]'
  else
    PIP_NO_INDEX=1 "${pip[@]}" install --quiet --no-deps --no-build-isolation -e .
  fi
else
  # torch first and alone: a range in another package's requirements must not pull in a different build.
  "${pip[@]}" install --quiet -c constraints.txt torch hatchling editables
  "${pip[@]}" install --quiet -c constraints.txt -e '.[ray,dev]'
fi
"${pip[@]}" check
echo "$want" > "$stamp"
echo "Installed into $venv"
