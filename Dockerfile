# syntax=docker/dockerfile:1
# Targets: `server` (NVIDIA GPUs), `server-cpu`, and `autoscaler`, the operator, which has neither torch nor a compiler.
#
#   make image IMAGE=registry.example.com/nemoserve
#
# Packages are those of constraints.txt. The image runs as any user, needs no writable root, and keeps what it writes in
# two volumes: the model store and the home folder, where kernels are compiled for the very machine before the server
# says that it is ready.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

# g++ compiles the CPU kernels for the machine that they run on, and what Triton's kernels are launched by.
FROM ${PYTHON_IMAGE} AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
WORKDIR /src
# the second writes down what was installed in the first: a bill of materials as CycloneDX
RUN python -m venv /opt/nemoserve \
    && python -m venv /opt/sbom \
    && /opt/sbom/bin/pip install --no-cache-dir cyclonedx-bom==7.5.0
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY process process
COPY engine engine
COPY service service
COPY proto proto

FROM build AS build-gpu
# PyPI's torch for Linux is the one with CUDA; it brings Triton at the version that it needs. Both are those that our
# kernels ran with on a GPU, which the newest are not
RUN sed -e 's/^torch==.*/torch==2.11.0/' -e '/^triton==/d' constraints.txt > pins.txt \
    && /opt/nemoserve/bin/pip install --no-cache-dir --constraint pins.txt '.[server]' \
    && /opt/sbom/bin/cyclonedx-py environment --output-reproducible \
        --output-file /opt/nemoserve/sbom.json /opt/nemoserve/bin/python

FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /opt/nemoserve/bin/pip install --no-cache-dir --constraint constraints.txt --index-url "${TORCH_INDEX}" torch \
    && /opt/nemoserve/bin/pip install --no-cache-dir --constraint constraints.txt '.[server]' \
    && /opt/sbom/bin/cyclonedx-py environment --output-reproducible \
        --output-file /opt/nemoserve/sbom.json /opt/nemoserve/bin/python

# Nothing but what runs: no pip, no simulator, and no bytecode, which would save half a second of each start.
FROM ${PYTHON_IMAGE} AS build-autoscaler
WORKDIR /src
RUN python -m venv --without-pip /opt/nemoserve \
    && python -m venv /opt/sbom \
    && /opt/sbom/bin/pip install --no-cache-dir cyclonedx-bom==7.5.0
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY process process
COPY autoscaler autoscaler
COPY proto proto
RUN /opt/sbom/bin/pip --python /opt/nemoserve/bin/python install --no-cache-dir --no-compile \
        --constraint constraints.txt '.[autoscaler]' \
    && /opt/sbom/bin/cyclonedx-py environment --output-reproducible \
        --output-file /opt/nemoserve/sbom.json /opt/nemoserve/bin/python

# What both servers have in common; group 0 owns what is written, because OpenShift gives out any user with that group.
FROM base AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nemoserve" \
      org.opencontainers.image.description="Inference microservice for Mistral NeMo 12B and its dense relatives" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN install --directory --owner=1000 --group=0 --mode=0775 /home/nemoserve /opt/nim /opt/nim/.cache
ENV PATH=/opt/nemoserve/bin:$PATH \
    HOME=/home/nemoserve \
    NEMOSERVE_CACHE=/opt/nim/.cache \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 1000:0
WORKDIR /home/nemoserve
EXPOSE 8000 8001
# the server drains and ends with 0
STOPSIGNAL SIGTERM
ENTRYPOINT ["nemoserve"]
CMD ["serve"]

FROM runtime AS server-cpu
COPY --from=build-cpu /opt/nemoserve /opt/nemoserve

FROM runtime AS server
# read by NVIDIA's container runtime; the driver's libraries are in these folders where a device plugin mounts them (GKE)
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64
COPY --from=build-gpu /opt/nemoserve /opt/nemoserve

FROM ${PYTHON_IMAGE} AS autoscaler
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nemoserve-autoscaler" \
      org.opencontainers.image.description="Operator that keeps as many nemoserve replicas as their queues need" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/nemoserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
COPY --from=build-autoscaler /opt/nemoserve /opt/nemoserve
USER 1000:0
EXPOSE 8000 8001 9090
STOPSIGNAL SIGTERM
ENTRYPOINT ["nemoserve-autoscaler"]
