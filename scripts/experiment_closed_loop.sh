#!/usr/bin/env bash
# The demo's planners in a world that moves: 200 scenes of 15 s of the unseen town, driven among replayed traffic and
# among the synthetic world's own drivers, who react; cameras are drawn at every question. Ends with the table of
# closed-loop scores beside the open-loop scores, and whether both rank the planners alike.
#   bash scripts/demo.sh && bash scripts/experiment_closed_loop.sh      half an hour more on two CPU cores
# DEMO_DIR (demo) is the finished demo; CLOSED_LOOP_DIR (DEMO_DIR/closed_loop) is where everything goes; SCENES (200).
# Run it again after an interruption and it goes on, scene by scene.
set -euo pipefail
# shellcheck source=scripts/begin.sh
source "$(dirname "${BASH_SOURCE[0]}")/begin.sh" DEMO_DIR CLOSED_LOOP_DIR

demo="${DEMO_DIR:-demo}"
job="${CLOSED_LOOP_DIR:-$demo/closed_loop}"
device="${DEVICE:-cpu}"

il="$demo/stage2/diffusion_il/version_0/checkpoints/last.ckpt"
rl="$demo/stage3/seed_0/version_0/checkpoints/best_pdm_score.ckpt"
scenes="$job/scenes"
step scenes "drives of the unseen town, with their law" navsim_ext.traffic.build data.source=synthetic \
  sources.synthetic.scenes="${SCENES:-200}" sources.synthetic.part=test workers=processes num_workers=2 \
  output_dir="$scenes"
beside check "does the loop itself cost anything" navsim_ext.closed_loop.check scenes="$scenes" horizon_s=15

# Pictures and wording as the demo's planners were trained with.
eyes=(cameras=rendered cameras.maps_root="$scenes/maps" "cameras.image_size=[480,270]" encoder=vlm
  encoder.model_path="$demo/stage1" encoder.template=brief encoder.dtype=float32 device="$device")
driven=()
drive() { # agents, planner's name, overrides ...
  local agents="$1" name="$2"; shift 2
  step "drive_${agents}_$name" "$name among $agents" navsim_ext.closed_loop.drive agents="$agents" name="$name" \
    scenes="$scenes" horizon_s=15 output_dir="$job/drives/$agents/$name" "$@"
  driven+=("$job/drives/$agents/$name")
}
without_eyes() { # agents
  drive "$1" human planner=human
  drive "$1" constant_velocity planner=constant_velocity
  drive "$1" idm planner=idm
}
with_eyes() {
  drive "$1" diffusion_il planner=diffusion planner.candidates=16 planner.checkpoint="$il" "${eyes[@]}"
  drive "$1" diffusion_rl planner=diffusion planner.candidates=16 planner.checkpoint="$rl" "${eyes[@]}"
}
for agents in replay law; do without_eyes "$agents"; done
await
# Two kinds of traffic side by side, one on each core.
if [[ "${DRY_RUN:-0}" == "1" ]]; then
  with_eyes replay
else
  mkdir -p "$job/logs"
  (with_eyes replay) > "$job/logs/drive_replay.log" 2>&1 &
  background+=($!)
  driven+=("$job/drives/replay/diffusion_il" "$job/drives/replay/diffusion_rl") # a subshell's own list is lost
fi
with_eyes law
await

opened=()
for name in human constant_velocity diffusion_il diffusion_rl; do opened+=("$demo/scores/$name"); done
step table "open and closed loop side by side" navsim_ext.evaluation.closed_loop \
  "drives=[$(IFS=,; echo "${driven[*]}")]" "scores=[$(IFS=,; echo "${opened[*]}")]" \
  "pairs=[[diffusion_il,diffusion_rl],[constant_velocity,diffusion_il],[diffusion_rl,idm]]" output_dir="$job/table"
[[ "${DRY_RUN:-0}" == "1" ]] || printf 'Table: %s/table   (%d s)\n' "$job" "$SECONDS"
