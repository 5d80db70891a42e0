# The server's image; docs/containers.md tells how to build and run it.
#
# torch's wheels bring CUDA's libraries themselves, so the smallest of NVIDIA's images is the right one: the larger ones
# hold the same libraries a second time. It adds what the wheels lack: the variables that ask the container toolkit for the
# GPU's driver, the check that this driver is new enough, and libraries that let older data-centre drivers run CUDA 13.
# Its version is the one that this torch is built for.
ARG BASE=nvidia/cuda:13.0.3-base-ubuntu24.04


FROM ${BASE} AS build

# The compiler is for kernels/native. Not pinned: the archive keeps only the newest build of a package, and the base's tag
# fixes the release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Constraints, not requirements: a torch without CUDA's libraries then leaves them out. In the environment they also hold
# for what builds our own package.
WORKDIR /src
COPY deploy/constraints.txt ./
ENV PIP_CONSTRAINT=/src/constraints.txt \
    PIP_BUILD_CONSTRAINT=/src/constraints.txt \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# For an image without CUDA, the index that PyTorch's installation page gives for CPUs.
ARG PIP_EXTRA_INDEX_URL

# Gigabytes that change rarely, in a layer of their own.
RUN python3 -m venv /opt/fastblt && /opt/fastblt/bin/pip install torch

# .dockerignore says what this is.
COPY . .
ARG REVISION
RUN FASTBLT_COMMIT="${REVISION}" /opt/fastblt/bin/pip install .[traces]


FROM ${BASE}

# Triton compiles its interface to the driver when it first runs: a C compiler, and the headers of C and Python.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 libpython3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 fastblt \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin fastblt \
    # Open like /tmp, so that `docker run --user` may name anybody.
    && install --directory --mode 1777 /cache

COPY --from=build /opt/fastblt /opt/fastblt
# The model that is served where no other is mounted over it.
COPY models/nano /models

# All that is ever written goes to /tmp and, Triton's compiled kernels and models from the hub, to /cache.
ENV PATH=/opt/fastblt/bin:${PATH} \
    HOME=/cache \
    FASTBLT_MODEL=/models \
    FASTBLT_DEVICE=cuda \
    FASTBLT_HOST=0.0.0.0 \
    FASTBLT_PORT=8000

USER 10001:10001
WORKDIR /
EXPOSE 8000
STOPSIGNAL SIGTERM

# Loading and compiling may take minutes; the first success ends the start period.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["python", "-c", "\
import http.client, os, sys; \
server = http.client.HTTPConnection('127.0.0.1', int(os.environ['FASTBLT_PORT']), timeout=4); \
server.request('GET', '/health/ready'); \
sys.exit(server.getresponse().status != 200)"]

# The server itself is process 1 and gets the SIGTERM that lets running requests finish: give it as long as
# --drain-seconds and ten more (`docker stop -t 40`).
ENTRYPOINT ["fastblt", "serve"]

ARG REVISION
LABEL org.opencontainers.image.title="fastblt" \
    org.opencontainers.image.description="A server for byte-latent language models" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.licenses="Apache-2.0"
