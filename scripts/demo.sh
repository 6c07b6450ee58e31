#!/usr/bin/env bash
# The whole job on a synthetic world: world, stage 1, hidden cache, metric cache, stage 2, stage 3, scores, report.
#   bash scripts/demo.sh                       about fifteen minutes on two CPU cores, after installation
#   EXPERIMENT=demo_gpu bash scripts/demo.sh   the bigger twin for one GPU
# DEMO_DIR (demo) is where everything goes. Run it again after an interruption: it goes on where it stopped. Steps
# whose command has not changed since they finished are not run again. DRY_RUN=1 only prints the commands.
set -euo pipefail
for name in DEMO_DIR; do # relative ones are of the folder where this is called
  [[ -z "${!name:-}" || "${!name}" == /* ]] || printf -v "$name" '%s/%s' "$PWD" "${!name}"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ "${DRY_RUN:-0}" == "1" ]] || bash scripts/setup.sh

job="${DEMO_DIR:-demo}"
experiment="${EXPERIMENT:-demo}"
device="${DEVICE:-cpu}"
processes="${NPROC_PER_NODE:-2}" # of stage 1
[[ "$experiment" == "demo_gpu" ]] && { device="${DEVICE:-cuda}"; processes="${NPROC_PER_NODE:-1}"; }
# shellcheck source=scripts/steps.sh
source scripts/steps.sh
began=$SECONDS

world="$job/world"
step world "towns, traffic, camera pictures, questions" \
  navsim_ext.synthetic.build experiment="$experiment" output_dir="$world"

for split in trainval test; do
  beside "metric_$split" "metric cache of $split" navsim_ext.metric_cache.build \
    data.root="$world" data.split="$split" workers=sequential output_dir="$job/metric_cache/$split"
done
beside second_stage "a second stage: other drivers in the ego's seat" navsim_ext.synthetic.second_stage \
  data.root="$world" groups=8 pairs=3
launcher=torchrun NPROC_PER_NODE="$processes" step stage1 "fine-tunes a tiny InternVL on driving questions" \
  stage1_vlm.train experiment="$experiment" data.mixture="$world/qa/train.json" output_dir="$job/stage1"
await

index trainval trainval
index train trainval "$world/train_test_split/scene_filter/train.yaml"
index val trainval "$world/train_test_split/scene_filter/val.yaml"
index test test

two_stage="$world/train_test_split/synthetic_two_stage.yaml"
beside metric_two_stage "metric cache of both stages" navsim_ext.metric_cache.build \
  data.root="$world" data.split_config="$two_stage" workers=sequential output_dir="$job/metric_cache/two_stage"
step index_second "scene index of the second stage" navsim_ext.dataset data.root="$world" data.split=test \
  data.second_stage="$world/synthetic_two_stage" output_dir="$job/index/second"

for split in trainval test second; do
  beside "export_$split" "hidden states of $split" stage1_vlm.export experiment="$experiment" \
    model_path="$job/stage1" data.index="$job/index/$split" device="$device" output_dir="$job/hidden/$split"
done
step stage1_accuracy "answers on the unseen town, with its pictures swapped as control" \
  stage1_vlm.evaluate experiment="$experiment" model_path="$job/stage1" mixture="$world/qa/test.json" \
  device="$device" output_dir="$job/stage1_accuracy"
await

data=(data.root="$world" data.train.index="$job/index/train" data.val.index="$job/index/val"
  data.test.index="$job/index/test" data.hidden_cache="$job/hidden/trainval" data.hidden_cache_test="$job/hidden/test")
step stage2 "diffusion planner by imitation; beside it the same without sight" stage2_dit.experiment \
  experiment="$experiment" "${data[@]}" data.metric_cache="$job/metric_cache/test" device="$device" output_dir="$job/stage2"
il="$job/stage2/diffusion_il/version_0/checkpoints/last.ckpt"
step stage3 "reinforcement on PDM scores" stage3_grpo.experiment experiment="$experiment" init="$il" \
  "${data[@]}" data.metric_cache="$job/metric_cache/trainval" data.metric_cache_test="$job/metric_cache/test" \
  device="$device" output_dir="$job/stage3"
rl="$job/stage3/seed_0/version_0/checkpoints/best_pdm_score.ckpt"

scored=()
rate() { # planner's name in the table, overrides ...
  local name="$1"; shift
  step "score_$name" "plans and scores the unseen town" navsim_ext.evaluation.score experiment="$experiment" \
    name="$name" data.index="$job/index/test" data.split=test metric_cache="$job/metric_cache/test" \
    device="$device" output_dir="$job/scores/$name" "$@"
  scored+=("$job/scores/$name")
}
planner=(planner=diffusion planner.candidates=16) # of 16 samples the one nearest to all others is driven
cached=(hidden=cached hidden.folder="$job/hidden/test")
rate constant_velocity planner=constant_velocity
rate human planner=human
rate pdm_closed planner=pdm_closed
# So small a model may write a trajectory that cannot be read: such answers are invalid, counted and left out.
rate vlm_text planner=vlm_text planner.model_path="$job/stage1" planner.template=brief require_valid=false
rate diffusion_il "${planner[@]}" planner.checkpoint="$il" "${cached[@]}"
rate diffusion_rl "${planner[@]}" planner.checkpoint="$rl" "${cached[@]}"

staged=()
rate_two_stages() { # planner's name in the table, overrides ...
  local name="$1"; shift
  step "two_stage_$name" "drives both stages of NAVSIM 2's protocol" navsim_ext.evaluation.score \
    experiment="$experiment" protocol=two_stage name="$name" data.split_config="$two_stage" \
    data.index="$job/index/test" data.second_stage="$job/index/second" metric_cache="$job/metric_cache/two_stage" \
    device="$device" output_dir="$job/scores/two_stage_$name" "$@"
  staged+=("$job/scores/two_stage_$name")
}
cached+=(data.second_stage_hidden="$job/hidden/second")
rate_two_stages diffusion_il "${planner[@]}" planner.checkpoint="$il" "${cached[@]}"
rate_two_stages diffusion_rl "${planner[@]}" planner.checkpoint="$rl" probes=true "${cached[@]}"

scores="$(IFS=,; echo "${scored[*]}")" stages="$(IFS=,; echo "${staged[*]}")"
step report "one HTML file of everything" navsim_ext.evaluation.report \
  experiment="$experiment" scores="[$scores]" two_stage="[$stages]" data.root="$world" data.split=test \
  "training=[{title: Stage 1,folder: '$job/stage1',columns: null},{title: Stage 2,folder: '$job/stage2/diffusion_il',columns: null},{title: Stage 3,folder: '$job/stage3/seed_0',columns: null}]" \
  recorder.folder="$job/stage3/seed_0" "comparisons=[[diffusion_il,diffusion_rl]]" output_dir="$job/report"
bash scripts/run.sh navsim_ext.evaluation.show scores="[$scores]" two_stage="[$stages]"
[[ "${DRY_RUN:-0}" == "1" ]] || printf 'Report: %s/report/report.html   (%d s)\n' "$job" $(( SECONDS - began ))
