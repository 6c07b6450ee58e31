#!/usr/bin/env bash
# Scores a planner: PDMS v1.1 and EPDMS v2.2 with intervals, per-token tables.
#   bash scripts/eval_pdm.sh planner=diffusion planner.checkpoint=PLANNER hidden=cached hidden.folder=CACHE \
#     data.index=INDEX metric_cache=CACHE output_dir=DIR
#   bash scripts/eval_pdm.sh planner=diffusion planner.checkpoint=PLANNER hidden=live hidden.model_path=CHECKPOINT \
#     data.index=INDEX metric_cache=CACHE output_dir=DIR
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" navsim_ext.evaluation.score "$@"
