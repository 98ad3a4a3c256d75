"""The libraries that the other tests load folders by are the ones that were asked for."""

import importlib.metadata
import re
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt").read_text()


def test_versions() -> None:
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", REQUIREMENTS, re.MULTILINE):
        assert importlib.metadata.version(name).split("+")[0] == version, name
