#!/usr/bin/env bash
# Makes .venv beside the checkout and installs Trivium into it. A second run with nothing changed is a no-op.
#   bash scripts/setup.sh                  install from the configured package index
#   bash scripts/setup.sh --offline        the checkout only, into an environment that already holds the dependencies;
#                                          with TRIVIUM_WHEELHOUSE=<folder of wheels> the dependencies too
#                                          (PIP_NO_INDEX=1 means the same)
#   bash scripts/setup.sh --dependencies   the dependencies only: for images that mount the code later
#   TRIVIUM_VENV=/path                     use another environment (a container's own, for instance)
#   PYTHON=python3.12                      interpreter that makes the environment
#   TORCH_VERSION=2.11.0                   another torch than the one that constraints.txt pins
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${TRIVIUM_VENV:-.venv}"
python="${PYTHON:-python3}"
mode="${1:---online}"
[[ "${PIP_NO_INDEX:-0}" == "1" ]] && mode=--offline
case "$mode" in --online | --offline | --dependencies) ;; *)
  echo "setup.sh: unknown option $mode; there are --offline and --dependencies" >&2
  exit 2 ;;
esac

stamp="$venv/.trivium-installed"
lists="$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)"
want="$lists torch=${TORCH_VERSION:-pinned} $PWD"
if [[ "$mode" != --dependencies && -f "$stamp" && "$(cat "$stamp")" == "$want" ]]; then
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
lists_folder="$(mktemp -d)"
trap 'rm -rf "$lists_folder"' EXIT
constraints="$lists_folder/constraints.txt"
sed "s/^torch==.*/torch==${TORCH_VERSION:-$(sed -n 's/^torch==//p' constraints.txt)}/" constraints.txt > "$constraints"

if [[ "$mode" == --offline && -z "${TRIVIUM_WHEELHOUSE:-}" ]]; then
  PIP_NO_INDEX=1 "${pip[@]}" install --quiet --no-deps --no-build-isolation -e .
else
  source_of_wheels=()
  [[ "$mode" == --offline ]] && source_of_wheels=(--no-index --find-links "$TRIVIUM_WHEELHOUSE")
  "$venv/bin/python" - <<'PY' > "$lists_folder/requirements.txt"
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
groups = [needs for name, needs in project["optional-dependencies"].items() if name != "language"]
print("\n".join([*project["dependencies"], *(need for needs in groups for need in needs)]))
PY
  # torch first and alone: a range in another package's requirements must not pull in a different build.
  "${pip[@]}" install --quiet "${source_of_wheels[@]}" -c "$constraints" torch hatchling editables
  "${pip[@]}" install --quiet "${source_of_wheels[@]}" -c "$constraints" -r "$lists_folder/requirements.txt"
  [[ "$mode" == --dependencies ]] && exit 0
  PIP_NO_INDEX=1 "${pip[@]}" install --quiet --no-deps --no-build-isolation -e .
fi
"${pip[@]}" check
echo "$want" > "$stamp"
echo "Installed into $venv"
