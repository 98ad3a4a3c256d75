"""`from_pretrained` without a network: names, paths, and what the Hub's errors become."""

from __future__ import annotations

import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import constants, errors

import nfzoo
from nfzoo import CheckpointError, NFNet, NfzooError, UnknownModelError
from nfzoo.checkpoint.model_folder import Description, save_checkpoint
from nfzoo.conversion.timm import ARCHITECTURES, IMAGENET_TAG, write_timm
from nfzoo.hub import download, sources
from nfzoo.hub.download import HTTP_ERROR
from nfzoo.hub.registry import PUBLIC
from nfzoo.variants import VARIANTS
from tests.support.helpers import SMALL, assert_same, images, random_params


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a test without a network asked the Hub for {args}")

    monkeypatch.setattr(download, "hf_hub_download", refuse)
    monkeypatch.setattr(sources, "fetch", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def saved(folder: Path) -> NFNet:
    module = NFNet(SMALL["nfnet"])
    module.load_state_dict(random_params(module.config))
    module.save_pretrained(folder)
    return module.eval()


def test_a_folder_a_file_and_a_string(tmp_path):
    module, x = saved(tmp_path / "m"), images(SMALL["nfnet"])
    for source in (tmp_path / "m", str(tmp_path / "m"), tmp_path / "m" / "model.safetensors"):
        loaded = nfzoo.from_pretrained(source)
        assert torch.equal(loaded(x), module(x))
        assert not loaded.training


def test_options_reach_the_model(tmp_path):
    saved(tmp_path / "m")
    loaded = nfzoo.from_pretrained(tmp_path / "m", num_classes=3, dtype=torch.bfloat16)
    assert loaded.config.num_classes == 3
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_the_method_is_the_function(tmp_path):
    saved(tmp_path / "m")
    loaded = NFNet.from_pretrained(tmp_path / "m", num_classes=3, dtype=torch.bfloat16)
    assert loaded.config.num_classes == 3
    with pytest.raises(TypeError, match="num_clases"):
        NFNet.from_pretrained(tmp_path / "m", num_clases=3)


def test_what_is_on_disk_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nfnet-f0", "org/name"):
        module = saved(Path(name))
        assert torch.equal(nfzoo.from_pretrained(name)(images(SMALL["nfnet"])), module(images(SMALL["nfnet"])))


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - PUBLIC.keys()))
def test_a_name_without_weights_says_so(name):
    with pytest.raises(CheckpointError, match=rf"no weights are published for '{name}'.*nfzoo\.create.*nfzoo convert"):
        nfzoo.from_pretrained(name)


def test_the_table():
    """All public NF-weights of timm, each under the zoo's name of its architecture."""
    assert {f"nfnet-f{n}" for n in range(7)} <= PUBLIC.keys()
    assert len(PUBLIC) == 13
    for name, repository in PUBLIC.items():
        architecture, tag = repository.repo_id.removeprefix("timm/").split(".")
        assert ARCHITECTURES[architecture] == name
        assert tag.endswith(IMAGENET_TAG)
        assert repository.layout == "timm"


@pytest.mark.parametrize(("name", "near"), [("nfnet-f00", "nfnet-f0"), ("NFNET-F1", "nfnet-f1"), ("nfresnet-50", "50")])
def test_an_unknown_name_gives_the_nearest(name, near):
    with pytest.raises(UnknownModelError, match="did you mean") as caught:
        nfzoo.from_pretrained(name)
    assert near in str(caught.value)


@pytest.mark.parametrize(
    "path", ["./missing", "/no/such/folder", "a/b/c", "missing.safetensors", "~/missing", "../missing", "x" * 5000]
)
def test_a_missing_path_is_one_clear_error(path):
    with pytest.raises(NfzooError) as caught:
        nfzoo.from_pretrained(path)
    assert path in str(caught.value)


@pytest.mark.parametrize("name", ["", "a b", "org/na me", "/", "a\0b", "-x/y", "org/", "/name", "ä/b"])
def test_junk_is_an_nfzoo_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NfzooError):
        nfzoo.from_pretrained(name)


def http(error: type[Exception], status: int) -> Exception:
    response = Mock(status_code=status, headers={}, url="https://hub.invalid")
    return error(f"{status} from the Hub", response=response)  # type: ignore[call-arg]


FAILURES = {
    "gated": (http(errors.GatedRepoError, 403), "accept its terms"),
    "missing repository": (http(errors.RepositoryNotFoundError, 404), "does not exist"),
    "missing revision": (http(errors.RevisionNotFoundError, 404), "does not exist"),
    "missing file": (http(errors.RemoteEntryNotFoundError, 404), "holds no nfzoo model"),
    "no connection": (errors.LocalEntryNotFoundError("cannot reach"), "check the connection"),
    "offline": (errors.OfflineModeIsEnabled("offline"), "check the connection|could not be read"),
    "server error": (http(errors.HfHubHTTPError, 503), "could not be read"),
    "bad name": (errors.HFValidationError("Cannot have -- or .. in repo_id"), "could not be read"),
    "timeout": (HTTP_ERROR("timed out"), "could not be read"),
    "bad metadata": (errors.FileMetadataError("no size"), "could not be read"),
    "disk full": (OSError(28, "No space left on device"), "could not be read"),
    "cut": (ConnectionResetError("cut"), "could not be read"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_the_hubs_errors_become_ours(case, monkeypatch):
    error, match = FAILURES[case]
    monkeypatch.setattr(download, "get_hf_file_metadata", Mock())  # which asks whether the Hub is there
    monkeypatch.setattr(download, "hf_hub_download", Mock(side_effect=error))
    with pytest.raises(CheckpointError, match=match) as caught:
        nfzoo.from_pretrained("org/name", revision="v1")
    assert "'org/name' at revision 'v1'" in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("name", ["a--b/c", "a..b/c", "org/name.git", "org/name-", f"org/{'n' * 200}"])
def test_names_that_the_hub_refuses(name, monkeypatch):
    """With the Hub's own validation, which comes before any connection."""
    from huggingface_hub import hf_hub_download

    monkeypatch.setattr(download, "hf_hub_download", hf_hub_download)
    with pytest.raises(NfzooError):
        nfzoo.from_pretrained(name)


@pytest.mark.parametrize("layout", ["nfzoo", "timm"])
def test_folders_of_both_layouts(layout, tmp_path):
    cfg = VARIANTS["timm-nf-regnet-b0"].config.replace(num_classes=3)
    description = Description(cfg, VARIANTS["timm-nf-regnet-b0"].preprocessing, "timm-nf-regnet-b0", ("a", "b", "c"))
    params = random_params(cfg)
    write = save_checkpoint if layout == "nfzoo" else write_timm
    write(tmp_path / "m", description, params)
    loaded = nfzoo.from_pretrained(tmp_path / "m", dtype=torch.float64)
    assert_same(loaded.state_dict(), {key: value.double() for key, value in params.items()})
    assert loaded.description._replace(provenance=None) == description
    (tmp_path / "m" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="damaged"):
        nfzoo.from_pretrained(tmp_path / "m")
