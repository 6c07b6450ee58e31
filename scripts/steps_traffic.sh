# shellcheck shell=bash
# Sourced after steps.sh by demo_traffic.sh and experiment_traffic.sh: steps of traffic models in the folder $job.
reach_m="${REACH_M:-200}" # of the map around the ego's way

apart() { # function, arguments ...: these steps one after another on the second core, with a log file of their own
  if [[ "${DRY_RUN:-0}" == "1" ]]; then "$@"; return; fi
  mkdir -p "$job/logs"
  "$@" > "$job/logs/$1_$2.log" 2>&1 &
  background+=($!)
}

# held_out names the store of the unseen town that is built, driven and scored: test, if it is not set.
scenes() { # part (train, val or test, the unseen town), number of scenes
  local store="$1"
  [[ "$1" != test ]] || store="${held_out:-test}"
  step "scenes_$store" "$2 traffic scenes of 9 s, $store" navsim_ext.traffic.build data.source=synthetic \
    sources.synthetic.part="$1" sources.synthetic.scenes="$2" sources.synthetic.history_s=1.0 \
    sources.synthetic.horizon_s=8.0 sources.synthetic.reach_m="$reach_m" workers=sequential output_dir="$job/scenes/$store"
}

models_drive() { # name, checkpoint: sampled from the TOP_K (10) most probable tokens: smoothed labels leave a little of
  # their mass on every token, and in 16 choices of a dozen road users somebody would take one that leads anywhere
  drives "$1" checkpoint="$2" sampling.top_k="${TOP_K:-10}"
}

drives() { # name, overrides of the rollout command ...: drives the held-out scenes and scores the rollouts
  local store="$job/scenes/${held_out:-test}"
  step "drives_$1" "$1 drives the unseen town" sim_agents.rollout "${@:2}" scenes="$store" workers=sequential \
    output_dir="$job/rollouts/$1"
  step "realism_$1" "how like the recorded traffic" navsim_ext.realism.score rollouts="$job/rollouts/$1" \
    scenes="$store" workers=sequential output_dir="$job/realism/$1"
}
