"""Loading from a Hub on this machine, over HTTP, with the faults that networks have."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants, save_torch_state_dict
from safetensors.torch import load_file

import nfzoo
from nfzoo import CheckpointError, NFNet, UnknownModelError
from nfzoo.checkpoint.model_folder import Description
from nfzoo.cli.main import main
from nfzoo.conversion.timm import write_timm
from nfzoo.data.labels import imagenet
from nfzoo.hub.registry import PUBLIC
from nfzoo.hub.space import app
from nfzoo.hub.space.app import Gallery, SpaceError
from nfzoo.variants import VARIANTS
from tests.support.helpers import assert_same, images, random_params
from tests.support.hub_server import HubServer, object_id
from tests.support.pictures import write_images

# huggingface_hub 2.4 uploads in a way that its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "org/small"
FILES = ("config.json", "model.safetensors")
INDEX = "model.safetensors.index.json"
ROOT = Path(__file__).resolve().parents[2]


def blobs(tmp_path: Path) -> list[Path]:
    """The files of the cache, without the parts of files that older clients resume from."""
    found = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and "blobs" in p.parts]
    return sorted(p for p in found if p.suffix != ".incomplete")


def test_the_token_of_the_environment_is_sent(hub, files, monkeypatch):
    hub.add(REPO, files)
    hub.closed.add(REPO)
    monkeypatch.setenv("HF_TOKEN", "good")
    nfzoo.from_pretrained(REPO)
    with pytest.raises(CheckpointError, match="private"):
        nfzoo.from_pretrained(REPO, token=False, force_download=True)
    hub.fail("model.safetensors", "503", times=1000, method="HEAD")
    with pytest.raises(CheckpointError, match="overloaded"):  # not what the cache holds
        nfzoo.from_pretrained(REPO, force_download=True)


def test_a_misspelt_path_is_no_repository(hub, files, tmp_path, monkeypatch):
    """A folder of its first name exists here, so that the Hub is not asked; `hub:` asks it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    (tmp_path / "org").mkdir()
    hub.add(REPO, files)
    for name in ("runs/dgits", "runs/dgits/", "runs/dgits/model.safetensors", "./runs/dgits", REPO, "weights.pth"):
        with pytest.raises(CheckpointError, match="there is no file or folder") as caught:
            nfzoo.from_pretrained(name)
        assert ("did you mean 'runs/digits'" in str(caught.value)) == name.strip("./").endswith("dgits")
        assert ("hub:org/small would be" in str(caught.value)) == (name == REPO)
    assert not hub.requests
    assert nfzoo.from_pretrained(f"hub:{REPO}").config == nfzoo.from_pretrained(f"hub:{REPO}").config
    with pytest.raises(UnknownModelError, match="write hub:ORG/NAME"):
        nfzoo.from_pretrained("hub:small")


def test_another_number_of_classes(hub, files, model, caplog):
    hub.add(REPO, files)
    loaded = nfzoo.from_pretrained(REPO, num_classes=7)
    assert loaded(images(loaded.config)).shape == (2, 7)
    assert "7" in caplog.text
    hub.requests.clear()
    with pytest.raises(nfzoo.ConfigError, match="num_classes"):
        nfzoo.from_pretrained("org/other", num_classes=-1)
    assert not hub.requests


@pytest.fixture
def shards(model: NFNet, files: dict[str, bytes], tmp_path: Path) -> dict[str, bytes]:
    (tmp_path / "shards").mkdir()
    save_torch_state_dict(model.state_dict(), tmp_path / "shards", max_shard_size=30_000)
    written = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert len(written) > 3
    return {"config.json": files["config.json"], **written}


def test_a_model_in_shards(hub, shards, model):
    hub.add(REPO, shards)
    assert_same(nfzoo.from_pretrained(REPO).state_dict(), model.state_dict())
    hub.requests.clear()
    assert_same(nfzoo.from_pretrained(REPO).state_dict(), model.state_dict())
    assert_same(nfzoo.from_pretrained(REPO, local_files_only=True).state_dict(), model.state_dict())
    assert hub.requests == []


def test_a_shard_that_is_missing_damaged_or_elsewhere(hub, shards, model):
    first = min(name for name in shards if name.startswith("model-"))
    hub.add(REPO, {name: content for name, content in shards.items() if name != first})
    with pytest.raises(CheckpointError, match=f"lacks {first}, which its model.safetensors.index.json names"):
        nfzoo.from_pretrained(REPO)
    hub.add("org/outside", {**shards, INDEX: shards[INDEX].replace(first.encode(), b"../" + first.encode())})
    with pytest.raises(CheckpointError, match=r"is no name of a \.safetensors file beside the index"):
        nfzoo.from_pretrained("org/outside")
    hub.add("org/damaged", shards)
    hub.fail(first, "corrupt")
    assert_same(nfzoo.from_pretrained("org/damaged").state_dict(), model.state_dict())
    hub.add("org/lost", shards)
    hub.fail(first, "503", times=1000, method="HEAD")
    with pytest.raises(CheckpointError, match=r"not whole in the cache|overloaded"):
        nfzoo.from_pretrained("org/lost")


# ---------------------------------------------------------------- the cache


def test_the_second_call_asks_nothing(hub, files, model):
    hub.add(REPO, files)
    nfzoo.from_pretrained(REPO)
    assert len(hub.requests) >= 2
    hub.requests.clear()
    several: list[dict[str, Any]] = [{}, {"local_files_only": True}, {"revision": hub.repos[REPO].branches["main"]}]
    for options in several:
        assert_same(nfzoo.from_pretrained(REPO, **options).state_dict(), model.state_dict())
    assert hub.requests == []


def test_an_update_arrives_when_it_is_asked_for(hub, files, model):
    first = hub.add(REPO, files)
    nfzoo.from_pretrained(REPO)
    newer = NFNet.from_params(model.description, random_params(model.config, seed=5))
    newer.push_to_hub(REPO, token="good")
    assert_same(nfzoo.from_pretrained(REPO).state_dict(), model.state_dict())
    assert_same(nfzoo.from_pretrained(REPO, force_download=True).state_dict(), newer.state_dict())
    assert_same(nfzoo.from_pretrained(REPO).state_dict(), newer.state_dict())
    hub.requests.clear()
    assert_same(nfzoo.from_pretrained(REPO, revision=first).state_dict(), model.state_dict())
    assert hub.requests == []  # the commit is still there
    nfzoo.from_pretrained(REPO, force_download=True)
    assert not hub.asked("GET", "model.safetensors")  # what did not change is not fetched


def test_a_revision(hub, files, model):
    hub.add(REPO, files)
    other = NFNet.from_params(model.description, random_params(model.config, seed=6))
    other.push_to_hub(REPO, token="good", revision="v2")
    assert_same(nfzoo.from_pretrained(REPO, revision="v2").state_dict(), other.state_dict())
    assert_same(nfzoo.from_pretrained(REPO).state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match="at revision 'v3' does not exist"):
        nfzoo.from_pretrained(REPO, revision="v3")


def test_a_cache_of_ones_own(hub, files, tmp_path):
    hub.add(REPO, files)
    nfzoo.from_pretrained(REPO, cache_dir=tmp_path / "own")
    assert (tmp_path / "own").is_dir()
    assert not blobs(tmp_path)


@pytest.mark.parametrize("how", ["offline", "local_files_only"])
def test_without_a_network(how, hub, files, model, monkeypatch):
    hub.add(REPO, files)
    options: dict[str, Any] = {"local_files_only": True} if how == "local_files_only" else {}
    with monkeypatch.context() as offline:
        if how == "offline":
            offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match="not whole in the cache, and offline mode"):
            nfzoo.from_pretrained(REPO, **options)
        assert hub.requests == []
        offline.setattr(constants, "HF_HUB_OFFLINE", False)
        nfzoo.from_pretrained(REPO)
        hub.requests.clear()
        offline.setattr(constants, "HF_HUB_OFFLINE", how == "offline")
        assert_same(nfzoo.from_pretrained(REPO, **options).state_dict(), model.state_dict())
    assert hub.requests == []
    with pytest.raises(CheckpointError, match="contradict"):
        nfzoo.from_pretrained(REPO, local_files_only=True, force_download=True)


def test_a_cache_without_links(hub, files, model, monkeypatch, caplog):
    """As on Windows: the file has no name that states its hash, so the Hub is asked for it."""
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda cache_dir=None: False)
    hub.add(REPO, files)
    hub.fail("model.safetensors", "corrupt")
    assert_same(nfzoo.from_pretrained(REPO).state_dict(), model.state_dict())
    assert "is damaged" in caplog.text
    hub.requests.clear()
    assert_same(nfzoo.from_pretrained(REPO).state_dict(), model.state_dict())
    assert hub.requests == []


def flipped(files: dict[str, bytes]) -> dict[str, bytes]:
    content = bytearray(files["model.safetensors"])
    content[-1] ^= 1
    return {**files, "model.safetensors": bytes(content)}


def test_files_without_a_hash_are_named_or_refused(hub, files, model, caplog):
    """A mirror or a proxy may state none, so that no damage would be noticed."""
    hub.hashless = True
    hub.add("org/flipped", flipped(files))
    with pytest.raises(CheckpointError, match="damaged: tensors and description have the CRC-32"):
        nfzoo.from_pretrained("org/flipped")
    hub.add(REPO, files)
    refusal = "config.json of the Hub repository 'org/small' cannot be checked: the server states no hash"
    several: list[dict[str, Any]] = [{}, {"local_files_only": True}, {"force_download": True}]
    with pytest.raises(CheckpointError, match=refusal):
        nfzoo.from_pretrained(REPO, require_hash=True)
    for options in several:
        caplog.clear()
        nfzoo.from_pretrained(REPO, **options)
        (said,) = caplog.messages
        assert said.startswith(
            "config.json and model.safetensors of the Hub repository 'org/small' could not be checked"
        )
        with pytest.raises(CheckpointError, match=refusal):
            nfzoo.from_pretrained(REPO, require_hash=True, **options)
    hub.hashless = False
    hub.add("org/other", files)
    caplog.clear()
    for options in several:
        options = {**options, "require_hash": True}
        assert_same(nfzoo.from_pretrained("org/other", **options).state_dict(), model.state_dict())
    assert caplog.messages == []


def test_every_shard_needs_its_hash(hub, shards, caplog):
    hub.hashless = True
    hub.add(REPO, shards)
    nfzoo.from_pretrained(REPO)
    (said,) = caplog.messages
    assert all(name in said for name in shards)


def test_a_cache_without_links_has_its_hashes_from_the_hub(hub, files, model, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda cache_dir=None: False)
    hub.add(REPO, files)
    for _ in range(2):
        assert_same(nfzoo.from_pretrained(REPO, require_hash=True).state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match="cannot be checked"):
        nfzoo.from_pretrained(REPO, require_hash=True, local_files_only=True)
    hub.hashless = True
    with pytest.raises(CheckpointError, match="cannot be checked"):
        nfzoo.from_pretrained(REPO, require_hash=True)
    assert not caplog.messages


def test_every_command_can_require_a_hash(hub, files, tmp_path, monkeypatch, capsys):
    hub.hashless = True
    hub.add(REPO, files)
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data", {"a": 2, "b": 2})
    picture = "data/a/0.png"
    commands = (
        *(["info", REPO], ["predict", REPO, picture], ["evaluate", REPO, "--data", "data"], ["convert", REPO, "out"]),
        *(["bulk", REPO, "--data", "data", "--output", "out"], ["plot", "signal", REPO]),
        ["export", REPO, "--format", "onnx", "--output", "out"],
        ["train", "--model", REPO, "--data", "data", "--output", "out", "--batch-size", "2", "--epochs", "1"],
    )
    for command in commands:
        value = ["true"] if command[0] == "train" else []
        assert main([*command, "--require-hash", *value]) == 2, command
        assert "config.json of the Hub repository 'org/small' cannot be checked" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["data"]
    monkeypatch.setattr(app, "build", lambda gallery: built.append(gallery) or SimpleNamespace(launch=lambda **_: None))
    built: list[Gallery] = []
    assert main(["space", "--model", REPO, "--require-hash"]) == 0
    with pytest.raises(SpaceError, match="cannot be loaded"):
        built[0].look(picture, REPO)


def test_every_command_reads_pickles_on_request_alone(timm_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data", {"a": 2, "b": 2})
    write_timm(tmp_path / "m", timm_model.description, timm_model.state_dict())
    torch.save(load_file("m/model.safetensors"), "m/pytorch_model.bin")
    Path("m/model.safetensors").unlink()
    commands = (
        *(
            ["info", "m"],
            ["predict", "m", "data/a/0.png"],
            ["evaluate", "m", "--data", "data"],
            ["convert", "m", "out"],
        ),
        *(["bulk", "m", "--data", "data", "--output", "bulk"], ["plot", "signal", "m", "--output", "s.png"]),
        ["export", "m", "--format", "onnx", "--output", "onnx"],
        ["train", "--model", "m", "--data", "data", "--output", "run", "--batch-size", "2", "--epochs", "1"],
    )
    read = []
    monkeypatch.setattr(torch, "load", lambda *_, **__: read.append(1) or exit(7))
    for command in commands:
        value = ["true"] if command[0] == "train" else []
        assert main(command) == 2, command
        assert "pass allow_pickle=True (--allow-pickle)" in capsys.readouterr().err
        assert not read
        with pytest.raises(SystemExit):
            main([*command, "--allow-pickle", *value])
        assert read.pop() == 1, command
    monkeypatch.setattr(app, "build", lambda gallery: built.append(gallery) or SimpleNamespace(launch=lambda **_: None))
    built: list[Gallery] = []
    for option, outcome in ([], SpaceError), (["--allow-pickle"], SystemExit):
        assert main(["space", "--model", "m", *option]) == 0
        with pytest.raises(outcome):
            built[-1].look("data/a/0.png", "m")


def test_a_file_that_rots_in_the_cache(hub, files, model, tmp_path, caplog, monkeypatch):
    hub.add(REPO, files)
    nfzoo.from_pretrained(REPO)
    (blob,) = (b for b in blobs(tmp_path) if len(b.name) == 64)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*is damaged.*fetched again"):
        nfzoo.from_pretrained(REPO, local_files_only=True)
    assert_same(nfzoo.from_pretrained(REPO).state_dict(), model.state_dict())
    assert "fetching it again" in caplog.text


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["cut", "silence", "corrupt", "503", "slow"])
def test_a_fault_that_passes(fault, name, hub, files, model):
    hub.add(REPO, files)
    hub.fail(name, fault)
    assert_same(nfzoo.from_pretrained(REPO).state_dict(), model.state_dict())
    assert not hub.failures[name]


PERSISTENT = {
    "cut": "could not be read",
    "silence": "could not be read",
    "corrupt": "is damaged.*twice",
    "short": "could not be read.*size",
    "503": "overloaded|503",
    "404": "lacks config.json or model.safetensors",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", PERSISTENT)
def test_a_fault_that_stays(fault, name, hub, files, model, tmp_path):
    """One clear error, and then, when the Hub has recovered, no trace of it."""
    hub.add(REPO, files)
    hub.fail(name, fault, times=1000)
    with pytest.raises(CheckpointError, match=PERSISTENT[fault]) as caught:
        nfzoo.from_pretrained(REPO)
    assert f"'{REPO}'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(object_name(b) != b.name for b in blobs(tmp_path)), "a damaged or partial file stayed"
    hub.failures.clear()
    assert_same(nfzoo.from_pretrained(REPO).state_dict(), model.state_dict())
    hub.requests.clear()
    assert_same(nfzoo.from_pretrained(REPO).state_dict(), model.state_dict())
    assert hub.requests == []


def object_name(path: Path) -> str:
    return object_id("x.safetensors" if len(path.name) == 64 else "x.json", path.read_bytes())


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_an_overloaded_hub(method, hub, files, model):
    hub.add(REPO, files)
    hub.fail("config.json", "503", times=1000, method=method)
    with pytest.raises(CheckpointError, match="small"):
        nfzoo.from_pretrained(REPO)
    hub.failures.clear()
    assert_same(nfzoo.from_pretrained(REPO).state_dict(), model.state_dict())


def test_no_hub_at_all(hub, files, tmp_path, monkeypatch):
    """One try, without the client's pauses; a folder of a similar name is named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "orgs" / "small").mkdir(parents=True)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("there was a second try"))
    hub.add(REPO, files)
    hub.server.shutdown()
    hub.server.server_close()
    several: list[dict[str, Any]] = [{}, {"force_download": True}]
    for options in several:
        with pytest.raises(CheckpointError, match="not whole in the cache, and the Hub cannot be reached") as caught:
            nfzoo.from_pretrained(REPO, **options)
        assert "refused" in str(caught.value)
        assert str(caught.value).endswith("; did you mean 'orgs/small'?")


def test_refusals(hub, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "orgs" / "none").mkdir(parents=True)
    hub.add(REPO, files)
    near = r"there is also no such folder here; did you mean 'orgs/none'\?"
    with pytest.raises(CheckpointError, match=f"'org/none' does not exist, or is private.*{near}"):
        nfzoo.from_pretrained("org/none")
    hub.gated.add(REPO)
    with pytest.raises(CheckpointError, match="accept its terms"):
        nfzoo.from_pretrained(REPO)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (b"{", "not JSON"),
        (b"[]", "does not hold"),
        (b'{"model_type": "vit"}', "does not hold"),
        (b'{"library_name": "nfzoo"}', "architecture"),
    ],
)
def test_repositories_of_others(config, match, hub, files):
    hub.add(REPO, {**files, "config.json": config})
    with pytest.raises(CheckpointError, match=match):
        nfzoo.from_pretrained(REPO)


# ---------------------------------------------------------------- timm's layout and the zoo's names

ZOO, ARCH = "timm-nf-regnet-b1", "nf_regnet_b1"


@pytest.fixture(scope="module")
def timm_model() -> NFNet:
    row = VARIANTS[ZOO]
    cfg = row.config.replace(num_classes=4)
    provenance = {"tag": "ra2_in1k"}
    description = Description(cfg, row.preprocessing, ZOO, tuple("abcd"), provenance)
    return NFNet.from_params(description, random_params(cfg)).eval()


@pytest.fixture(scope="module")
def timm_files(timm_model: NFNet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_timm(tmp_path_factory.mktemp("timm") / "m", timm_model.description, timm_model.state_dict())
    return {name: (folder / name).read_bytes() for name in FILES}


def test_a_name_of_the_zoo(hub, timm_model, timm_files):
    commit = hub.add(PUBLIC[ZOO].repo_id, timm_files)
    loaded = nfzoo.from_pretrained(ZOO)
    assert_same(loaded.state_dict(), timm_model.state_dict())
    assert loaded.description._replace(provenance=None) == timm_model.description._replace(provenance=None)
    assert loaded.provenance is not None
    assert loaded.provenance["repository"] == PUBLIC[ZOO].repo_id
    assert loaded.provenance["revision"] == commit
    assert loaded.provenance["tag"] == "ra2_in1k"
    hub.requests.clear()
    nfzoo.from_pretrained(ZOO)
    nfzoo.from_pretrained(PUBLIC[ZOO].repo_id, num_classes=9)  # by its repository: the same
    assert hub.requests == []


def test_a_name_of_the_zoo_means_its_architecture(hub, timm_files, monkeypatch):
    hub.add("timm/nfnet_l0.ra2_in1k", timm_files)
    with pytest.raises(CheckpointError, match="says 'nf_regnet_b1', not 'nfnet_l0'"):
        nfzoo.from_pretrained("nfnet-l0")


def test_a_known_sha256_is_checked(hub, timm_files, monkeypatch, caplog):
    hub.add(PUBLIC[ZOO].repo_id, timm_files)
    hub.hashless = True
    sha256 = hashlib.sha256(timm_files["model.safetensors"]).hexdigest()
    monkeypatch.setitem(PUBLIC, ZOO, PUBLIC[ZOO]._replace(sha256=sha256))
    nfzoo.from_pretrained(ZOO)
    assert ["model.safetensors" in said for said in caplog.messages] == [False]  # but config.json
    hub.hashless = False
    monkeypatch.setitem(PUBLIC, ZOO, PUBLIC[ZOO]._replace(sha256="0" * 64))
    with pytest.raises(CheckpointError, match=r"is another file .*the sha256 [0-9a-f]{64}, not 0000"):
        nfzoo.from_pretrained(ZOO)


def test_timms_older_weight_file(hub, timm_model, tmp_path):
    folder = write_timm(tmp_path / "m", timm_model.description, timm_model.state_dict())
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    hub.add(REPO, {name: (folder / name).read_bytes() for name in ("config.json", "pytorch_model.bin")})
    for local in (False, True):  # the cache holds config.json by then
        with pytest.raises(CheckpointError, match=r"lacks model.safetensors; .*allow_pickle=True \(--allow-pickle\)"):
            nfzoo.from_pretrained(REPO, local_files_only=local)
    assert all("pytorch_model.bin" not in request.path for request in hub.requests)
    loaded = nfzoo.from_pretrained(REPO, allow_pickle=True)
    assert_same(loaded.state_dict(), timm_model.state_dict())
    hub.requests.clear()
    for local in (False, True):
        loaded = nfzoo.from_pretrained(REPO, local_files_only=local, allow_pickle=True)
        assert_same(loaded.state_dict(), timm_model.state_dict())
    assert hub.requests == []


# ---------------------------------------------------------------- other processes

LOAD = """
import hashlib, json, sys
import nfzoo
model = nfzoo.from_pretrained(*json.loads(sys.argv[1]))
print(hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest())
"""


def start(hub: HubServer, home: Path, source: str, **environment: str) -> subprocess.Popen[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, json.dumps([source])],
        env={**inherited, **environment},
        cwd=home.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def digest(model: NFNet) -> str:
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()


def result(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output.strip()


def test_environment_variables(files, model, tmp_path):
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, as they are read when huggingface_hub is imported."""
    with HubServer() as hub:
        hub.add(REPO, files)
        hub.closed.add(REPO)
        assert result(start(hub, tmp_path / "home", REPO, HF_TOKEN="good")) == digest(model)
        assert (tmp_path / "home" / "hub" / "models--org--small").is_dir()
        hub.requests.clear()
        assert result(start(hub, tmp_path / "home", REPO, HF_HUB_OFFLINE="1")) == digest(model)
        assert hub.requests == []


@pytest.mark.slow
def test_two_at_once_and_one_that_is_killed(timm_files, timm_model, tmp_path):
    with HubServer() as hub:
        hub.add(PUBLIC[ZOO].repo_id, timm_files)
        hub.fail("model.safetensors", "slow")
        killed = start(hub, tmp_path / "home", ZOO)
        deadline = time.monotonic() + 120
        while not any(p.stat().st_size for p in (tmp_path / "home").rglob("*.incomplete") if p.is_file()):
            assert time.monotonic() < deadline
            assert killed.poll() is None
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        pair = [start(hub, tmp_path / "home", ZOO) for _ in range(2)]
        assert {result(process) for process in pair} == {digest(timm_model)}


@pytest.mark.slow
def test_the_size_of_f0(hub, tmp_path, monkeypatch):
    """300 MB there and back, in both layouts."""
    row = VARIANTS["nfnet-f0"]
    description = Description(row.config, row.preprocessing, row.name, imagenet(), {"tag": "dm_in1k"})
    model = NFNet.from_params(description, random_params(row.config))
    model.push_to_hub(REPO, token="good")
    assert_same(nfzoo.from_pretrained(REPO).state_dict(), model.state_dict())
    folder = write_timm(tmp_path / "m", description, model.state_dict())
    hub.add(PUBLIC[row.name].repo_id, {name: (folder / name).read_bytes() for name in FILES})
    monkeypatch.setitem(PUBLIC, row.name, PUBLIC[row.name].at("main"))
    loaded = nfzoo.from_pretrained(row.name)
    assert_same(loaded.state_dict(), model.state_dict())
    assert loaded.preprocessing == row.preprocessing
    hub.requests.clear()
    nfzoo.from_pretrained(row.name)
    assert hub.requests == []
