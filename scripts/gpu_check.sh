#!/usr/bin/env bash
# Does everything that is written for a GPU run on one, and how fast? At most eight minutes, no network needed.
#   bash scripts/gpu_check.sh                          on a machine with one GPU
#   DEVICE=cpu SIZE=tiny bash scripts/gpu_check.sh     the same code on one CPU core, in small: what the tests run
# PYTHON   an interpreter with torch; else that of .venv, else the first python3 on the path that has torch
# WHEELS   folder of wheels that scripts/gpu_wheels.sh filled; what is missing is installed from there (wheels)
# OUT      where the JSON of each part, its log and results.md go (gpu_check)
# PARTS    which parts, in this order (tests decode planner grpo stage1 world language)
# LIMITS   factor of the parts' time limits in percent (100)
# Each part has its own time limit and leaves its JSON even if another fails. The exit code tells how many did not end.
set -euo pipefail
for name in OUT WHEELS; do # relative ones are of the folder where this is called
  [[ -z "${!name:-}" || "${!name}" == /* ]] || printf -v "$name" '%s/%s' "$PWD" "${!name}"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device="${DEVICE:-cuda}" size="${SIZE:-full}" out="${OUT:-gpu_check}" wheels="${WHEELS:-wheels}"
declare -A limit=([tests]=60 [decode]=20 [planner]=70 [grpo]=110 [stage1]=120 [world]=50 [language]=50) # 480 s
parts="${PARTS:-tests decode planner grpo stage1 world language}"

has_torch() { command -v "$1" > /dev/null && "$1" -c "import importlib.util as i, sys; sys.exit(i.find_spec('torch') is None)"; }
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  for candidate in "${TRIVIUM_VENV:-.venv}/bin/python" python3.12 python3.11 python3; do
    if has_torch "$candidate"; then python="$candidate"; break; fi
  done
fi
if [[ -z "$python" ]] || ! has_torch "$python"; then
  echo "gpu_check.sh: no Python with torch was found; set PYTHON to one" >&2
  exit 64
fi
mkdir -p "$out"
out="$(cd "$out" && pwd)"

# what cannot be imported is installed from the wheels, into a folder of this run
missing="$("$python" scripts/gpu_needs.py --missing)"
if [[ -n "$missing" ]]; then
  if [[ ! -d "$wheels" ]]; then
    echo "gpu_check.sh: $python lacks" $missing "and there is no folder $wheels: scripts/gpu_wheels.sh fills one" >&2
    exit 64
  fi
  # shellcheck disable=SC2086
  "$python" -m pip install --quiet --no-index --no-deps --no-warn-script-location --find-links "$wheels" \
    --target "$out/site" $missing
fi
export PYTHONPATH="$out/site:$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[[ "$device" == cpu ]] && export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

unfinished=0
for part in $parts; do
  seconds=$(( ${limit[$part]:?there is no such part} * ${LIMITS:-100} / 100 ))
  began=$SECONDS code=0
  timeout --kill-after=5 "$seconds" "$python" benchmarks/gpu_check.py "$part" --device "$device" --size "$size" \
    --output "$out/$part.json.new" > "$out/$part.log" 2>&1 || code=$?
  if [[ "$code" == 0 ]]; then
    mv "$out/$part.json.new" "$out/$part.json"
    printf '%-9s %4d s\n' "$part" $(( SECONDS - began ))
  else
    why="exit code $code, see $part.log"
    [[ "$code" == 124 || "$code" == 137 ]] && why="it took longer than $seconds s"
    rm -f "$out/$part.json.new"
    "$python" benchmarks/gpu_check.py failed --why "$why" --output "$out/$part.json"
    printf '%-9s %s\n' "$part" "$why"
    unfinished=$(( unfinished + 1 ))
  fi
done
"$python" benchmarks/gpu_check.py results "$out" > "$out/results.md"
sed -n '/^## What fell short/,$p' "$out/results.md"
echo "All rows: $out/results.md"
exit "$unfinished"
