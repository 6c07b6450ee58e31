#!/usr/bin/env bash
# Words that plan, on a synthetic world: decisions with reasons, warm-up on few of them, GRPO on all, evaluation in an
# unseen town, and a page of pictures with question, reasoning and answer before and after.
#   bash scripts/demo_language.sh     about ten minutes on two CPU cores, after installation
# DEMO_DIR (demo_language) is where everything goes. Run it again after an interruption: it goes on where it stopped.
# DRY_RUN=1 only prints the commands.
set -euo pipefail
for name in DEMO_DIR; do # relative ones are of the folder where this is called
  [[ -z "${!name:-}" || "${!name}" == /* ]] || printf -v "$name" '%s/%s' "$PWD" "${!name}"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ "${DRY_RUN:-0}" == "1" ]] || bash scripts/setup.sh

job="${DEMO_DIR:-demo_language}"
# shellcheck source=scripts/steps.sh
source scripts/steps.sh
began=$SECONDS

world="$job/world"
step world "towns, traffic, camera pictures" \
  navsim_ext.synthetic.build experiment=demo scenes=400 recipe.qa=false recipe.test_share=0.2 recipe.val_share=0.1 \
  output_dir="$world"
questions() { # part, split
  step "questions_$1" "decisions with reasons of $1" navsim_ext.questions.write data.root="$world" data.split="$2" \
    data.scene_filter="$world/train_test_split/scene_filter/$1.yaml" types=[decision] name="$1" output_dir="$job/qa"
}
questions train trainval
questions val trainval
questions test test

step warm_up "the shipped tiny InternVL learns the form of a reply from few of them" \
  stage1_vlm.train experiment=language_demo data.mixture="$job/qa/train.json" output_dir="$job/warm_up"
evaluated() { # step or beside, name, model
  "$1" "answers_$2" "answers in the unseen town: $2" stage1_vlm.evaluate experiment=demo model_path="$3" \
    mixture="$job/qa/test.json" types=[decision] max_new_tokens=72 samples=4 swap_pictures=false device=cpu output_dir="$job/answers/$2"
}
evaluated beside before "$job/warm_up"
step reinforce "GRPO on all decisions" stage3_grpo.train experiment=language_demo init="$job/warm_up" \
  data.train="$job/qa/train.json" data.val="$job/qa/val.json" output_dir="$job/reinforced"
await
evaluated step after "$job/reinforced/model"
step page "pictures with question, reasoning, answer before and after" stage1_vlm.answers_page \
  before="$job/answers/before" after="$job/answers/after" mixture="$job/qa/test.json" recorder="$job/reinforced" \
  output_dir="$job/page"
[[ "${DRY_RUN:-0}" == "1" ]] || printf 'Page: %s/page/answers.html   (%d s)\n' "$job" $(( SECONDS - began ))
