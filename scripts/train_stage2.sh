#!/usr/bin/env bash
# Stage 2: trains the diffusion planner on cached hidden states. EMA=1 keeps an exponential moving average of the weights.
#   EXPERIMENT=recogdrive_2b EMA=1 bash scripts/train_stage2.sh data.train=INDEX data.hidden_cache=CACHE output_dir=DIR
set -euo pipefail
ema=()
[[ "${EMA:-0}" == "1" ]] && ema=('callbacks=[default,best,storage,ema]')
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" stage2_dit.train "experiment=${EXPERIMENT:-recogdrive_2b}" "${ema[@]}" "$@"
