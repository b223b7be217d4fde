# The service, without torch, compiler and pip. Runs as a numeric user on a read-only root. Build arguments:
#   BASE      any Debian with Python 3.11
#   RUNTIME   cpu, cuda or openvino; the last two install serve-<RUNTIME>.lock
#   VERSION, REVISION, SOURCE   of Imago, for the labels
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# Packages: wheels with checked hashes, in a virtual environment without pip.
FROM ${BASE} AS packages
ARG RUNTIME=cpu
COPY docker/serve*.lock /locks/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    lock=/locks/serve.lock; [ "$RUNTIME" = cpu ] || lock="/locks/serve-$RUNTIME.lock"; \
    python3 -m venv --without-pip /opt/imago \
    && python3 -m pip --python /opt/imago/bin/python install --quiet --no-cache-dir --no-compile --no-deps \
       --only-binary :all: --require-hashes -r "$lock"
# Remove what the server does not import. libonnxruntime.so is for programs in C: Python's module contains the same code.
# Byte code without times gives the same layer for the same lock.
WORKDIR /opt/imago/lib/python3.11/site-packages
RUN find . -type d \( -name tests -o -name include \) -prune -exec rm -r {} + \
    && rm -rf onnxruntime/transformers onnxruntime/quantization onnxruntime/tools onnxruntime/datasets \
    && { [ "$RUNTIME" = cuda ] || rm -f onnxruntime/capi/libonnxruntime.so.*; } \
    && PYTHONHASHSEED=0 /opt/imago/bin/python -m compileall -q --invalidation-mode unchecked-hash -x 'pygments' .

# System without pip, caches, manuals and legacy encodings. dpkg's package list stays for scanners, and the copyright
# files, which the licences require.
FROM ${BASE} AS system
RUN rm -rf /usr/local/lib/python3.*/site-packages/* /usr/local/lib/python3.*/ensurepip /usr/local/bin/pip* \
      /usr/lib/python3/dist-packages/* /usr/lib/python3.*/ensurepip /usr/bin/pip* /usr/share/python-wheels \
      /usr/local/lib/python3.*/idlelib /usr/local/lib/python3.*/tkinter \
      /usr/local/lib/python3.*/test /usr/local/lib/python3.*/lib2to3 /usr/local/lib/python3.*/pydoc_data \
      /usr/lib/python3.*/test /usr/lib/python3.*/lib2to3 /usr/lib/python3.*/pydoc_data \
      /usr/lib/*-linux-gnu/gconv /usr/share/man /usr/share/locale /usr/share/info /var/lib/apt /var/cache /var/log /root/.cache \
    && find /usr/share/doc -type f ! -name copyright -delete \
    && find /usr/share/doc \( -xtype l -o -type d -empty \) -delete \
    && mkdir -p /var/lib/apt /var/cache /var/log /store

# Imago's sources, with file modes that do not depend on the umask of the checkout.
FROM ${BASE} AS sources
COPY models/*.py /app/models/
COPY models/image /app/models/image
COPY models/bundle /app/models/bundle
COPY models/comparison /app/models/comparison
COPY models/kept /app/models/kept
COPY models/labelling /app/models/labelling
COPY models/store /app/models/store
COPY serve /app/serve
RUN chmod -R u=rwX,go=rX /app

# From scratch, so that no layer contains the removed files.
FROM scratch
# hadolint ignore=DL3067
COPY --from=system / /
COPY --from=packages /opt/imago /opt/imago
COPY --from=sources /app /app
ENV PATH=/opt/imago/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 LANG=C.UTF-8 HOME=/tmp IMAGO_STORE=/store
WORKDIR /app
USER 65532:65532
EXPOSE 8000 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.getenv(\"IMAGO_PORT\", \"8000\")}/health/ready', timeout=2)"]
ENTRYPOINT ["python", "-m", "serve"]

ARG BASE
ARG VERSION=0 REVISION=unknown SOURCE=unknown
LABEL org.opencontainers.image.title="Imago serve" \
      org.opencontainers.image.description="HTTP service that answers images with the predictions of an Imago bundle" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE}"
