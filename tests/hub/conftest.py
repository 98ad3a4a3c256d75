"""A Hub on this machine, and a small model for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from nfzoo import NFNet
from nfzoo.checkpoint.model_folder import Description
from nfzoo.variants import VARIANTS
from tests.support.helpers import SMALL, random_params
from tests.support.hub_server import HubServer

FILES = ("config.json", "model.safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server in place of the Hub, an empty cache, no token, and no waiting between attempts."""
    with HubServer() as server:
        # The environment variables are read when huggingface_hub is imported; test_environment_variables sets those.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        disable_progress_bars()
        yield server
        enable_progress_bars()


@pytest.fixture(scope="module")
def model() -> NFNet:
    description = Description(
        SMALL["nfnet"], VARIANTS["nfnet-test"].preprocessing, "small", tuple("abcde"), {"trained_from": "nothing"}
    )
    return NFNet.from_params(description, random_params(SMALL["nfnet"])).eval()


@pytest.fixture(scope="module")
def files(model: NFNet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = model.save_pretrained(tmp_path_factory.mktemp("model") / "m")
    return {name: (folder / name).read_bytes() for name in FILES}
