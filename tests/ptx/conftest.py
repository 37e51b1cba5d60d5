"""These tests compile kernels: they run apart from those with Triton's interpreter (make test)."""

import os

# tests/conftest.py sets it where there is no GPU, if nobody else has.
collect_ignore_glob = ["tests/*"] if os.environ.get("TRITON_INTERPRET") == "1" else []
