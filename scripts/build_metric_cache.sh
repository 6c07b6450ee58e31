#!/usr/bin/env bash
# Builds the metric cache (scenes for the scorer) of one split. Train and test caches are separate folders. Resumable.
#   bash scripts/build_metric_cache.sh data.split=navtrain output_dir=... workers=processes num_workers=32
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash scripts/run.sh navsim_ext.metric_cache.build "$@"
