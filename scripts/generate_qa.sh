#!/usr/bin/env bash
# Writes driving questions and answers: trajectory QA from scenes, four-phase QA through an OpenAI-compatible server.
#   bash scripts/generate_qa.sh server.url=http://localhost:8000/v1 server.model=... output_dir=...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash scripts/run.sh stage1_vlm.generate_qa "$@"
