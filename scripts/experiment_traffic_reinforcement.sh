#!/usr/bin/env bash
# Does reinforcement in closed loop make cloned traffic safer at equal realism? On the scenes and cloned models of the
# experiment of the traffic models, every seed: reinforced (towards the log, lambda = 2 for contacts, KL to the clone)
# beside cloning continued for as many updates, and the controls: lambda = 0, no KL, the realism of a rollout as reward
# (RLFTSim), CAT-K. All drive the town that training never saw; the table has intervals over scenes.
#   bash scripts/experiment_traffic.sh && bash scripts/experiment_traffic_reinforcement.sh    hours on two CPU cores
# EXPERIMENT_DIR (experiment_traffic) is the finished experiment, and where everything goes. SEEDS ("0 1 2"), UPDATES
# (400). Run it again after an interruption and it goes on. DRY_RUN=1 only prints the commands.
set -euo pipefail
# shellcheck source=scripts/begin.sh
source "$(dirname "${BASH_SOURCE[0]}")/begin.sh" EXPERIMENT_DIR

job="${EXPERIMENT_DIR:-experiment_traffic}"
read -ra seeds <<< "${SEEDS:-0 1 2}"
updates="${UPDATES:-400}"
# shellcheck source=scripts/steps_traffic.sh
source scripts/steps_traffic.sh

data=(data.train="$job/scenes/train" data.val="$job/scenes/val")
budget=(trainer.max_epochs=1000 trainer.max_steps="$updates" trainer.check_val_every_n_epoch=null trainer.val_check_interval=100)
reinforce() { # name, seed, overrides ...
  step "train_$1_$2" "$1, seed $2" stage3_grpo.train experiment=traffic "${data[@]}" "${budget[@]}" seed="$2" \
    init="$job/runs/smoothed_$2/version_0/checkpoints/last.ckpt" output_dir="$job/runs/$1_$2" "${@:3}"
  models_drive "$1_$2" "$job/runs/$1_$2/version_0/checkpoints/last.ckpt"
}
for seed in "${seeds[@]}"; do
  reinforce reinforced "$seed"
  reinforce lambda_0 "$seed" reward=traffic_log
  reinforce no_kl "$seed" kl=none
  reinforce rlftsim "$seed" algorithm=traffic_rlftsim reward=realism
  step "train_continued_$seed" "cloning continued, seed $seed" sim_agents.train experiment=traffic "${data[@]}" \
    "${budget[@]}" seed="$seed" vocabulary="$job/vocabulary/k_disks" output_dir="$job/runs/continued_$seed" \
    module.init_from="$job/runs/smoothed_$seed/version_0/checkpoints/last.ckpt"
  models_drive "continued_$seed" "$job/runs/continued_$seed/version_0/checkpoints/last.ckpt"
done

of_seeds() { local list; list="$(printf "'$job/realism/$1_%s', " "${seeds[@]}")"; echo "[${list%, }]"; }
table=""
for name in reinforced smoothed continued cat_k lambda_0 no_kl rlftsim; do table+="$name: $(of_seeds "$name"), "; done
step reinforcement "the table" navsim_ext.realism.compare scores="{${table%, }}" output_dir="$job/reinforcement"
