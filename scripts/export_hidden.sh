#!/usr/bin/env bash
# Runs the VLM of stage 1 over a split and writes the hidden cache that stages 2 and 3 read. Resumable.
#   EXPERIMENT=recogdrive_2b bash scripts/export_hidden.sh data.split=navtrain output_dir=...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash scripts/torchrun.sh stage1_vlm.export "experiment=${EXPERIMENT:-recogdrive_2b}" "$@"
