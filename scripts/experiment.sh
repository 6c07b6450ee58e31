#!/usr/bin/env bash
# The experiments of stages 2 and 3 from nothing: a synthetic world of 16,000 scenes with an unseen town, stage 1,
# hidden and metric caches, then imitation (with sight and without) and reinforcement (three seeds), both judged on the
# unseen town.
#   bash scripts/experiment.sh          some ninety minutes on two CPU cores
# EXPERIMENT_DIR (experiment) is where everything goes; run it again after an interruption and it goes on.
set -euo pipefail
# shellcheck source=scripts/begin.sh
source "$(dirname "${BASH_SOURCE[0]}")/begin.sh" EXPERIMENT_DIR

job="${EXPERIMENT_DIR:-experiment}"
device="${DEVICE:-cpu}"

export NPROC_PER_NODE="${NPROC_PER_NODE:-2}" # processes of stage 1 and its export

world="$job/world"
step world "towns, traffic, camera pictures" navsim_ext.synthetic.build \
  experiment=unseen_town workers=2 output_dir="$world"
types=lead_vehicle_distance,lead_vehicle_braking,traffic_light,crossing_pedestrian,lane_left,lane_right
step questions "questions that need the picture" navsim_ext.questions.write data.root="$world" data.split=trainval \
  data.scene_filter="$world/train_test_split/scene_filter/train.yaml" name=train template=brief seed=11 \
  "types=[$types,meta_action,trajectory]" output_dir="$job/questions"
launcher=torchrun step stage1 "fine-tunes a tiny InternVL on driving questions" \
  stage1_vlm.train experiment=synthetic data.mixture="$job/questions/train.json" output_dir="$job/stage1"
for part in trainval test; do
  index "$part" "$part"
  launcher=torchrun step "export_$part" "hidden states of $part" stage1_vlm.export experiment=demo \
    model_path="$job/stage1" data.index="$job/index/$part" device="$device" output_dir="$job/hidden/$part"
done
hidden=(data.root="$world" data.hidden_cache="$job/hidden/trainval" data.hidden_cache_test="$job/hidden/test")

metric_cache() { # part
  step "metric_$1" "metric cache of $1" navsim_ext.metric_cache.build \
    data.root="$world" data.split="$1" num_workers=2 output_dir="$job/metric_cache/$1"
}
metric_cache test
step stage2 "imitation with sight and without" stage2_dit.experiment \
  "${hidden[@]}" data.metric_cache="$job/metric_cache/test" device="$device" output_dir="$job/stage2"
metric_cache trainval
step stage3 "reinforcement, three seeds" stage3_grpo.experiment \
  init="$job/stage2/diffusion_il/version_0/checkpoints/last.ckpt" "${hidden[@]}" \
  data.metric_cache="$job/metric_cache/trainval" data.metric_cache_test="$job/metric_cache/test" \
  device="$device" output_dir="$job/stage3"

# NAVSIM 2's two-stage protocol on the unseen town, with blind probes beside the planners.
step second_stage "a second stage: other drivers in the ego's seat" navsim_ext.synthetic.second_stage \
  data.root="$world" groups=100 pairs=5 workers=2
two_stage="$world/train_test_split/synthetic_two_stage.yaml"
step metric_two_stage "metric cache of both stages" navsim_ext.metric_cache.build \
  data.root="$world" data.split_config="$two_stage" num_workers=2 output_dir="$job/metric_cache/two_stage"
step index_second "scene index of the second stage" navsim_ext.dataset data.root="$world" data.split=test \
  data.second_stage="$world/synthetic_two_stage" output_dir="$job/index/second"
launcher=torchrun step export_second "hidden states of the second stage" stage1_vlm.export experiment=demo \
  model_path="$job/stage1" data.index="$job/index/second" device="$device" output_dir="$job/hidden/second"
staged=()
for planner in diffusion_il diffusion_rl; do
  checkpoint="$job/stage2/diffusion_il/version_0/checkpoints/last.ckpt"
  [[ "$planner" == diffusion_il ]] || checkpoint="$job/stage3/seed_0/version_0/checkpoints/best_pdm_score.ckpt"
  step "two_stage_$planner" "drives both stages of NAVSIM 2's protocol" navsim_ext.evaluation.score \
    protocol=two_stage name="$planner" planner=diffusion planner.checkpoint="$checkpoint" probes=true \
    data.split_config="$two_stage" data.index="$job/index/test" data.second_stage="$job/index/second" \
    metric_cache="$job/metric_cache/two_stage" hidden=cached hidden.folder="$job/hidden/test" \
    data.second_stage_hidden="$job/hidden/second" device="$device" output_dir="$job/scores/two_stage_$planner"
  staged+=("$job/scores/two_stage_$planner")
done
bash scripts/run.sh navsim_ext.evaluation.show scores=[] two_stage="[$(IFS=,; echo "${staged[*]}")]"
