#!/usr/bin/env bash
# Makes a virtual environment with megatron_med in it and prints its path. Does nothing where it is up to date.
#   tools/setup_env.sh [EXTRA]        EXTRA: verify, test, ... (see pyproject.toml)
# MEGATRON_MED_VENV          where it goes (default: ~/.cache/megatron_med/venv)
# MEGATRON_MED_TORCH_INDEX   package index for torch, e.g. https://download.pytorch.org/whl/cpu for the CPU build
# PYTHON                     the interpreter (default: python3), 3.11 or newer
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MEGATRON_MED_VENV:-$HOME/.cache/megatron_med/venv}
extra=${1:-verify}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $python is $("$python" --version 2>&1); Python 3.11 or newer is needed. Set PYTHON." >&2
  exit 2
}
state=$(cd "$repository" && find csrc -type f | LC_ALL=C sort | xargs cat constraints.txt pyproject.toml setup.py | cksum)
ready() { [ "$(cat "$venv/.megatron_med-$1" 2>/dev/null)" = "$repository $state" ]; }
built() { # with whatever extra: megatron_med itself need not be built again
  local mark
  for mark in "$venv"/.megatron_med-*; do ready "${mark##*.megatron_med-}" && return; done
  return 1
}
requirements() { # of the extra, and of the extras it names
  "$venv/bin/python" - "$repository/pyproject.toml" "$extra" <<'PY'
import re, sys, tomllib

with open(sys.argv[1], "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]


def flat(name):
    for requirement in extras[name]:
        ours = re.fullmatch(r"megatron_med\[(.*)\]", requirement)
        yield from (inner for other in ours[1].split(",") for inner in flat(other)) if ours else [requirement]


print("\n".join(flat(sys.argv[2])))
PY
}
install() { # what pip would, in half the time where uv is on the PATH
  local uv=(uv pip install --quiet --python "$venv/bin/python" --index-strategy unsafe-best-match) # the best of all indexes
  uv+=(--reinstall-package megatron_med) # which it would not see to be changed by its C++
  [ -n "${PIP_NO_COMPILE:-}" ] || uv+=(--compile-bytecode)
  [ -z "${PIP_FIND_LINKS:-}" ] || uv+=(--find-links "$PIP_FIND_LINKS")
  [ -z "${PIP_INDEX_URL:-}" ] || uv+=(--default-index "$PIP_INDEX_URL")
  [ -z "${PIP_EXTRA_INDEX_URL:-}" ] || uv+=(--extra-index-url "$PIP_EXTRA_INDEX_URL")
  [ -z "${PIP_CERT:-}" ] || local -x SSL_CERT_FILE=$PIP_CERT
  if command -v uv > /dev/null; then
    "${uv[@]}" "$@" >&2 && return
    echo "uv did not; pip does it" >&2
  fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2
}
if ! ready "$extra" && ! ready test; then  # test holds every other extra that the scripts ask for
  echo "setting up $venv (once; a few minutes)" >&2
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  constrained=(-c "$repository/constraints.txt")
  if built; then
    requirements > "$venv/requirements.txt"
    install "${constrained[@]}" -r "$venv/requirements.txt"
  else
    # torch comes first and pinned, so that nothing behind it pulls another build.
    index=()
    [ -z "${MEGATRON_MED_TORCH_INDEX:-}" ] || index=(--index-url "$MEGATRON_MED_TORCH_INDEX")
    install ${index[@]+"${index[@]}"} torch==2.13.0  # bash 3.2 takes an empty list for an unset one
    install "${constrained[@]}" setuptools wheel pybind11
    install "${constrained[@]}" --no-build-isolation -e "$repository[$extra]"
  fi
  printf '%s' "$repository $state" > "$venv/.megatron_med-$extra"
fi
echo "$venv"
