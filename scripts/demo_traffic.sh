#!/usr/bin/env bash
# Traffic models on a synthetic world: scenes, vocabulary, cloning, closest-token fine-tuning, reinforcement, a
# planner with a goal that drives among replayed road users, rollouts, realism, planners ranked among them, tables.
#   bash scripts/demo_traffic.sh    about eleven minutes on two CPU cores, after installation
# DEMO_DIR (demo_traffic) is where everything goes. Run it again after an interruption: it goes on where it stopped.
# Steps whose command has not changed since they finished are not run again. DRY_RUN=1 only prints the commands.
set -euo pipefail
for name in DEMO_DIR; do # relative ones are of the folder where this is called
  [[ -z "${!name:-}" || "${!name}" == /* ]] || printf -v "$name" '%s/%s' "$PWD" "${!name}"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ "${DRY_RUN:-0}" == "1" ]] || bash scripts/setup.sh

job="${DEMO_DIR:-demo_traffic}"
# shellcheck source=scripts/steps.sh
source scripts/steps.sh
# shellcheck source=scripts/steps_traffic.sh
source scripts/steps_traffic.sh
began=$SECONDS

other_scenes() { scenes val 16; scenes test 24; }
apart other_scenes beside
scenes train 160
step vocabulary "256 motions of each class, by k-disks" sim_agents.vocabulary.build scenes="$job/scenes/train" \
  tokens=256 output_dir="$job/vocabulary"
data=(data.train="$job/scenes/train" data.val="$job/scenes/val" vocabulary="$job/vocabulary")

rules() { for rule in replay idm constant_velocity; do drives "$rule" driver="$rule"; done; }
await
apart rules beside
step cloned "a next-token model by imitation" sim_agents.train experiment=demo "${data[@]}" output_dir="$job/cloned"
cloned="$job/cloned/version_0/checkpoints/last.ckpt"
apart models_drive cloned "$cloned"
step cat_k "fine-tuned on the states that it comes to itself" sim_agents.train experiment=demo_catk "${data[@]}" \
  module.init_from="$cloned" output_dir="$job/cat_k"
models_drive cat_k "$job/cat_k/version_0/checkpoints/last.ckpt"
step planner "a goal for a planner of the ego over it" sim_agents.ego.train experiment=token \
  data.train="$job/scenes/train" module.base="$job/cat_k/version_0/checkpoints/last.ckpt" trainer.max_epochs=2 \
  output_dir="$job/planner"
step ego "the planner drives the unseen town" navsim_ext.closed_loop.drive planner=token agents=replay \
  planner.checkpoint="$job/planner/version_0/checkpoints/last.ckpt" scenes="$job/scenes/test" horizon_s=8 \
  output_dir="$job/ego"
step reinforced "reinforced in the moving world: towards the log, away from contacts" stage3_grpo.train \
  experiment=traffic_demo init="$job/cat_k/version_0/checkpoints/last.ckpt" data.train="$job/scenes/train" \
  data.val="$job/scenes/val" output_dir="$job/reinforced"
models_drive reinforced "$job/reinforced/version_0/checkpoints/best_score.ckpt"
await
learned() { # run, checkpoint: a model's traffic by the run's name
  echo "+traffic.$1={_target_: sim_agents.ego.actors.traffic, checkpoint: '$job/$1/version_0/checkpoints/$2.ckpt', name: $1}"
}
step ranking "which traffic ranks planners as the law of the world does" navsim_ext.evaluation.rank \
  scenes="$job/scenes/val" panel="[idm_3,frenet_2,late,slow,hasty,swerving]" horizon_s=8 workers=processes num_workers=2 \
  agents="[replay,cat_k,reinforced]" "$(learned cat_k last)" "$(learned reinforced best_score)" \
  output_dir="$job/ranking"

compared="replay: ['$job/realism/replay'], reinforced: ['$job/realism/reinforced'], cat_k: ['$job/realism/cat_k']"
compared+=", cloned: ['$job/realism/cloned']"
compared+=", idm: ['$job/realism/idm'], constant_velocity: ['$job/realism/constant_velocity']"
step film "one rollout seen from above" navsim_ext.closed_loop.film drives="$job/scenes/test" \
  rollouts="$job/rollouts/cat_k" every=2 output="$job/rollout.gif"
bash scripts/run.sh navsim_ext.realism.compare scores="{$compared}" output_dir="$job/comparison"
[[ "${DRY_RUN:-0}" == "1" ]] ||
  printf 'Table: %s/comparison/comparison.json, film: %s/rollout.gif   (%d s)\n' "$job" "$job" $(( SECONDS - began ))
