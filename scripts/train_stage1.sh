#!/usr/bin/env bash
# Stage 1: fine-tunes the VLM on driving questions and answers. Further arguments are configuration overrides.
#   EXPERIMENT=recogdrive_8b NNODES=8 NODE_RANK=$RANK RDZV_ENDPOINT=node0:29500 bash scripts/train_stage1.sh output_dir=...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash scripts/torchrun.sh stage1_vlm.train "experiment=${EXPERIMENT:-recogdrive_2b}" "$@"
