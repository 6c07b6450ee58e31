#!/usr/bin/env bash
# Stage 3: reinforces the planner by DiffGRPO with the PDM score as reward.
#   EXPERIMENT=recogdrive_2b bash scripts/train_stage3.sh init=PLANNER data.train=INDEX data.hidden_cache=CACHE \
#     data.metric_cache=CACHE output_dir=DIR
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" stage3_grpo.train "experiment=${EXPERIMENT:-recogdrive_2b}" "$@"
