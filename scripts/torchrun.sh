#!/usr/bin/env bash
# Starts a Trivium module with one process per device, on one node or many.
#   bash scripts/torchrun.sh stage2_dit.train experiment=demo data.train=INDEX data.hidden_cache=CACHE output_dir=DIR
#   NNODES=8 NODE_RANK=$RANK RDZV_ENDPOINT=node0:29500 bash scripts/torchrun.sh stage1_vlm.train ...
# NNODES (1), NODE_RANK (0), NPROC_PER_NODE (number of GPUs, at least 1), RDZV_ENDPOINT (host:port of the first node;
# a free port of this machine by default), RDZV_ID (trivium), PYTHON_BIN (the checkout's .venv/bin/python), DRY_RUN=1
# only prints. It runs in the folder where it is called, so relative paths mean what they say there.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${TRIVIUM_VENV:-.venv}"
[[ "$venv" == /* ]] || venv="$root/$venv"
(( $# >= 1 )) || { echo "usage: torchrun.sh MODULE [overrides ...]" >&2; exit 2; }

python_bin="${PYTHON_BIN:-$venv/bin/python}"
gpus=0
command -v nvidia-smi > /dev/null && gpus="$(nvidia-smi --list-gpus 2> /dev/null | wc -l)"
command=(
  "$python_bin" -m torch.distributed.run
  "--nnodes=${NNODES:-1}" "--node-rank=${NODE_RANK:-0}" "--nproc-per-node=${NPROC_PER_NODE:-$(( gpus > 0 ? gpus : 1 ))}"
  --rdzv-backend=c10d "--rdzv-endpoint=${RDZV_ENDPOINT:-localhost:0}" "--rdzv-id=${RDZV_ID:-trivium}"
  -m "$@"
)
if [[ "${DRY_RUN:-0}" == "1" ]]; then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${command[@]}"
