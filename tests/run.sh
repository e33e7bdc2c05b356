#!/usr/bin/env bash
# Sets up an environment (tools/setup_env.sh) and passes the tests. Options go to pytest: bash tests/run.sh -k resume
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(bash "$repository/tools/setup_env.sh" test)
# The oracle for the order of samples. Without its own requirements: it must not bring another torch.
"$venv/bin/python" -c 'import megatron.core.datasets.gpt_dataset' 2>/dev/null ||
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps megatron-core==0.16.1 >&2
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PATH="$venv/bin:$PATH"
cd "$repository"
exec "$venv/bin/python" -m pytest "$@"
