#!/usr/bin/env bash
# Gathers what a GPU node without a network lacks, as wheels: fastckpt itself, built for its Python, and all that fastckpt
# and its tests need. torch and NumPy are the node's own; numba and llvmlite stay out, the built kernels take their place.
#
#     PYTHON_VERSION=3.12 scripts/wheelhouse.sh [FOLDER]     # by default wheelhouse/3.12
#
# Needs the Python of that version here, with headers and a C++ compiler, and pip's index. `make wheelhouse` calls this.
set -euo pipefail
cd "$(dirname "$0")/.."
version="${PYTHON_VERSION:-3.12}"
out="${1:-wheelhouse/$version}"
limit_mb=60

say() { printf 'wheelhouse: %s\n' "$*" >&2; }

# The interpreter of that version: on PATH, or one of pyenv's.
interpreter() {
    local candidate
    for candidate in "${PYTHON:-}" "python$version" "$HOME"/.pyenv/versions/"$version".*/bin/python; do
        [ -n "$candidate" ] && "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null &&
            echo "$candidate" && return
    done
    say "there is no Python $version here to build fastckpt's own wheel with. Install it with its headers, or name it: PYTHON=/path/to/python"
    return 1
}

python=$(interpreter)
packages="zstandard xxhash safetensors boto3 botocore s3transfer jmespath python-dateutil six urllib3 typing_extensions
    pytest pluggy iniconfig packaging Pygments pytest-timeout hypothesis sortedcontainers psutil"
wanted=()
for name in $packages; do
    pin=$(grep -i "^$name==" constraints.txt) || { say "constraints.txt has no version of $name"; exit 1; }
    wanted+=("$pin")
done

rm -rf "$out"
mkdir -p "$out"
platforms=()
for glibc in 5 12 17 24 27 28; do # pip takes each name literally; glibc 2.28 is RHEL 8's
    platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
"$python" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: --python-version "$version" \
    --implementation cp "${platforms[@]}" --platform manylinux1_x86_64 --platform manylinux2010_x86_64 --platform manylinux2014_x86_64 \
    --dest "$out" "${wanted[@]}"
FASTCKPT_REQUIRE_NATIVE=1 "$python" -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir "$out" .
rm -rf build
{
    git rev-parse HEAD 2>/dev/null || echo unknown
    git status --porcelain 2>/dev/null | sed 's/^/changed: /'
} >"$out/COMMIT"
mb=$(du -sm "$out" | cut -f1)
say "$(find "$out" -name '*.whl' | wc -l) wheels, $mb MB, in $out"
[ "$mb" -le "$limit_mb" ] || { say "that is more than $limit_mb MB"; exit 1; }
