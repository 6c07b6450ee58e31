#!/usr/bin/env bash
# The three stages on real recordings: stage 1 on DriveLM (questions on nuScenes photographs), stages 2 and 3 and the
# scores on nuScenes scenes in ScenarioNet's form, with rendered pictures and rebuilt maps ("approx").
#   DRIVELM=v1_1_train_nus.json SCENARIOS=FOLDER_OF_PKL bash scripts/real_data.sh
# By default both are looked for in $TRIVIUM_REFERENCE_DATA/real. TEST_SCENES (names without .pkl) are kept apart from
# training; OUTPUT_DIR (runs/real_data), STEPS (optimizer steps of each stage, for a quick look), PYTHON_BIN.
# Run it again after an interruption: it goes on where it stopped. DRY_RUN=1 only prints. See docs/real_data.md.
set -euo pipefail
for name in DRIVELM SCENARIOS OUTPUT_DIR; do # relative ones are of the folder where this is called
  [[ -z "${!name:-}" || "${!name}" == /* ]] || printf -v "$name" '%s/%s' "$PWD" "${!name}"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

reference="${TRIVIUM_REFERENCE_DATA:+$TRIVIUM_REFERENCE_DATA/real}"
drivelm="${DRIVELM:-${reference:+$reference/drivelm/train_sample.json}}"
scenarios="${SCENARIOS:-${reference:+$reference/nuscenes_mini}}"
job="${OUTPUT_DIR:-runs/real_data}"
read -ra test_scenes <<< "${TEST_SCENES:-scene-0553 scene-0757}"
# shellcheck source=scripts/steps.sh
source scripts/steps.sh

stop() { echo "real_data.sh: $1" >&2; exit 2; }
steps=()
[[ -z "${STEPS:-}" ]] || steps=("trainer.max_steps=$STEPS")
if [[ "${DRY_RUN:-0}" != "1" ]]; then
  [[ -n "$drivelm" && -f "$drivelm" ]] || stop "DRIVELM='$drivelm' is no file: give DriveLM's JSON (its pictures beside it)"
  [[ -d "$scenarios" ]] || stop "SCENARIOS='$scenarios' is no folder: give the folder of ScenarioNet's *.pkl"
  for name in "${test_scenes[@]}"; do
    [[ -f "$scenarios/$name.pkl" ]] || stop "TEST_SCENES: $scenarios/$name.pkl does not exist"
  done
  # Whole scenes go to one part or the other: windows of one scene overlap.
  mkdir -p "$job/scenes/train" "$job/scenes/test"
  for path in "$scenarios"/*.pkl; do
    name="$(basename "$path" .pkl)" part=train
    [[ " ${test_scenes[*]} " == *" $name "* ]] && part=test
    ln -sfn "$(realpath "$path")" "$job/scenes/$part/$name.pkl"
  done
fi

step drivelm "DriveLM as conversations" stage1_vlm.data.drivelm source="$drivelm" output_dir="$job/drivelm"
step stage1 "fine-tunes a tiny InternVL on DriveLM" stage1_vlm.train experiment=real_data data.mixture="$job/drivelm/mixture.json" \
  "${steps[@]}" output_dir="$job/stage1"
for part in train test; do
  data=(data.root="$job/scenes" data.split="$part")
  step "world_$part" "pictures and index of $part" navsim_ext.rendering.render "${data[@]}" "image_size=[480,270]" \
    output_dir="$job/world/$part"
  step "export_$part" "hidden states of $part" stage1_vlm.export experiment=real_data model_path="$job/stage1" \
    data.index="$job/world/$part/index" device=cpu output_dir="$job/hidden/$part"
  step "metric_$part" "metric cache of $part" navsim_ext.metric_cache.build "${data[@]}" workers=sequential \
    output_dir="$job/metric_cache/$part"
done
trained_on=(data.train="$job/world/train/index" data.hidden_cache="$job/hidden/train")
step stage2 "diffusion planner by imitation" stage2_dit.train experiment=real_data "${trained_on[@]}" "${steps[@]}" output_dir="$job/stage2"
il="$job/stage2/version_0/checkpoints/last.ckpt"
step stage3 "reinforcement by DiffGRPO" stage3_grpo.train experiment=real_data init="$il" "${trained_on[@]}" \
  data.metric_cache="$job/metric_cache/train" "${steps[@]}" output_dir="$job/stage3"
rl="$job/stage3/version_0/checkpoints/last.ckpt"

scored=()
rate() { # planner's name in the table, overrides ...
  local name="$1"; shift
  step "score_$name" "plans and scores" navsim_ext.evaluation.score experiment=real_data name="$name" \
    data.index="$job/world/test/index" data.split=nuscenes_mini_test metric_cache="$job/metric_cache/test" \
    output_dir="$job/scores/$name" "$@"
  scored+=("$job/scores/$name")
}
cached=(hidden=cached hidden.folder="$job/hidden/test")
rate human planner=human
rate constant_velocity planner=constant_velocity
rate pdm_closed planner=pdm_closed
rate diffusion_il planner=diffusion planner.checkpoint="$il" "${cached[@]}"
rate diffusion_rl planner=diffusion planner.checkpoint="$rl" "${cached[@]}"
[[ "${DRY_RUN:-0}" == "1" ]] || echo "== all planners (maps rebuilt from lane centre lines: approx)"
bash scripts/run.sh navsim_ext.evaluation.show \
  scores="[$(IFS=,; echo "${scored[*]}")]"
