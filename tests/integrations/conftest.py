"""These tests run by `make test-integrations`; elsewhere, where a library of theirs is missing, none is collected."""

import importlib.util

LIBRARIES = ("transformers", "timm", "openvino")

collect_ignore_glob = [] if all(map(importlib.util.find_spec, LIBRARIES)) else ["test_*.py"]

if not collect_ignore_glob:
    from tests.hub.conftest import hub as hub  # a Hub on this machine, as a fixture
