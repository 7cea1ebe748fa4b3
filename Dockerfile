# One image for every role: `docker run … pkb ingest`, `pkb aggregate`, or any other command of `pkb`.
FROM python:3.12-slim AS build
WORKDIR /src
RUN python -m venv /opt/pkb
COPY pyproject.toml README.md LICENSE ./
COPY pkbrokers_redis pkbrokers_redis
COPY workers workers
RUN /opt/pkb/bin/pip install --no-cache-dir .

FROM python:3.12-slim
# `pkb sync` needs git; everything else comes with Python.
RUN apt-get update && apt-get install --yes --no-install-recommends git ca-certificates \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home pkb && install -d -o pkb /data
COPY --from=build /opt/pkb /opt/pkb
ENV PATH=/opt/pkb/bin:$PATH PYTHONUNBUFFERED=1 PKB_DATA_DIR=/data
# numba would write its cache next to the code, which this user may not change.
ENV NUMBA_CACHE_DIR=/home/pkb/.cache/numba
USER pkb
# Compile the candle rules now (20 s), not in each new container. Another processor compiles them once more.
RUN python -c "from pkbrokers_redis.candles.model import DEFAULT_INTERVALS; \
from pkbrokers_redis.runtime.warmup import warm_up, warm_up_writer; \
warm_up_writer(); warm_up(DEFAULT_INTERVALS)"
VOLUME /data
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s --retries=3 CMD ["pkb", "status", "--here"]
CMD ["pkb", "--help"]
