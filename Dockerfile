# A bare Debian, as README has it: one command sets up and runs the demo.
FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends \
    python3 python3-venv git make ca-certificates && rm -rf /var/lib/apt/lists/*
WORKDIR /crowdlens
COPY . .
CMD ["make", "demo"]
