#!/usr/bin/env bash
# Writes driving questions and answers: trajectory QA from scenes, four-phase QA through an OpenAI-compatible server.
#   bash scripts/generate_qa.sh data.index=INDEX server.url=http://localhost:8000/v1 server.model=NAME output_dir=DIR
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" stage1_vlm.generate_qa "$@"
