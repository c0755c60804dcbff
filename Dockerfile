# The image of a run: make image IMAGE=..., and for NVIDIA GPUs make image IMAGE=... DEVICE=gpu
# TensorBoard's, without TensorFlow: make image IMAGE=... TARGET=tensorboard
#
# BASE may be any image that has Python 3.11 to 3.13 as `python`, and pip. An index other than PyPI is passed to the build
# as a secret, which is not stored in the image: --secret id=pip,src=pip.conf
ARG BASE=docker.io/library/python:3.12-slim

# ---------------------------------------------------------------------------------------------------------------
# Installed packages, in an environment without pip; only the environment is copied from these stages
# ---------------------------------------------------------------------------------------------------------------
FROM ${BASE} AS tools
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
COPY requirements-image.lock ./

FROM tools AS dependencies
# As in scripts/setup.sh: source packages are built with the locked setuptools. TensorFlow's headers (393 MB) are only
# needed by compilers, and there is none. Bytecode cannot be written to a read-only root, and without it every start takes
# 15 s more; unchecked-hash: it is never compared with its source.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    awk '/^[^ ]/ { keep = /^setuptools==/ } keep' requirements-image.lock > setuptools.lock \
    && awk '/^[^ ]/ { keep = !/^nvidia-/ } keep' requirements-image.lock > cpu.lock \
    && for lock in setuptools.lock cpu.lock; do \
        python -m pip --python /opt/venv/bin/python install --no-compile --require-hashes --no-deps \
            --no-build-isolation --use-pep517 --root-user-action ignore -r $lock || exit 1; \
    done \
    && rm -r /opt/venv/lib/python3*/site-packages/tensorflow/include \
    && /opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib

# CUDA's libraries, in a separate layer, which is the largest one; the driver is installed on the node.
FROM tools AS cuda
ARG DEVICE=cpu
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    case "$DEVICE" in \
        cpu) ;; \
        gpu) awk '/^[^ ]/ { keep = /^nvidia-/ } keep' requirements-image.lock > gpu.lock \
            && python -m pip --python /opt/venv/bin/python install --no-compile --require-hashes --no-deps \
                --root-user-action ignore -r gpu.lock ;; \
        *) echo "DEVICE=$DEVICE: unknown device; use cpu or gpu" >&2; exit 2 ;; \
    esac

FROM tools AS code
WORKDIR /app
COPY conf conf
COPY trainer trainer
RUN python -m compileall -q --invalidation-mode unchecked-hash trainer \
    && chmod -R a+rX .

# ---------------------------------------------------------------------------------------------------------------
# The image of TensorBoard, which reads buckets with gcsfs
# ---------------------------------------------------------------------------------------------------------------
FROM tools AS tensorboard-dependencies
COPY requirements-tensorboard.lock ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m pip --python /opt/venv/bin/python install --no-compile --require-hashes --no-deps \
        --only-binary :all: --root-user-action ignore -r requirements-tensorboard.lock \
    && /opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib

FROM ${BASE} AS tensorboard
COPY --from=tensorboard-dependencies /opt/venv /opt/venv
WORKDIR /
USER 65532:65532

# ---------------------------------------------------------------------------------------------------------------
# The image, the most frequent changes last
# ---------------------------------------------------------------------------------------------------------------
FROM ${BASE}
# The base has no bytecode of the standard library.
RUN echo 'kubetune:x:65532:65532::/cache:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'kubetune:x:65532:' >> /etc/group \
    && install --directory --owner 65532 --group 65532 /cache /outputs \
    && python -m compileall -q -x '/(site-packages|dist-packages|tests?)/' --invalidation-mode unchecked-hash \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
COPY --from=cuda /opt/venv /opt/venv
COPY --from=dependencies /opt/venv /opt/venv
# TensorFlow 2.21 does not search the folders into which pip installs cuSOLVER, and ignores the GPU without it.
RUN find /opt/venv -path '*/nvidia/*/lib' -prune -print > /etc/ld.so.conf.d/cuda.conf \
    && ldconfig && rm -rf /var/cache/ldconfig
COPY --from=code /app /app

# Files are written below /cache, /tmp and output_dir only; a relative output_dir begins at /.
# GKE mounts the driver at /usr/local/nvidia.
ENV PATH=/opt/venv/bin:/usr/local/nvidia/bin:$PATH \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOME=/cache KUBETUNE_CACHE=/cache
WORKDIR /
USER 65532:65532
ENTRYPOINT ["python", "-m", "trainer"]

ARG VERSION
ARG REVISION
ENV KUBETUNE_REVISION=$REVISION
LABEL org.opencontainers.image.title="kubetune" \
      org.opencontainers.image.description="Fine-tune image classifiers in phases, on a laptop or on a cluster of preemptible nodes." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION
