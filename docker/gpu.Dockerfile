# syntax=docker/dockerfile:1
# As cpu.Dockerfile, on a CUDA base. The wheel of torch brings its own CUDA libraries; the devel base serves the
# kernels that DeepSpeed compiles. Keep CUDA_TAG and the torch build on one CUDA version:
#   docker build -f docker/gpu.Dockerfile -t trivium:gpu .
#   docker build -f docker/gpu.Dockerfile --build-arg CUDA_TAG=12.8.1-cudnn-devel-ubuntu24.04 \
#     --build-arg TORCH_VERSION=2.11.0 --build-arg TORCH_INDEX_URL=<index of the cu128 wheels> -t trivium:gpu .
#   docker run --rm -it --gpus all --shm-size=16g -v "$PWD":/workspace/trivium -v /data:/data trivium:gpu \
#     bash -c 'bash scripts/setup.sh --offline && bash scripts/demo.sh'
ARG CUDA_TAG=13.0.0-cudnn-devel-ubuntu24.04
FROM nvidia/cuda:${CUDA_TAG}

ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URL=""
ENV TRIVIUM_VENV=/opt/trivium \
    PYTHON=python3 \
    PIP_NO_CACHE_DIR=1 \
    DEBIAN_FRONTEND=noninteractive \
    PATH=/opt/trivium/bin:$PATH

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /tmp/lists
COPY pyproject.toml constraints.txt ./
COPY scripts/setup.sh scripts/setup.sh
RUN PIP_EXTRA_INDEX_URL="${TORCH_INDEX_URL}" TORCH_VERSION="${TORCH_VERSION}" bash scripts/setup.sh --dependencies

WORKDIR /workspace/trivium
CMD ["bash"]
