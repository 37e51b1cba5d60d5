"""These tests compile kernels: make test runs them apart from those with Triton's interpreter."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "0" else ["tests/*"]
