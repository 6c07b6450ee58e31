#!/usr/bin/env bash
# Runs the VLM of stage 1 over a split and writes the hidden cache that stages 2 and 3 read. Resumable.
#   EXPERIMENT=recogdrive_2b bash scripts/export_hidden.sh model_path=CHECKPOINT data.index=INDEX output_dir=CACHE
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" stage1_vlm.export "experiment=${EXPERIMENT:-recogdrive_2b}" "$@"
