"""These tests need `nfzoo[tpu-aot]`. Where torchax is not installed, as in the main environment, none is collected;
`make test-tpu`, which asks for them alone, then fails for want of tests.
"""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torchax") else ["test_*.py"]
