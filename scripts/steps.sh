# shellcheck shell=bash
# Sourced by the demos and the experiments: steps of one job in the folder $job, each run once. A step whose command has not
# changed since it finished is not run again, so the same script goes on after an interruption. DRY_RUN=1 only prints.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
script="$(basename "$0")"
background=()
# shellcheck disable=SC2317 # called by the traps
stop_background() { (( ${#background[@]} == 0 )) || kill "${background[@]}" 2> /dev/null || true; }
trap stop_background EXIT
trap 'echo "Interrupted; run the same command again to go on." >&2; exit 130' INT TERM

measure_processor() { # sets $processor to the processor seconds of this shell's children that have ended
  local file; file="$(mktemp)"
  times > "$file" # not in $(...): that shell would have no children
  processor="$(awk 'NR == 2 { for (i = 1; i <= 2; i++) { split($i, t, /[ms]/); s += 60 * t[1] + t[2] } printf "%d", s }' "$file")"
  rm -f "$file"
}

# By run.sh in one process, or with launcher=torchrun in NPROC_PER_NODE processes.
step() { # name, what it does, module, overrides ...: runs it unless this very command has finished before
  local name="$1" what="$2"; shift 2
  local stamp="$job/.done/$name" command="$*" launch="scripts/${launcher:-run}.sh"
  if [[ "${DRY_RUN:-0}" == "1" ]]; then
    DRY_RUN=1 bash "$launch" "$@"
    return
  fi
  if [[ -f "$stamp" && "$(cat "$stamp")" == "$command" ]]; then
    printf '== %-16s done before\n' "$name"
    return
  fi
  printf '== %-16s %s\n' "$name" "$what"
  local start=$SECONDS processor before
  measure_processor; before=$processor
  bash "$launch" "$@" || { echo "$script: step $name failed; what finished is kept in $job" >&2; exit 1; }
  mkdir -p "$job/.done"
  echo "$command" > "$stamp"
  measure_processor
  printf '== %-16s %d s, %d s of processor time\n' "$name" $(( SECONDS - start )) $(( processor - before ))
}

beside() { # as step, on the second core; what it prints goes to a log file
  local name="$1"
  if [[ "${DRY_RUN:-0}" == "1" ]]; then step "$@"; return; fi
  mkdir -p "$job/logs"
  step "$@" > "$job/logs/$name.log" 2>&1 &
  background+=($!)
}

await() { # waits for what runs beside
  local pid
  for pid in "${background[@]}"; do
    wait "$pid" || { echo "$script: a step beside failed; see $job/logs" >&2; tail -n 20 "$job"/logs/*.log >&2; exit 1; }
  done
  background=()
}

index() { # part, split, scene filter or nothing
  step "index_$1" "scene index of $1" navsim_ext.dataset \
    data.root="$job/world" data.split="$2" ${3:+data.scene_filter="$3"} output_dir="$job/index/$1"
}
