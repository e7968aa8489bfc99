#!/usr/bin/env bash
# Makes .peers, the environment of the libraries that acemerge is timed against (1.8 GB on disk, two minutes).
# mergekit is LGPL-3.0: the benchmarks run it and hold none of its code.
set -euo pipefail
cd "$(dirname "$0")/.."
test -x .peers/bin/python || "${PYTHON:-python3}" -m venv .peers
PIP_CONSTRAINT=benchmarks/peers-constraints.txt .peers/bin/python -m pip install \
    --disable-pip-version-check --quiet torch==2.13.0 fusion-bench==0.2.33 mergekit==0.1.5
.peers/bin/python -m pip check
.peers/bin/python benchmarks/peers.py --check
