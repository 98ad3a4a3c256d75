# Serve a model over HTTP on a CPU; see docs/serve.md. Docker's builder runs this from the root of the repository:
#
#   docker build --tag nfzoo-serve .
#   docker run --rm --publish 127.0.0.1:8000:8000 --volume "$PWD/runs/digits:/model:ro" nfzoo-serve
#
# On x86 PyPI's torch brings gigabytes of CUDA. `--build-arg PIP_EXTRA_INDEX_URL=ADDRESS`, with the address of the CPU
# wheels that pytorch.org names, leaves them out: pip prefers 2.13.0+cpu to 2.13.0.

FROM python:3.11-slim AS build
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY nfzoo nfzoo
COPY hub hub
COPY conversion conversion
COPY recipes recipes
RUN python -m venv /opt/nfzoo && /opt/nfzoo/bin/pip install --constraint constraints.txt '.[serve]'

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home nfzoo
COPY --from=build /opt/nfzoo /opt/nfzoo
ENV PATH=/opt/nfzoo/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/nfzoo
EXPOSE 8000
# Until the model is loaded nothing listens; one from the Hub is downloaded first.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import http.client as c; h = c.HTTPConnection('127.0.0.1', 8000, timeout=4); h.request('GET', '/health'); exit(h.getresponse().status != 200)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["nfzoo", "serve", "--host", "0.0.0.0", "--port", "8000"]
# A folder of a model is mounted at /model. Or name one of the Hub, or add options: docker run … nfzoo-serve /model --threads 2
CMD ["/model"]
