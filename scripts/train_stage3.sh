#!/usr/bin/env bash
# Stage 3: reinforces the planner by DiffGRPO with the PDM score as reward.
#   EXPERIMENT=recogdrive_2b bash scripts/train_stage3.sh output_dir=... reference=IL.ckpt metric_cache=...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash scripts/torchrun.sh stage3_grpo.train "experiment=${EXPERIMENT:-recogdrive_2b}" "$@"
