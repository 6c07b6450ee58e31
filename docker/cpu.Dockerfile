# syntax=docker/dockerfile:1
# Dependencies only; code and data are mounted, and the checkout is installed offline inside:
#   docker build -f docker/cpu.Dockerfile -t trivium:cpu .
#   docker run --rm -it -v "$PWD":/workspace/trivium -v /data:/data trivium:cpu \
#     bash -c 'bash scripts/setup.sh --offline && bash scripts/demo.sh'
# TORCH_INDEX_URL: an index of CPU wheels, to leave the CUDA packages out.
ARG PYTHON_VERSION=3.11
FROM python:${PYTHON_VERSION}-slim-bookworm

ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URL=""
ENV TRIVIUM_VENV=/opt/trivium \
    PYTHON=python3 \
    PIP_NO_CACHE_DIR=1 \
    OMP_NUM_THREADS=1 \
    PATH=/opt/trivium/bin:$PATH

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /tmp/lists
COPY pyproject.toml constraints.txt ./
COPY scripts/setup.sh scripts/setup.sh
RUN PIP_EXTRA_INDEX_URL="${TORCH_INDEX_URL}" TORCH_VERSION="${TORCH_VERSION}" bash scripts/setup.sh --dependencies

WORKDIR /workspace/trivium
CMD ["bash"]
