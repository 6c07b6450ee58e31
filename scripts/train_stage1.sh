#!/usr/bin/env bash
# Stage 1: fine-tunes the VLM on driving questions and answers. Further arguments are configuration overrides.
#   EXPERIMENT=recogdrive_8b NNODES=8 NODE_RANK=$RANK RDZV_ENDPOINT=node0:29500 bash scripts/train_stage1.sh \
#     model_path=CHECKPOINT data.mixture=MIXTURE.json output_dir=DIR
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" stage1_vlm.train "experiment=${EXPERIMENT:-recogdrive_2b}" "$@"
