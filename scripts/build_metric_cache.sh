#!/usr/bin/env bash
# Builds the metric cache (scenes for the scorer) of one split. Train and test caches are separate folders. Resumable.
#   bash scripts/build_metric_cache.sh data.root=DATASET data.split=trainval data.scene_filter=navtrain.yaml \
#     num_workers=32 output_dir=CACHE
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" navsim_ext.metric_cache.build "$@"
