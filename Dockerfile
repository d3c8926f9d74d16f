# The serving set only: no attacks, no fitting, no test code, no pip in what runs.
#
# Build:  docker build -t pathguard .
# Run:    docker run --read-only --tmpfs /tmp:rw,noexec,nosuid,nodev,size=4g --cap-drop ALL \
#           --security-opt no-new-privileges --user 10001:10001 --pids-limit 1024 --memory 8g \
#           -p 127.0.0.1:8080:8080 -p 127.0.0.1:8083:8083 \
#           -v "$PWD/model_store:/models:ro" -v "$PWD/config:/config:ro" \
#           pathguard /models/model.mar --config /config/guard.yaml
# What each flag is for, and what must be set in guard.yaml: docs/runbook.md, "In a container".
#
# Pin the base to the digest that you have checked: --build-arg BASE=python:3.11-slim@sha256:...
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY docs/sbom.json docs/sbom.json
COPY defense defense
COPY handlers handlers
# What the bill of materials lists is what is installed, to the version.
RUN python -c "import json; print(*('=='.join((part['name'], part['version'])) for part in json.load(open('docs/sbom.json'))['components']), sep='\n')" > constraints.txt \
 && python -m venv --without-pip /opt/pathguard \
 && python -m pip --python /opt/pathguard/bin/python install --no-cache-dir --constraint constraints.txt .

FROM ${BASE}
# Everything that a running server writes (unpacked models, logs, keys, metrics, caches) goes to
# /tmp; the rest can be read-only.
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin pathguard
COPY --from=build /opt/pathguard /opt/pathguard
ENV PATH=/opt/pathguard/bin:/usr/local/bin:/usr/bin:/bin
ENV HOME=/tmp TMPDIR=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
# HTTP: inference, management, TorchServe's metrics, the guard's metrics; gRPC: inference, management.
EXPOSE 8080 8081 8082 8083 7070 7071
# The exporter answers only from inside a worker that guards: healthy means guarded. (TorchServe's
# /ping wants a token.) Its port is metrics.port of guard.yaml.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8083/metrics', timeout=4)"]
ENTRYPOINT ["pathguard", "serve", "--host", "0.0.0.0"]
CMD ["--help"]
