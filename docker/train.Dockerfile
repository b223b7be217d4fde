# The training job. The CUDA libraries come with PyPI's torch wheels; the same image runs on GPU and CPU nodes.
# Build arguments:
#   BASE       any Debian with Python 3.11
#   COMPILER   1 adds g++, which `--model.compile` needs at run time (Triton and inductor generate C)
#   VERSION, REVISION, SOURCE   of Imago, for the labels; the revision is also recorded in bundles
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS packages
COPY docker/train.lock /locks/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m venv --without-pip /opt/imago \
    && python3 -m pip --python /opt/imago/bin/python install --quiet --no-cache-dir --no-compile --only-binary :all: \
       -r /locks/train.lock \
    && PYTHONHASHSEED=0 /opt/imago/bin/python -m compileall -q -f --invalidation-mode unchecked-hash -x '/testing/' \
       /opt/imago/lib

# Imago's sources, with file modes that do not depend on the umask of the checkout.
FROM ${BASE} AS sources
COPY models /app/models
COPY train /app/train
COPY serve /app/serve
RUN chmod -R u=rwX,go=rX /app

FROM ${BASE}
ARG COMPILER=0
# hadolint ignore=DL3008
RUN [ "$COMPILER" = 0 ] || { apt-get update && apt-get install -y --no-install-recommends g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*; }
COPY --from=packages /opt/imago /opt/imago
COPY --from=sources /app /app
ARG BASE
ARG VERSION=0 REVISION=unknown SOURCE=unknown
ENV PATH=/opt/imago/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 LANG=C.UTF-8 HOME=/tmp \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    IMAGO_REVISION=${REVISION}
# Relative paths, such as artifacts/, must be writable.
WORKDIR /tmp
USER 65532:65532
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "train"]
CMD ["run", "digits", "--store=/store"]

LABEL org.opencontainers.image.title="Imago train" \
      org.opencontainers.image.description="Training job that turns labelled images into an Imago bundle" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE}"
