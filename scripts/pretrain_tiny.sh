#!/usr/bin/env bash
# Trains the tiny InternVL that ships with the suite (init=tiny of stage 1) on synthetic worlds: questions about pictures
# of all types, those about text and trajectories, in the training towns only. Its accuracy is measured in the unseen
# towns at every kept checkpoint, with the right pictures and with swapped ones.
#   bash scripts/pretrain_tiny.sh                 some two hours of processor time
#   DEVICE=cuda bash scripts/pretrain_tiny.sh     minutes on one GPU and 16 cores
# PRETRAIN_DIR (pretrain) is where everything goes; SEEDS ("1 2 3 4") of the worlds, each with towns of its own. Run it again
# after an interruption: it goes on where it stopped. DRY_RUN=1 only prints the commands. The packed model is
# PRETRAIN_DIR/tiny_internvl; to ship it, put it into stage1_vlm/tiny_internvl.
set -euo pipefail
for name in PRETRAIN_DIR; do # relative ones are of the folder where this is called
  [[ -z "${!name:-}" || "${!name}" == /* ]] || printf -v "$name" '%s/%s' "$PWD" "${!name}"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ "${DRY_RUN:-0}" == "1" ]] || bash scripts/setup.sh

job="${PRETRAIN_DIR:-pretrain}"
device="${DEVICE:-cpu}"
read -ra seeds <<< "${SEEDS:-1 2 3 4}"
workers="${WORKERS:-1}" # processes that draw the worlds
experiment=pretrain_tiny
[[ "$device" == cpu ]] || { experiment=pretrain_tiny_gpu; workers="${WORKERS:-14}"; }
# shellcheck source=scripts/steps.sh
source scripts/steps.sh
began=$SECONDS

asked() { # set, seed, split, part, overrides ...: questions about one part of one world
  local set="$1" world="$job/world_$2" split="$3" part="$4"; shift 4
  step "questions_$set" "questions of $part" navsim_ext.questions.write data.root="$world" data.split="$split" \
    data.scene_filter="$world/train_test_split/scene_filter/$part.yaml" template=brief name="$set" \
    output_dir="$job/questions" "$@"
}
seen=lead_vehicle_distance,lead_vehicle_braking,traffic_light,crossing_pedestrian,lane_left,lane_right
types=ego_speed,lead_vehicle_distance,lead_vehicle_speed,lead_vehicle_braking,traffic_light,crossing_pedestrian
types+=,lane_left,lane_right,road_users,navigation_command,meta_action,trajectory
sets=()
for seed in "${seeds[@]}"; do
  step "world_$seed" "towns, traffic, camera pictures" navsim_ext.synthetic.build experiment=pretrain_tiny seed="$seed" \
    workers="$workers" output_dir="$job/world_$seed"
  asked "train_$seed" "$seed" trainval train "types=[$types]" together=true seed="$seed"
  sets+=("train_$seed")
done
first="${seeds[0]}"
asked decisions "$first" trainval val "types=[decision]"
sets+=(decisions)
asked held_out "$first" test test "types=[$seen]"

mixture="$job/questions/mixture.json"
if [[ "${DRY_RUN:-0}" != "1" ]]; then # the data sets of all worlds side by side
  "${PYTHON_BIN:-.venv/bin/python}" - "$job/questions" "${sets[@]}" << 'PY'
import json, os, sys
folder, *names = sys.argv[1:]
mixture = {name: entry for part in names for name, entry in json.load(open(f"{folder}/{part}.json")).items()}
json.dump(mixture, open(f"{folder}/.mixture.tmp", "w"), indent=1)
os.replace(f"{folder}/.mixture.tmp", f"{folder}/mixture.json")
PY
fi
step train "a tiny InternVL from random weights" stage1_vlm.train experiment="$experiment" data.mixture="$mixture" \
  output_dir="$job/stage1"

for checkpoint in "$job"/stage1/checkpoint-*; do
  number="${checkpoint##*-}"
  [[ "$number" =~ ^[0-9]+$ ]] || continue
  step "curve_$number" "accuracy in the unseen towns after $number steps" stage1_vlm.evaluate experiment=pretrain_tiny \
    model_path="$checkpoint" mixture="$job/questions/held_out.json" device="$device" output_dir="$job/curve/$number"
done
step pack "the folder that ships" stage1_vlm.pretrained model_path="$job/stage1" curve="$job/curve" \
  output_dir="$job/tiny_internvl"
[[ "${DRY_RUN:-0}" == "1" ]] || printf 'Model: %s/tiny_internvl   (%d s)\n' "$job" $(( SECONDS - began ))
