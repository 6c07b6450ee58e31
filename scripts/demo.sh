#!/usr/bin/env bash
# The whole job on a synthetic world: world, stage 1, hidden cache, metric cache, stage 2, stage 3, scores, report.
#   bash scripts/demo.sh                       about ten minutes on two CPU cores, after installation
#   EXPERIMENT=demo_gpu bash scripts/demo.sh   the bigger twin for one GPU
# DEMO_DIR (demo) is where everything goes. Run it again after an interruption: it goes on where it stopped. Steps
# whose command has not changed since they finished are not run again. DRY_RUN=1 only prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ "${DRY_RUN:-0}" == "1" ]] || bash scripts/setup.sh

demo="${DEMO_DIR:-demo}"
experiment="${EXPERIMENT:-demo}"
device="${DEVICE:-cpu}"
[[ "$experiment" == "demo_gpu" ]] && device="${DEVICE:-cuda}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
began=$SECONDS
background=()
# shellcheck disable=SC2317 # called by the traps
stop_background() { (( ${#background[@]} == 0 )) || kill "${background[@]}" 2> /dev/null || true; }
trap stop_background EXIT
trap 'echo "Interrupted; run the same command again to go on." >&2; exit 130' INT TERM

step() { # name, what it does, module, overrides ...: runs it unless this very command has finished before
  local name="$1" what="$2"; shift 2
  local stamp="$demo/.done/$name" command="$*"
  if [[ "${DRY_RUN:-0}" == "1" ]]; then
    DRY_RUN=1 bash scripts/run.sh "$@"
    return
  fi
  if [[ -f "$stamp" && "$(cat "$stamp")" == "$command" ]]; then
    printf '== %-16s done before\n' "$name"
    return
  fi
  printf '== %-16s %s\n' "$name" "$what"
  local start=$SECONDS
  bash scripts/run.sh "$@" || { echo "demo.sh: step $name failed; what finished is kept in $demo" >&2; exit 1; }
  mkdir -p "$demo/.done"
  echo "$command" > "$stamp"
  printf '== %-16s %d s\n' "$name" $(( SECONDS - start ))
}

beside() { # as step, on the second core; what it prints goes to a log file
  local name="$1"
  if [[ "${DRY_RUN:-0}" == "1" ]]; then step "$@"; return; fi
  mkdir -p "$demo/logs"
  step "$@" > "$demo/logs/$name.log" 2>&1 &
  background+=($!)
}

await() { # waits for what runs beside
  local pid
  for pid in "${background[@]}"; do
    wait "$pid" || { echo "demo.sh: a step beside failed; see $demo/logs" >&2; tail -n 20 "$demo"/logs/*.log >&2; exit 1; }
  done
  background=()
}

world="$demo/world"
step world "towns, traffic, camera pictures, questions" \
  navsim_ext.synthetic.build experiment="$experiment" output_dir="$world"

for split in trainval test; do
  beside "metric_$split" "metric cache of $split" navsim_ext.metric_cache.build \
    data.root="$world" data.split="$split" workers=sequential output_dir="$demo/metric_cache/$split"
done
step stage1 "fine-tunes a tiny InternVL on driving questions" \
  stage1_vlm.train experiment="$experiment" data.mixture="$world/qa/train.json" output_dir="$demo/stage1"
await

index() { # part, split, scene filter or nothing
  step "index_$1" "scene index of $1" navsim_ext.dataset \
    data.root="$world" data.split="$2" ${3:+data.scene_filter="$3"} output_dir="$demo/index/$1"
}
index trainval trainval
index train trainval "$world/train_test_split/scene_filter/train.yaml"
index val trainval "$world/train_test_split/scene_filter/val.yaml"
index test test

for split in trainval test; do
  beside "export_$split" "hidden states of $split" stage1_vlm.export experiment="$experiment" \
    model_path="$demo/stage1" data.index="$demo/index/$split" device="$device" output_dir="$demo/hidden/$split"
done
step stage1_accuracy "answers on the unseen town, with its pictures swapped as control" \
  stage1_vlm.evaluate experiment="$experiment" model_path="$demo/stage1" mixture="$world/qa/test.json" \
  device="$device" output_dir="$demo/stage1_accuracy"
await

planner_data=(data.train="$demo/index/train" data.val="$demo/index/val" data.hidden_cache="$demo/hidden/trainval"
  data.metric_cache="$demo/metric_cache/trainval")
step stage2 "diffusion planner by imitation" \
  stage2_dit.train experiment="$experiment" "${planner_data[@]}" output_dir="$demo/stage2"
il="$demo/stage2/version_0/checkpoints/last.ckpt"
step stage3 "reinforcement by DiffGRPO on PDM scores" \
  stage3_grpo.train experiment="$experiment" init="$il" "${planner_data[@]}" output_dir="$demo/stage3"
rl="$demo/stage3/version_0/checkpoints/best_pdm_score.ckpt"

scored=()
rate() { # planner's name in the table, overrides ...
  local name="$1"; shift
  step "score_$name" "plans and scores the unseen town" navsim_ext.evaluation.score experiment="$experiment" \
    name="$name" data.index="$demo/index/test" data.split=test metric_cache="$demo/metric_cache/test" \
    device="$device" output_dir="$demo/scores/$name" "$@"
  scored+=("$demo/scores/$name")
}
cached=(hidden=cached hidden.folder="$demo/hidden/test")
rate constant_velocity planner=constant_velocity
rate human planner=human
rate pdm_closed planner=pdm_closed
# So small a model may write no trajectory that can be read: then its row holds a dash and the count of invalid answers.
rate vlm_text planner=vlm_text planner.model_path="$demo/stage1" require_valid=false
rate diffusion_il planner=diffusion planner.checkpoint="$il" "${cached[@]}"
rate diffusion_rl planner=diffusion planner.checkpoint="$rl" "${cached[@]}"

scores="$(IFS=,; echo "${scored[*]}")"
step report "one HTML file of everything" navsim_ext.evaluation.report \
  experiment="$experiment" scores="[$scores]" data.root="$world" data.split=test \
  "training=[{title: Stage 1,folder: $demo/stage1,columns: null},{title: Stage 2,folder: $demo/stage2,columns: null},{title: Stage 3,folder: $demo/stage3,columns: null}]" \
  recorder.folder="$demo/stage3" "comparisons=[[diffusion_il,diffusion_rl]]" output_dir="$demo/report"
bash scripts/run.sh navsim_ext.evaluation.show scores="[$scores]"
[[ "${DRY_RUN:-0}" == "1" ]] || printf 'Report: %s/report/report.html   (%d s)\n' "$demo" $(( SECONDS - began ))
