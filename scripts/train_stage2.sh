#!/usr/bin/env bash
# Stage 2: trains the diffusion planner on cached hidden states. EMA=1 keeps an exponential moving average of the weights.
#   EXPERIMENT=recogdrive_2b EMA=1 bash scripts/train_stage2.sh output_dir=... data.hidden=...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ema=()
[[ "${EMA:-0}" == "1" ]] && ema=('callbacks=[default,best,storage,ema]')
exec bash scripts/torchrun.sh stage2_dit.train "experiment=${EXPERIMENT:-recogdrive_2b}" "${ema[@]}" "$@"
