"""These tests run by `make test-integrations`; elsewhere, where a library of theirs is missing, none is collected."""

import importlib.util

import pytest

LIBRARIES = ("transformers", "timm", "openvino")

collect_ignore_glob = [] if all(map(importlib.util.find_spec, LIBRARIES)) else ["test_*.py"]

if not collect_ignore_glob:
    from tests.hub.conftest import hub as hub  # a Hub on this machine, as a fixture


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of exports last: LiteRT's converter starts JAX, which warns of every fork after that."""
    items.sort(key=lambda item: item.path.name == "test_export.py")
