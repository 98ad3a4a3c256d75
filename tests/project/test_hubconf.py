"""`torch.hub` makes the zoo's models from a clone of the repository, also where nfzoo is not installed."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import nfzoo
from nfzoo import ConfigError
from tests.support.helpers import assert_same

ROOT = Path(__file__).resolve().parents[2]

# Without the import hook of an editable installation, and without the folders that the tests add.
NOT_INSTALLED = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
sys.path[:] = [path for path in sys.path if not path.startswith(sys.argv[1]) or "site-packages" in path]
try:
    import nfzoo
except ImportError:
    print("no nfzoo")
import torch
load = lambda *given, **options: torch.hub.load(sys.argv[1], *given, source="local", **options)
print(load("nfnet_test", num_classes=3).save_pretrained(sys.argv[2]).name)
print(load("from_pretrained", sys.argv[2]).num_classes)
import nfzoo.recipes, nfzoo
print(nfzoo.__file__)
"""


def load(name: str, *given: Any, **options: Any) -> Any:
    return torch.hub.load(str(ROOT), name, *given, source="local", **options)  # type: ignore[no-untyped-call]


def test_the_models_are_nfzoos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nfzoo, "__path__", list(nfzoo.__path__))  # hubconf.py adds to it
    torch.manual_seed(0)
    model = load("nfnet_test", num_classes=3, drop_rate=0.1)
    torch.manual_seed(0)
    expected = nfzoo.create("nfnet-test", num_classes=3, drop_rate=0.1)
    assert_same(model.state_dict(), expected.state_dict())
    assert model.description == expected.description
    assert model.training
    again = load("from_pretrained", model.save_pretrained(tmp_path / "m"), num_classes=2)
    assert again.num_classes == 2
    assert not again.training

    asked = []
    monkeypatch.setattr(nfzoo, "from_pretrained", lambda name, **options: asked.append((name, options)))
    for name in nfzoo.list_models():
        load(name.replace("-", "_"), pretrained=True, in_channels=1)
    assert asked == [(name, {"in_channels": 1}) for name in nfzoo.list_models()]
    with pytest.raises(ConfigError, match="pretrained must be true or false, not 'runs/digits'"):
        load("nfnet_test", pretrained="runs/digits")


def test_all_that_nfzoo_depends_on_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nfzoo, "__path__", list(nfzoo.__path__))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = {re.split(r"[>=]", line)[0] for line in project["dependencies"]}
    modules = {{"pillow": "PIL", "pyyaml": "yaml"}.get(p, p.replace("-", "_")) for p in packages}
    scope: dict[str, Any] = {"__file__": str(ROOT / "hubconf.py"), "__name__": "hubconf"}
    exec((ROOT / "hubconf.py").read_text(), scope)
    assert set(scope["dependencies"]) == modules
    public = {name for name, value in scope.items() if callable(value) and not name.startswith("_")}
    assert public == {name.replace("-", "_") for name in nfzoo.list_models()} | {"from_pretrained"}


@pytest.mark.slow
def test_nothing_has_to_be_installed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED, str(ROOT), str(tmp_path / "m")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["no nfzoo", "m", "3", str(ROOT / "nfzoo/__init__.py")], done.stderr
