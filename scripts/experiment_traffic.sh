#!/usr/bin/env bash
# The experiment of the traffic models from nothing: 2,000 synthetic scenes, 300 of a town that training never saw, and
# how real the models' rollouts are there (rules of 2025), in the order that is expected: the recording itself, CAT-K,
# cloning with spatially smoothed labels, cloning without, IDM, constant velocity; and fine-tuning on own rollouts, of
# which no place is expected. Then vocabulary x smoothing.
#   bash scripts/experiment_traffic.sh    some ninety minutes on two CPU cores
# EXPERIMENT_DIR (experiment_traffic) is where everything goes; run it again after an interruption and it goes on.
# TRAIN_SCENES (2000), TEST_SCENES (300), SEEDS ("0 1 2"), ABLATION_SCENES (60; 0: no ablation), STEPS (750) of cloning
# and TUNE_STEPS (250) of fine-tuning make it smaller; TOP_K (10) most probable tokens are sampled from.
set -euo pipefail
# shellcheck source=scripts/begin.sh
source "$(dirname "${BASH_SOURCE[0]}")/begin.sh" EXPERIMENT_DIR

job="${EXPERIMENT_DIR:-experiment_traffic}"
read -ra seeds <<< "${SEEDS:-0 1 2}"
ablation="${ABLATION_SCENES:-60}"
clone=(trainer.max_steps="${STEPS:-750}" trainer.val_check_interval="${STEPS:-750}")
tune=(trainer.max_steps="${TUNE_STEPS:-250}" trainer.val_check_interval="${TUNE_STEPS:-250}")
# shellcheck source=scripts/steps_traffic.sh
source scripts/steps_traffic.sh

other_scenes() {
  scenes val 16
  scenes test "${TEST_SCENES:-300}"
  (( ablation == 0 )) || held_out=ablation scenes test "$ablation"
}
apart other_scenes test
scenes train "${TRAIN_SCENES:-2000}"
await
vocabulary() { # name, options ...
  step "vocabulary_$1" "motions as tokens, $1" sim_agents.vocabulary.build scenes="$job/scenes/train" \
    held_out="$job/scenes/val" "${@:2}" output_dir="$job/vocabulary/$1"
}
vocabulary k_disks tokens=256

train() { # name, vocabulary, seed, options ...: a run of its own
  step "train_$1" "${4#experiment=}, seed $3" sim_agents.train data.train="$job/scenes/train" data.val="$job/scenes/val" \
    vocabulary="$job/vocabulary/$2" seed="$3" "${@:4}" output_dir="$job/runs/$1"
}
checkpoint() { echo "$job/runs/$1/version_0/checkpoints/last.ckpt"; }

rules() { for rule in replay idm constant_velocity; do drives "$rule" driver="$rule"; done; }
apart rules test
for seed in "${seeds[@]}"; do
  train "smoothed_$seed" k_disks "$seed" experiment=traffic "${clone[@]}"
  smoothed() { models_drive "smoothed_$seed" "$(checkpoint "smoothed_$seed")"; }
  plain() {
    train "plain_$seed" k_disks "$seed" experiment=traffic module.smoothing=none "${clone[@]}"
    models_drive "plain_$seed" "$(checkpoint "plain_$seed")"
  }
  both() { smoothed; plain; }
  await
  apart both "$seed"
  train "cat_k_$seed" k_disks "$seed" experiment=traffic_catk module.init_from="$(checkpoint "smoothed_$seed")" \
    "${tune[@]}"
  models_drive "cat_k_$seed" "$(checkpoint "cat_k_$seed")"
  train "own_$seed" k_disks "$seed" experiment=traffic_own module.init_from="$(checkpoint "smoothed_$seed")" "${tune[@]}"
  models_drive "own_$seed" "$(checkpoint "own_$seed")"
done
await

of_seeds() { local list; list="$(printf "'$job/realism/$1_%s', " "${seeds[@]}")"; echo "[${list%, }]"; }
order="replay: ['$job/realism/replay'], cat_k: $(of_seeds cat_k), smoothed: $(of_seeds smoothed)"
order+=", plain: $(of_seeds plain), idm: ['$job/realism/idm'], constant_velocity: ['$job/realism/constant_velocity']"
step comparison "the table" navsim_ext.realism.compare scores="{$order}" output_dir="$job/comparison"
step own "own rollouts beside the two" navsim_ext.realism.compare \
  scores="{cat_k: $(of_seeds cat_k), own: $(of_seeds own), smoothed: $(of_seeds smoothed)}" output_dir="$job/own"

(( ablation > 0 )) || exit 0
vocabulary grid method=grid
vocabulary verlet method=verlet
table=""
for words in k_disks grid verlet; do
  for smoothing in spatial uniform none; do
    name="${words}_$smoothing"
    case "$name" in # two of them are there already
      k_disks_spatial) trained="smoothed_${seeds[0]}" ;;
      k_disks_none) trained="plain_${seeds[0]}" ;;
      *)
        trained="ablation_$name"
        train "$trained" "$words" "${seeds[0]}" experiment=traffic module.smoothing="$smoothing" \
          "${clone[@]}"
        ;;
    esac
    held_out=ablation models_drive "ablation_$name" "$(checkpoint "$trained")"
    table+="$name: ['$job/realism/ablation_$name'], "
  done
done
step ablation "vocabulary x smoothing" navsim_ext.realism.compare scores="{${table%, }}" output_dir="$job/ablation"
