#!/usr/bin/env bash
# Sets up an environment (tools/setup_env.sh) and passes the tests, in one process a core, four at most.
#   bash tests/run.sh          all but those that take minutes each
#   bash tests/run.sh --all    those, too: kills, cut links, Slurm, the whole quickstart, long builds
# Other options go to pytest, paths as seen from the repository: bash tests/run.sh tests/unit -k resume -n 0
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(bash "$repository/tools/setup_env.sh" test)
# The oracle for the order of samples. Without its own requirements: it must not bring another torch.
"$venv/bin/python" -c 'import megatron.core.datasets.gpt_dataset' 2>/dev/null ||
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps megatron-core==0.16.1 >&2
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PATH="$venv/bin:$PATH"
workers=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # it would take these for the number of cores
[ "$workers" -le 4 ] || workers=4
cd "$repository"
exec "$venv/bin/python" -m pytest -n "$workers" "$@"
