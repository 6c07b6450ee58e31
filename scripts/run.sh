#!/usr/bin/env bash
# Starts a Trivium module in one process: bash scripts/run.sh navsim_ext.evaluation.score planner=human ...
# It runs in the folder where it is called, so relative paths mean what they say there. PYTHON_BIN (the checkout's
# .venv/bin/python); DRY_RUN=1 only prints the command.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${TRIVIUM_VENV:-.venv}"
[[ "$venv" == /* ]] || venv="$root/$venv"
(( $# >= 1 )) || { echo "usage: run.sh MODULE [overrides ...]" >&2; exit 2; }
command=("${PYTHON_BIN:-$venv/bin/python}" -m "$@")
if [[ "${DRY_RUN:-0}" == "1" ]]; then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi
exec "${command[@]}"
