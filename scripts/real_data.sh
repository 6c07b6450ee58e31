#!/usr/bin/env bash
# The three stages on real recordings: stage 1 on DriveLM (questions on nuScenes photographs), stages 2 and 3 and the
# scores on nuScenes scenes in ScenarioNet's form, with rendered pictures and rebuilt maps ("approx").
#   DRIVELM=v1_1_train_nus.json SCENARIOS=FOLDER_OF_PKL bash scripts/real_data.sh
# By default both are looked for in $TRIVIUM_REFERENCE_DATA/real. TEST_SCENES (names without .pkl) are kept apart from
# training; OUTPUT_DIR (runs/real_data), STEPS (optimizer steps of each stage, for a quick look), PYTHON_BIN, DRY_RUN=1.
# Every step can be interrupted; the same command goes on. See docs/real_data.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

reference="${TRIVIUM_REFERENCE_DATA:+$TRIVIUM_REFERENCE_DATA/real}"
drivelm="${DRIVELM:-${reference:+$reference/drivelm/train_sample.json}}"
scenarios="${SCENARIOS:-${reference:+$reference/nuscenes_mini}}"
output="${OUTPUT_DIR:-runs/real_data}"
read -ra test_scenes <<< "${TEST_SCENES:-scene-0553 scene-0757}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

stop() { echo "real_data.sh: $1" >&2; exit 2; }
[[ -n "$drivelm" && -f "$drivelm" ]] || stop "DRIVELM='$drivelm' is no file: give DriveLM's JSON (its pictures beside it)"
[[ -d "$scenarios" ]] || stop "SCENARIOS='$scenarios' is no folder: give the folder of ScenarioNet's *.pkl"
for name in "${test_scenes[@]}"; do
  [[ -f "$scenarios/$name.pkl" ]] || stop "TEST_SCENES: $scenarios/$name.pkl does not exist"
done

steps=()
[[ -z "${STEPS:-}" ]] || steps=("trainer.max_steps=$STEPS")
run() { echo "== $1"; shift; bash scripts/run.sh "$@"; }

# Whole scenes go to one part or the other: windows of one scene overlap.
mkdir -p "$output/scenes/train" "$output/scenes/test"
for path in "$scenarios"/*.pkl; do
  name="$(basename "$path" .pkl)" part=train
  [[ " ${test_scenes[*]} " == *" $name "* ]] && part=test
  ln -sfn "$(realpath "$path")" "$output/scenes/$part/$name.pkl"
done

run "DriveLM as conversations" stage1_vlm.data.drivelm source="$drivelm" output_dir="$output/drivelm"
run "stage 1 on DriveLM" stage1_vlm.train experiment=real_data data.mixture="$output/drivelm/mixture.json" \
  "${steps[@]}" output_dir="$output/stage1"
for part in train test; do
  data=(data.root="$output/scenes" data.split="$part")
  run "pictures and index, $part" navsim_ext.synthetic.render "${data[@]}" "image_size=[480,270]" \
    output_dir="$output/world/$part"
  run "hidden states, $part" stage1_vlm.export experiment=real_data model_path="$output/stage1" \
    data.index="$output/world/$part/index" device=cpu output_dir="$output/hidden/$part"
  run "metric cache, $part" navsim_ext.metric_cache.build "${data[@]}" data.source=scenarionet workers=sequential \
    output_dir="$output/metric_cache/$part"
done
trained_on=(data.train="$output/world/train/index" data.hidden_cache="$output/hidden/train")
run "stage 2" stage2_dit.train experiment=real_data "${trained_on[@]}" "${steps[@]}" output_dir="$output/stage2"
il="$output/stage2/version_0/checkpoints/last.ckpt"
run "stage 3" stage3_grpo.train experiment=real_data init="$il" "${trained_on[@]}" \
  data.metric_cache="$output/metric_cache/train" "${steps[@]}" output_dir="$output/stage3"
rl="$output/stage3/version_0/checkpoints/last.ckpt"

scored=()
rate() { # planner's name in the table, overrides ...
  local name="$1"; shift
  run "score of $name" navsim_ext.evaluation.score experiment=real_data name="$name" \
    data.index="$output/world/test/index" data.split=nuscenes_mini_test metric_cache="$output/metric_cache/test" \
    output_dir="$output/scores/$name" "$@"
  scored+=("$output/scores/$name")
}
cached=(hidden=cached hidden.folder="$output/hidden/test")
rate human planner=human
rate constant_velocity planner=constant_velocity
rate pdm_closed planner=pdm_closed
rate diffusion_il planner=diffusion planner.checkpoint="$il" "${cached[@]}"
rate diffusion_rl planner=diffusion planner.checkpoint="$rl" "${cached[@]}"
run "all planners (maps rebuilt from lane centre lines: approx)" navsim_ext.evaluation.show \
  scores="[$(IFS=,; echo "${scored[*]}")]"
