# shellcheck shell=bash
# Sourced after steps.sh by demo_traffic.sh and experiment_traffic.sh: steps of traffic models in the folder $job.
reach_m="${REACH_M:-200}" # of the map around the ego's way

apart() { # function, arguments ...: these steps one after another on the second core, with a log file of their own
  if [[ "${DRY_RUN:-0}" == "1" ]]; then "$@"; return; fi
  mkdir -p "$job/logs"
  "$@" > "$job/logs/$1_$2.log" 2>&1 &
  background+=($!)
}

scenes() { # part (train, val or test, the unseen town), number of scenes
  step "scenes_$1" "$2 traffic scenes of 9 s, $1" navsim_ext.traffic.build data.source=synthetic \
    sources.synthetic.part="$1" sources.synthetic.scenes="$2" sources.synthetic.history_s=1.0 \
    sources.synthetic.horizon_s=8.0 sources.synthetic.reach_m="$reach_m" workers=sequential output_dir="$job/scenes/$1"
}

drives() { # name, overrides of the rollout command ...: drives the test scenes and scores the rollouts
  step "drives_$1" "$1 drives the unseen town" sim_agents.rollout "${@:2}" scenes="$job/scenes/test" \
    workers=sequential output_dir="$job/rollouts/$1"
  step "realism_$1" "how like the recorded traffic" navsim_ext.realism.score rollouts="$job/rollouts/$1" \
    scenes="$job/scenes/test" workers=sequential output_dir="$job/realism/$1"
}
