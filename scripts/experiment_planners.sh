#!/usr/bin/env bash
# The experiments of the planners on the vector world from nothing: towns and an unseen one, a traffic model, the token
# planner's goal stage and its reinforcement (PPO, GRPO, DAPO, constant scale), the path planner by imitation and by PPO
# (from it, and from random weights), the tree planner (prior, 8, 32 and 128 simulations, and searched drives), each in
# SEEDS, all driven in the unseen town among replayed and among reacting traffic, and tables.
#   bash scripts/experiment_planners.sh    some twelve hours of two CPU cores; SCENES=60 TEST=40 EPOCHS=2 SEEDS=0: half an hour
# EXPERIMENT_DIR (experiment_planners) is where everything goes; run it again after an interruption and it goes on.
# SCENES (2000) are trained on, TEST (300) driven. DRY_RUN=1 only prints the commands.
set -euo pipefail
# shellcheck source=scripts/begin.sh
source "$(dirname "${BASH_SOURCE[0]}")/begin.sh" EXPERIMENT_DIR

job="${EXPERIMENT_DIR:-experiment_planners}"
scenes="${SCENES:-2000}" test="${TEST:-300}" epochs="${EPOCHS:-20}" seeds="${SEEDS:-0 1 2}" device="${DEVICE:-cpu}"
began=$SECONDS
[[ "${DRY_RUN:-0}" == "1" ]] ||
  printf '%s scenes, %s driven, seeds %s: some %d hours of two CPU cores\n' "$scenes" "$test" "$seeds" \
    $(( 1 + (scenes * epochs / 40000 + test / 60) * $(wc -w <<< "$seeds") ))

for part in train val test; do
  count="$scenes"
  [[ "$part" == train ]] || count="$test"
  [[ "$part" != val ]] || count="$(( test < 64 ? test : 64 ))"
  step "scenes_$part" "$count traffic scenes of 16.5 s, $part" navsim_ext.traffic.build data.source=synthetic \
    sources.synthetic.part="$part" sources.synthetic.scenes="$count" sources.synthetic.reach_m=200 \
    num_workers=2 output_dir="$job/scenes/$part"
done
data=(data.train="$job/scenes/train" data.val="$job/scenes/val")
last() { printf '%s/version_0/checkpoints/last.ckpt' "$1"; }

step vocabulary "256 motions of each class, by k-disks" sim_agents.vocabulary.build scenes="$job/scenes/train" \
  tokens=256 output_dir="$job/vocabulary"
step base "a next-token model by imitation" sim_agents.train experiment=demo "${data[@]}" vocabulary="$job/vocabulary" \
  trainer.max_epochs="$epochs" output_dir="$job/base"

driven=() # what the tables compare
drives() { # name, agents, overrides ...: drives the unseen town
  step "drives_$2_$1" "$1 drives the unseen town among $2" navsim_ext.closed_loop.drive agents="$2" name="$1" \
    scenes="$job/scenes/test" horizon_s=8 "${@:3}" output_dir="$job/drives/$2/$1"
  [[ " ${driven[*]:-} " == *" $1 "* ]] || driven+=("$1")
}
everywhere() { # name, overrides ...
  drives "$1" replay "${@:2}"
  drives "$1" law "${@:2}"
}

for rule in idm frenet constant_velocity replay; do everywhere "$rule" planner="$rule"; done
for seed in $seeds; do
  for kind in path tree; do
    step "${kind}_$seed" "the $kind planner by imitation" sim_agents.ego.train experiment="$kind" "${data[@]}" \
      seed="$seed" trainer.max_epochs="$epochs" output_dir="$job/$kind/$seed"
  done
  step "token_$seed" "a goal for the token planner" sim_agents.ego.train experiment=token "${data[@]}" seed="$seed" \
    module.base="$(last "$job/base")" trainer.max_epochs="$epochs" output_dir="$job/token/$seed"
  token="$(last "$job/token/$seed")" path="$(last "$job/path/$seed")" tree="$(last "$job/tree/$seed")"
  everywhere "base_$seed" planner=token planner.checkpoint="$token" planner.goal=none planner.way=false
  everywhere "token_$seed" planner=token planner.checkpoint="$token"
  drives "token_first_$seed" replay planner=token planner.checkpoint="$token" planner.execute=first
  for algorithm in ppo grpo dapo constant; do
    # The same number of drives for each: scenes of a batch times their drives.
    batch="$([[ "$algorithm" == ppo ]] && echo 16 || echo 8)"
    step "token_${algorithm}_$seed" "reinforced by $algorithm" stage3_grpo.train experiment=ego_token \
      algorithm="ego_$algorithm" init="$token" "${data[@]}" datamodule.batch_size="$batch" seed="$seed" \
      output_dir="$job/token_$algorithm/$seed"
    everywhere "token_${algorithm}_$seed" planner=token \
      planner.checkpoint="$(last "$job/token_$algorithm/$seed")"
  done
  everywhere "path_$seed" planner=path planner.checkpoint="$path"
  for start in trained fresh; do
    step "path_ppo_${start}_$seed" "the path planner by PPO, $start weights" stage3_grpo.train experiment=ego_path \
      init="$path" policy.actor.fresh="$([[ "$start" == fresh ]] && echo true || echo false)" "${data[@]}" \
      seed="$seed" output_dir="$job/path_ppo_$start/$seed"
    everywhere "path_ppo_${start}_$seed" planner=path planner.checkpoint="$(last "$job/path_ppo_$start/$seed")"
  done
  step "searched_$seed" "the tree planner by drives that it searched" sim_agents.ego.train experiment=tree_searched \
    "${data[@]}" module.init_from="$tree" seed="$seed" output_dir="$job/searched/$seed"
  everywhere "tree_prior_$seed" planner=tree_prior planner.checkpoint="$tree"
  for simulations in 8 32 128; do
    everywhere "tree_${simulations}_$seed" planner=tree planner.checkpoint="$tree" \
      planner.search.simulations="$simulations"
  done
  drives "tree_gumbel_$seed" replay planner=tree planner.checkpoint="$tree" planner.search.method=gumbel
  everywhere "searched_$seed" planner=tree planner.checkpoint="$(last "$job/searched/$seed")"
done

for agents in replay law; do
  folders=()
  for name in "${driven[@]}"; do
    if [[ "${DRY_RUN:-0}" == "1" || -d "$job/drives/$agents/$name" ]]; then folders+=("$job/drives/$agents/$name"); fi
  done
  list="$(IFS=,; printf '[%s]' "${folders[*]}")"
  step "table_$agents" "one table among $agents" sim_agents.ego.table drives="$list" scenes="$job/scenes/test" \
    output_dir="$job/table/$agents"
done
[[ "${DRY_RUN:-0}" == "1" ]] || printf 'Tables: %s/table   (%d s)\n' "$job" $(( SECONDS - began ))
