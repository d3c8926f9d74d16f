# The serving set only: no attacks, no fitting, no test code. Build: docker build -t pathguard .
# Run: docker run --read-only --tmpfs /tmp -p 8080:8080 -v $PWD/model_store:/models:ro \
#        -v $PWD/config:/config:ro pathguard /models/model.mar --config /config/guard.yaml
FROM python:3.11-slim

RUN useradd --create-home --uid 10001 pathguard
WORKDIR /opt/pathguard
COPY pyproject.toml README.md LICENSE ./
COPY defense defense
COPY handlers handlers
RUN pip install --no-cache-dir .

# Everything that a running server writes (unpacked models, logs, keys, metrics) goes to /tmp.
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 TMPDIR=/tmp
USER pathguard
WORKDIR /tmp
EXPOSE 8080 8081 8082 8083
# The exporter answers only from inside a worker that guards: healthy means guarded. (TorchServe's
# /ping wants a token.) Its port is metrics.port of guard.yaml.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8083/metrics', timeout=4)"]
ENTRYPOINT ["pathguard", "serve", "--host", "0.0.0.0"]
CMD ["--help"]
