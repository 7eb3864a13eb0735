# The HTTP service `tcl-hf serve`. A model's folder is mounted at /models:
#   docker build -t tcl-serve .
#   docker run -p 127.0.0.1:8000:8000 -v "$PWD/runs/openmoji:/models:ro" -e TCL_SERVE_TOKEN=... tcl-serve
FROM python:3.13-slim

WORKDIR /srv/tcl_hf
COPY setup.cfg pyproject.toml README.md LICENSE tcl_hf_command.py ./
COPY tcl_hf tcl_hf
RUN pip install --no-cache-dir ".[serve]"

# The service needs no rights of root, and reads its models only.
RUN useradd --create-home tcl
USER tcl
WORKDIR /home/tcl
ENV HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]
STOPSIGNAL SIGTERM
# All addresses of the container, because Docker decides who reaches it: see -p above.
ENTRYPOINT ["tcl-hf", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--model", "/models"]
