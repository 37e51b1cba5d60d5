"""These tests compile kernels: they run apart from those with Triton's interpreter (make test)."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "0" else ["tests/*"]
