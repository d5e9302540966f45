"""Tests only where Triton interprets, which is decided when it is imported. `../test_interpreted.py` starts that."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.kernels.interpreted.fp8_kit import round_fp8_as_hardware

    round_fp8_as_hardware()
