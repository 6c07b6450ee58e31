#!/usr/bin/env bash
# Scores a planner: PDMS v1.1 and EPDMS v2.2 with intervals, per-token tables.
#   bash scripts/eval_pdm.sh planner=diffusion planner.checkpoint=last.ckpt hidden=cached hidden.folder=... output_dir=...
#   bash scripts/eval_pdm.sh planner=diffusion planner.checkpoint=last.ckpt hidden=live hidden.model_path=... output_dir=...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash scripts/run.sh navsim_ext.evaluation.score "$@"
