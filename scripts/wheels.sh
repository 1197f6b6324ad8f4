#!/usr/bin/env bash
# Builds fastckpt's wheel for each Python that is here (dist/), and tries one as its user would: in a fresh environment, without a
# compiler and without these sources.
#
#     scripts/wheels.sh                      # for PYTHON, and the others of 3.10 to 3.14 that are on PATH or pyenv's
#     PYTHONS="3.11 3.13" scripts/wheels.sh  # for these
#     TORCH=2.14.1 scripts/wheels.sh         # the torch that the fresh environment gets
#
# The wheels are for this machine's C library (linux_x86_64). For an index they would be built in a manylinux image and named by auditwheel.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
torch="${TORCH:-$(sed -n 's/^torch==//p' constraints.txt)}"
out="$PWD/dist"

say() { printf 'wheels: %s\n' "$*" >&2; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# The interpreter of a version that has the headers, or nothing.
interpreter() {
    local candidate
    for candidate in "$python" "python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
        [ "$(version_of "$candidate")" = "$1" ] || continue
        "$candidate" -c 'import os, sys, sysconfig, ensurepip, venv
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null && echo "$candidate" && return
    done
}

own=$(version_of "$python")
rm -rf "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch" build' EXIT
for version in $own $(printf '%s\n' ${PYTHONS:-3.10 3.11 3.12 3.13 3.14} | grep -vx "$own"); do
    found=$(interpreter "$version")
    [ -n "$found" ] || { say "no wheel for Python $version: it is not here, or without headers"; continue; }
    rm -rf build # of another Python
    FASTCKPT_REQUIRE_NATIVE=1 "$found" -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir "$out" .
done

[ -n "$(ls "$out"/*-cp"${own/./}"-*.whl)" ] # set -e ends it here if there is none for $python
"$python" -m venv "$scratch/env"
inside="$scratch/env/bin"
mkdir "$scratch/elsewhere"
cd "$scratch/elsewhere"
# Only the environment's own programs can be found: a package that needs a compiler fails, and fastckpt must not have needed one.
user() { env -i HOME="$scratch" PATH="$inside" TMPDIR="$scratch" "$@"; }
"$inside/python" -m pip --disable-pip-version-check install --quiet "torch==$torch"
PATH="$inside" "$inside/python" -m pip --disable-pip-version-check install --quiet --only-binary=:all: "$out"/*-cp"${own/./}"-*.whl
user python -W error - <<'PY'
import importlib.metadata
import shutil

import torch

import fastckpt
import fastckpt._native  # built, and it can be loaded

assert not any(map(shutil.which, ("cc", "gcc", "g++", "clang", "clang++"))), "there is a compiler"
assert fastckpt.__version__ == importlib.metadata.version("fastckpt-engine")
state = {"weight": torch.randn(1000, 1000), "step": 7}
fastckpt.save(state, "x.fckpt")
found = fastckpt.load("x.fckpt")
assert torch.equal(found["weight"], state["weight"]) and found["step"] == 7
PY
user python -m fastckpt check x.fckpt
user fastckpt --version
say "in $out: $(cd "$out" && echo *.whl)"
say "the one for Python $own saves, loads and checks with torch $torch in a fresh environment without a compiler"
