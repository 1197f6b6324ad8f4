#!/usr/bin/env bash
# Runs the GPU checklist on a node without a network, over the node's own torch. Bring the sources and a folder of wheels:
#
#     make wheelhouse PYTHON_VERSION=3.12                      # where there is a network
#     scripts/gpu-node.sh [--minutes 12] [--out FOLDER] [--wheels FOLDER] [-- OPTIONS OF tests.gpu.first_run]
#
# PYTHON names the Python that has torch (python3). What is tested is the fastckpt of the wheels, not the sources beside it.
# Nothing of the node is changed: all goes into a temporary folder. FOLDER receives the result as JSON, as a table, and the logs.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
minutes=12
out="$PWD/gpu-result"
wheels=""

say() { printf 'gpu-node: %s\n' "$*" >&2; }

while [ $# -gt 0 ]; do
    case $1 in
    --minutes) minutes=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --) shift; break ;;
    *) say "unknown option $1; expected --minutes, --out, --wheels or --"; exit 2 ;;
    esac
done

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
wheels="${wheels:-wheelhouse/$version}"
if ! ls "$wheels"/fastckpt_engine-*.whl >/dev/null 2>&1; then
    say "$wheels has no wheel of fastckpt. Where there is a network: make wheelhouse PYTHON_VERSION=$version"
    exit 2
fi
"$python" -c 'import numpy, torch; print("gpu-node: torch", torch.__version__, "CUDA", torch.version.cuda, "NumPy", numpy.__version__)' >&2 ||
    { say "$python has no torch, or no NumPy: name the Python that has them in PYTHON"; exit 2; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl
# Without the sources of the package: the tests have to find the wheel's.
cp -r tests pyproject.toml "$work/"
mkdir -p "$out"
out=$(cd "$out" && pwd)
export FASTCKPT_GPU_COMMIT="${FASTCKPT_GPU_COMMIT:-$(sed -e '1!s/.*/+/' "$wheels/COMMIT" 2>/dev/null | sort -ur | tr -d '\n')}"
export PYTHONPATH="$work/site" PYTHONDONTWRITEBYTECODE=1 TMPDIR="$work"
# The node's own plug-ins of pytest are not wanted: a warning of theirs would be an error here.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTEST_PLUGINS=pytest_timeout
cd "$work"
status=0
"$python" -m tests.gpu.first_run --minutes "$minutes" --out "$out" "$@" || status=$?
mkdir -p "$out/logs"
cp "$work"/fastckpt-gpu-*/*.log "$out/logs/" 2>/dev/null || true
say "the result is in $out"
exit "$status"
