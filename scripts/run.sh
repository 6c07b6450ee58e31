#!/usr/bin/env bash
# Starts a Trivium module in one process: bash scripts/run.sh navsim_ext.evaluation.score planner=human ...
# PYTHON_BIN (.venv/bin/python); DRY_RUN=1 only prints the command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
(( $# >= 1 )) || { echo "usage: run.sh MODULE [overrides ...]" >&2; exit 2; }
command=("${PYTHON_BIN:-${TRIVIUM_VENV:-.venv}/bin/python}" -m "$@")
if [[ "${DRY_RUN:-0}" == "1" ]]; then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi
exec "${command[@]}"
