#!/bin/sh
# Every kernel under NVIDIA's compute-sanitizer: memcheck (accesses outside allocations, misaligned ones) and racecheck
# (shared memory that two warps use without a barrier between). Ends with 0 if nothing was found, else says what.
#
#   tests/gpu/sanitize.sh [memcheck|racecheck|initcheck|synccheck …] [-- NAME …]
#
# NAMEs are cases of sanitize.py, all by default. PYTHON: the interpreter; LIMIT: seconds for one tool (default 120).
cd "$(dirname "$0")/../.." || exit 2
tools=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    tools="$tools $1"
    shift
done
[ "$1" = -- ] && shift
python=${PYTHON:-python3}
PATH=$PATH:/usr/local/cuda/bin
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit"; exit 2; }

# Without the sanitizer first: kernels are compiled into Triton's cache, many at a time, and results known to be right.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
"$python" tests/gpu/sanitize.py --list "$@" | xargs -P 8 -n 1 "$python" tests/gpu/sanitize.py || exit 1

failed=0
for tool in ${tools:-memcheck racecheck}; do
    options=
    [ "$tool" = memcheck ] && options="--padding 1024"
    echo "== $tool"
    # By default only this process is looked at, and not the compilers that it may start.
    timeout "${LIMIT:-120}" compute-sanitizer --tool "$tool" $options --print-limit 20 --error-exitcode 9 \
        "$python" tests/gpu/sanitize.py "$@"
    code=$?
    [ $code = 124 ] && echo "== $tool: not done after ${LIMIT:-120} s"
    [ $code = 0 ] || failed=1
done
exit $failed
