# pwm_fast for a CPU, or for NVIDIA GPUs; docs/install.md has its use and its other arguments.
#   docker build -t pwm-fast .
#   docker build -t pwm-fast:cuda --build-arg DEVICE=cuda .
ARG BASE=debian:12.12-slim

FROM ${BASE} AS build
ARG DEVICE=cpu
# hadolint ignore=DL3008
RUN case "$DEVICE" in cpu | cuda) ;; *) echo "DEVICE=$DEVICE is unknown: use cpu or cuda" >&2; exit 1 ;; esac \
    && apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/build/bin:$PATH
# nvcc for ESNR's kernels in CUDA C++, from PyPI (270 MB); the final stage goes without it.
RUN python3 -m venv /opt/build \
    && if [ "$DEVICE" = cuda ]; then \
        pip install --no-cache-dir nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
            nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 \
        && ln -s /opt/build/lib/python3.*/site-packages/nvidia/cu13 /usr/local/cuda \
        && ln -s lib /usr/local/cuda/lib64; fi
WORKDIR /src
COPY . .
RUN if [ "$DEVICE" = cuda ]; then PWM_FAST_CUDA=1; else PWM_FAST_CUDA=0; fi \
    && PWM_FAST_BUILD=1 PWM_FAST_CUDA=$PWM_FAST_CUDA pip wheel --no-cache-dir --no-deps -w /wheels .

FROM ${BASE}
ARG DEVICE=cpu
ARG EXTRAS=train,video
ARG TORCH_INDEX=
# EGL draws films: on the GPU, with its driver, or on the CPU, with Mesa. Triton compiles what talks to
# the driver where it runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv libegl1 libopengl0 libgl1-mesa-dri \
    && if [ "$DEVICE" = cuda ]; then apt-get install -y --no-install-recommends gcc libc6-dev python3-dev; fi \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH
# A layer of its own, for it is nearly all there is to download. PyPI's torch is the one for CUDA.
COPY constraints.txt /opt/
RUN if [ "$DEVICE" = cpu ]; then : "${TORCH_INDEX:=https://download.pytorch.org/whl/cpu}"; fi \
    && python3 -m venv /opt/venv \
    && pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c /opt/constraints.txt torch
COPY --from=build /wheels /opt/wheels
RUN pip install --no-cache-dir -c /opt/constraints.txt "$(ls /opt/wheels/*.whl)[$EXTRAS]"
# HOME and USER also serve `docker run --user`, whose user the image does not know.
RUN useradd --uid 1000 --home-dir /work --no-create-home pwm && install -d -m 1777 /work
ENV HOME=/work USER=pwm NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
USER 1000
WORKDIR /work
ENTRYPOINT ["pwm-fast"]
