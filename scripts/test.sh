#!/usr/bin/env bash
# Runs what CI runs: set-up, lint, import directions, tests. Further arguments go to pytest.
#   bash scripts/test.sh                 the suite (minutes on 2 cores)
#   bash scripts/test.sh --slow          the slow tests too
#   bash scripts/test.sh --kernels       only the tests that train, with the plain kernels of another CPU (x86)
#   bash scripts/test.sh --processes 1   in one process, as pytest alone does (for --pdb and -s); the default is
#                                        2, or 1 on one core; each takes a file of tests at a time and about 2 GB
# Reference data (golden and real sets) is looked for in TRIVIUM_REFERENCE_DATA; without it those tests skip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
bin="$(cd "${TRIVIUM_VENV:-.venv}/bin" && pwd)"
# Two OpenMP threads on a loaded machine can be 100 times slower than one.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HYDRA_FULL_ERROR=1 DS_ACCELERATOR=cpu RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
export PATH="$bin:$PATH"

processes=$(($(getconf _NPROCESSORS_ONLN) > 1 ? 2 : 1))
args=()
while (($#)); do
  case "$1" in
    --slow) args+=(-m "slow or not slow") ;;
    --processes | --processes=*)
      if [[ "$1" == --processes ]]; then shift; fi
      processes="${1:-}" && processes="${processes#--processes=}"
      [[ "$processes" =~ ^[1-9][0-9]*$ ]] || { echo "test.sh: --processes needs a number of 1 or more" >&2; exit 2; } ;;
    --kernels) # sums are rounded otherwise: no verdict may hang on that
      export ATEN_CPU_CAPABILITY=default DNNL_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem
      args+=(tests/stage1_vlm tests/stage2_dit tests/sim_agents tests/stage3_grpo
        tests/navsim_ext/test_runtime_resume.py tests/navsim_ext/test_runtime_folder.py tests/test_loss_traces.py) ;;
    *) args+=("$1") ;;
  esac
  shift
done
if ((processes > 1)) && ! python -c 'import xdist' 2> /dev/null; then
  echo "test.sh: pytest-xdist is not installed: the tests run in one process" >&2
  processes=1
fi
((processes > 1)) && args+=(--numprocesses "$processes" --dist loadfile) # the tests of a file share what they made
ruff check .
lint-imports
python -m pytest "${args[@]}"
