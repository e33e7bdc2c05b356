# megatron_med for GPUs (default) and for laptops without one:
#   docker build -t megatron_med .                       NVIDIA's PyTorch image: torch, NCCL, Transformer Engine, apex
#   docker build -t megatron_med:cpu --target cpu .      small, CPU build of torch, gloo
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -v $PWD:/workspace megatron_med \
#     torchrun --nproc-per-node 8 -m megatron_med.train CONFIG.yaml
# NCCL's shared memory lies in /dev/shm: without --ipc=host give at least --shm-size=8g.
ARG GPU_BASE=nvcr.io/nvidia/pytorch:26.10-py3
ARG CPU_BASE=python:3.12-slim-bookworm

FROM ${CPU_BASE} AS cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# A compiler builds the extensions at install; git tells the version in the records of a run.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
WORKDIR /opt/megatron_med
COPY constraints.txt pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY megatron_med megatron_med
RUN pip install --no-cache-dir -c constraints.txt setuptools wheel pybind11 \
 && pip install --no-cache-dir -c constraints.txt --no-build-isolation '.[verify,corpus]'
COPY tools tools
COPY examples examples
RUN useradd --create-home --uid 10001 trainer && install -d -o trainer -g trainer /workspace
USER 10001
WORKDIR /workspace
ENV OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 MEGATRON_MED_HOME=/opt/megatron_med
CMD ["python", "-m", "megatron_med.train", "--help"]

FROM ${GPU_BASE} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megatron_med
COPY constraints.txt pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY megatron_med megatron_med
# The image's own torch stays: it is the one that its NCCL, Transformer Engine and apex were built with. Its pip
# constraints (PIP_CONSTRAINT) hold the rest together, so ours are not used here.
# hadolint ignore=DL3013
RUN python -c "import torch; v = tuple(map(int, torch.__version__.split('.')[:2])); \
assert v >= (2, 13), f'torch {torch.__version__} in the base image: 2.13 or newer is needed, set GPU_BASE'" \
 && python -m pip freeze | grep -i '^torch' > /tmp/torch-before \
 && python -m pip install --no-cache-dir setuptools wheel pybind11 \
 && python -m pip install --no-cache-dir --no-build-isolation '.[verify,corpus,bitsandbytes]' \
 && python -m pip freeze | grep -i '^torch' | diff /tmp/torch-before - && rm /tmp/torch-before
COPY tools tools
COPY examples examples
RUN useradd --create-home --uid 10001 trainer && install -d -o trainer -g trainer /workspace
USER 10001
WORKDIR /workspace
# NCCL tells warnings only. The flight recorder writes the last collectives to /workspace when one times out
# (docs/hangs.md).
ENV OMP_NUM_THREADS=1 \
    PYTHONUNBUFFERED=1 \
    MEGATRON_MED_HOME=/opt/megatron_med \
    NCCL_DEBUG=WARN \
    TORCH_FR_BUFFER_SIZE=2000 \
    TORCH_NCCL_DUMP_ON_TIMEOUT=1 \
    TORCH_NCCL_DEBUG_INFO_TEMP_FILE=/workspace/nccl_trace_rank_
CMD ["python", "-m", "megatron_med.train", "--help"]
