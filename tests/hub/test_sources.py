"""Where a model comes from: DeepMind's file on the Hub, and the ways from timm's copy to DeepMind's own."""

from __future__ import annotations

import hashlib
import pickle
import re
from typing import Any

import pytest
from huggingface_hub import constants

import nfzoo
from nfzoo import CheckpointError
from nfzoo.checkpoint.model_folder import load_checkpoint
from nfzoo.cli.main import main
from nfzoo.conversion.haiku import to_haiku
from nfzoo.hub.registry import COPIES, ORIGINALS, PINS, PUBLIC, Repository, read_pins, repository_of
from nfzoo.types import Params
from nfzoo.variants import VARIANTS
from tests.support.helpers import assert_same, random_params
from tests.support.hub_server import HubServer
from tests.support.loops import each

TIMM, COPY, ZOO = "timm/small.dm_in1k", "somebody/small-in1k", "nfnet-test"
ORIGINAL = "F0_haiku.npz"
JSON = b'{"architecture": "dm_nfnet_f0", "num_classes": 10, "pretrained_cfg": {}}'


@pytest.fixture(scope="module")
def params() -> Params:
    return random_params(VARIANTS[ZOO].config)


@pytest.fixture(scope="module")
def npz(params: Params) -> bytes:
    return pickle.dumps(to_haiku(VARIANTS[ZOO].config, params), 4)


@pytest.fixture
def zoo(hub: HubServer, npz: bytes, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A zoo name whose three sources are small, and of which DeepMind's two are there."""
    known = {"sha256": hashlib.sha256(npz).hexdigest(), "size": len(npz)}
    copy = Repository(COPY, hub.add(COPY, {"model.npz": npz}), layout="haiku", model=ZOO, **known)
    monkeypatch.setitem(PUBLIC, ZOO, Repository(TIMM, layout="timm"))
    monkeypatch.setitem(COPIES, ZOO, copy)
    monkeypatch.setitem(ORIGINALS, ZOO, "dm:F0")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("nfzoo.conversion.download.FIRST_PAUSE", 0.0)
    hub.add("dm/files", {ORIGINAL: npz})
    monkeypatch.setenv("NFZOO_DM_URL", f"{hub.url}/dm/files/resolve/main")
    return hub


# ---------------------------------------------------------------- DeepMind's file on the Hub


def test_a_repository_with_deepminds_file(hub, npz, params, tmp_path, capsys):
    commit = hub.add("org/haiku", {"model.npz": npz})
    offline = {"local_files_only": True}
    several: list[dict[str, Any]] = [{"layout": "haiku"}, {}, {"layout": "haiku", **offline}, offline]
    for options in several:
        assert_same(nfzoo.from_pretrained("hub:org/haiku", **options).state_dict(), params)
    loaded = nfzoo.from_pretrained("hub:org/haiku")
    assert loaded.labels is None
    assert loaded.provenance == {
        "format": "haiku (pickle, protocol 4)",
        "source": "model.npz",
        "sha256": hashlib.sha256(npz).hexdigest(),
        "bytes": len(npz),
        "repository": "org/haiku",
        "revision": commit,
    }
    assert main(["convert", "hub:org/haiku", str(tmp_path / "out")]) == 0
    assert "nfnet-test, 10 classes, 0.2 M parameters, read as pickle, protocol 4" in capsys.readouterr().out
    description, saved = load_checkpoint(tmp_path / "out")
    assert_same(saved, params)
    assert description.provenance == loaded.provenance


def test_the_layout_chooses_among_several(hub, npz, params, files, model, tmp_path):
    hub.add("org/both", {**files, "model.npz": npz})
    assert_same(nfzoo.from_pretrained("org/both").state_dict(), model.state_dict())
    assert_same(nfzoo.from_pretrained("org/both", layout="haiku").state_dict(), params)
    with pytest.raises(CheckpointError, match=r"does not hold a model in timm's layout"):
        nfzoo.from_pretrained("org/both", layout="timm")
    with pytest.raises(CheckpointError, match="there is no layout 'hiaku'; did you mean 'haiku'"):
        nfzoo.from_pretrained("org/both", layout="hiaku")  # type: ignore[arg-type]
    (tmp_path / "x.npz").write_bytes(npz)
    assert_same(nfzoo.from_pretrained(tmp_path / "x.npz", layout="haiku").state_dict(), params)
    folder = model.save_pretrained(tmp_path / "m")
    assert nfzoo.from_pretrained(folder, layout="nfzoo").config == model.config
    with pytest.raises(CheckpointError, match="is in the layout 'nfzoo', not 'timm'"):
        nfzoo.from_pretrained(folder, layout="timm")
    with pytest.raises(CheckpointError, match="no weights of nfnet-l0 are published in the layout 'haiku'"):
        nfzoo.from_pretrained("nfnet-l0", layout="haiku")


def test_faults_of_deepminds_file(hub, npz, params, tmp_path, capsys):
    hub.add("org/haiku", {"model.npz": npz, "README.md": b"# F0\n"})
    assert_refused("cut", "could not be read", hub, capsys, tmp_path)
    assert_refused("corrupt", "is damaged", hub, capsys, tmp_path)
    assert_refused("short", "could not be read", hub, capsys, tmp_path)
    assert_refused("404", "lacks config.json or model.safetensors", hub, capsys, tmp_path)
    hub.gated.add("org/haiku")
    assert_refused(None, "asks for consent", hub, capsys, tmp_path)
    hub.gated.clear()
    hub.closed.add("org/haiku")
    assert_refused(None, "does not exist, or is private", hub, capsys, tmp_path)
    hub.closed.clear()
    assert_same(nfzoo.from_pretrained("org/haiku").state_dict(), params)


def assert_refused(fault: Any, told: str, hub: HubServer, capsys: Any, tmp_path: Any) -> None:
    hub.failures.clear()
    if fault is not None:
        hub.fail("model.npz", fault, times=1000)
    assert main(["convert", "hub:org/haiku", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert told in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    hub.failures.clear()


def test_what_is_known_is_checked_before_anything_is_read(zoo, npz, monkeypatch):
    """Of another size or hash nothing is fetched; where the server states none, nothing of it is parsed."""
    monkeypatch.setattr("nfzoo.hub.sources.read_haiku", lambda *_, **__: pytest.fail("a file was parsed"))
    right = COPIES[ZOO]
    for change, told in (
        ({"size": 1}, f"the server states {len(npz):,} bytes, not 1"),
        ({"sha256": "0" * 64}, "the server states the sha256 [0-9a-f]{64}, not 0000"),
    ):
        monkeypatch.setitem(COPIES, ZOO, right._replace(**change))
        with pytest.raises(CheckpointError, match=f"is another file than nfzoo knows: {told}"):
            nfzoo.from_pretrained(COPY)
    assert not zoo.asked("GET", "model.npz")
    zoo.hashless = True
    with pytest.raises(CheckpointError, match="is damaged: its hash is"):
        nfzoo.from_pretrained(COPY)
    monkeypatch.setitem(COPIES, ZOO, right)
    zoo.hashless = False
    zoo.fail("model.npz", "corrupt", times=1000)
    with pytest.raises(CheckpointError, match="is damaged: its hash is"):
        nfzoo.from_pretrained(COPY)


def test_what_is_asked_for_by_revision_is_taken_as_it_is(zoo, npz, params):
    other = pickle.dumps(to_haiku(VARIANTS[ZOO].config, random_params(VARIANTS[ZOO].config, seed=5)), 4)
    zoo.add(COPY, {"model.npz": other})
    assert_same(nfzoo.from_pretrained(f"hub:{COPY}").state_dict(), params)
    with pytest.raises(CheckpointError, match="lacks config"):  # what is known of one file is not of another
        nfzoo.from_pretrained(f"hub:{COPY}", layout="timm")
    moved = nfzoo.from_pretrained(f"hub:{COPY}", layout="haiku", revision="main")
    assert moved.provenance is not None
    assert moved.provenance["sha256"] == hashlib.sha256(other).hexdigest()


# ---------------------------------------------------------------- from one source to the next


def refuse(hub: HubServer, repo: str, how: str) -> None:
    """Let a repository of timm's be one from which nothing can be had."""
    hub.repos.pop(repo, None)
    if how == "404":
        return
    hub.add(repo, {"config.json": JSON} if how == "empty" else {"config.json": JSON, "model.safetensors": b"x"})
    if how in ("401", "gated"):
        (hub.closed if how == "401" else hub.gated).add(repo)
    elif how in ("503", "cut"):
        hub.fail("config.json", how, times=1000)


@each(
    ("how", "why"),
    [
        ("404", "does not exist, or is private"),
        ("401", "does not exist, or is private"),
        ("gated", "asks for consent"),
        ("503", "overloaded"),
        ("cut", "peer closed|closed connection|incomplete"),
    ],
)
def test_the_copy_is_taken_where_timms_cannot_be_had(how, why, zoo, params, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / how))
    zoo.failures.clear()
    zoo.closed.clear()
    zoo.gated.clear()
    caplog.clear()
    refuse(zoo, TIMM, how)
    loaded = nfzoo.from_pretrained(ZOO)
    assert_same(loaded.state_dict(), params)
    assert loaded.provenance is not None
    assert loaded.provenance["repository"] == COPY
    taken = [said for said in caplog.messages if "was loaded from" in said]
    assert len(taken) == 1
    assert taken[0].startswith(f"{ZOO} was loaded from the Hub repository '{COPY}' at revision")
    assert f"as the Hub repository '{TIMM}' failed (" in taken[0]
    assert re.search(why, taken[0]), taken[0]


def test_deepminds_server_is_asked_last(zoo, params, caplog, monkeypatch, tmp_path, capsys):
    """Without a sha256 that is known in advance, somebody else's upload is not taken unasked."""
    monkeypatch.setitem(COPIES, ZOO, COPIES[ZOO]._replace(sha256=None))
    loaded = nfzoo.from_pretrained(ZOO)
    assert_same(loaded.state_dict(), params)
    assert loaded.provenance is not None
    assert loaded.provenance["url"] == "https://storage.googleapis.com/dm-nfnets/F0_haiku.npz"
    assert "repository" not in loaded.provenance
    (taken,) = [said for said in caplog.messages if "was loaded from" in said]
    assert f"was loaded from {zoo.url}/dm/files/resolve/main/{ORIGINAL}, as the Hub repository '{TIMM}' failed" in taken
    assert not zoo.asked("HEAD", "model.npz")
    # What it gave is in the cache, and so it is found without a network; a cache of one's own is honoured.
    zoo.requests.clear()
    assert_same(nfzoo.from_pretrained(ZOO, local_files_only=True).state_dict(), params)
    assert zoo.requests == []
    with pytest.raises(CheckpointError, match="and local_files_only forbids to fetch it"):
        nfzoo.from_pretrained(ZOO, local_files_only=True, cache_dir=tmp_path / "own")
    nfzoo.from_pretrained(ZOO, cache_dir=tmp_path / "own")
    assert list((tmp_path / "own").rglob(ORIGINAL))
    assert main(["convert", ZOO, str(tmp_path / "out")]) == 0
    assert "read as pickle, protocol 4" in capsys.readouterr().out
    assert_same(load_checkpoint(tmp_path / "out")[1], params)


def test_no_hub_and_then_no_server_at_all(zoo, params, npz, caplog, monkeypatch):
    with HubServer() as elsewhere:
        elsewhere.add("dm/files", {ORIGINAL: npz})
        monkeypatch.setenv("NFZOO_DM_URL", f"{elsewhere.url}/dm/files/resolve/main")
        zoo.server.shutdown()
        zoo.server.server_close()
        assert_same(nfzoo.from_pretrained(ZOO).state_dict(), params)
        (taken,) = [said for said in caplog.messages if "was loaded from" in said]
        assert taken.count("the Hub cannot be reached") == 2
    monkeypatch.setattr(constants, "HF_HOME", constants.HF_HOME + "-empty")
    with pytest.raises(CheckpointError, match="the Hub cannot be reached") as caught:
        nfzoo.from_pretrained(ZOO)
    assert "Other sources failed too" in str(caught.value)
    assert f"{ORIGINAL} could not be fetched" in str(caught.value)
    assert str(caught.value).count(TIMM) == 1


def test_a_failed_check_ends_the_search(zoo, caplog, monkeypatch, tmp_path):
    zoo.add(TIMM, {"config.json": JSON, "model.safetensors": b"weights"})
    right = PUBLIC[ZOO]
    monkeypatch.setitem(PUBLIC, ZOO, right._replace(sha256="0" * 64))
    with pytest.raises(CheckpointError, match=f"{TIMM}' is another file than nfzoo knows"):
        nfzoo.from_pretrained(ZOO)
    monkeypatch.setitem(PUBLIC, ZOO, right)
    for fault in ("corrupt", "short"):
        zoo.failures.clear()
        zoo.fail("model.safetensors", fault, times=1000)
        with pytest.raises(CheckpointError, match=f"{TIMM}'"):
            nfzoo.from_pretrained(ZOO)
    zoo.failures.clear()
    with pytest.raises(CheckpointError, match="damaged"):
        nfzoo.from_pretrained(ZOO)  # what is no safetensors file
    zoo.hashless = True
    with pytest.raises(CheckpointError, match="cannot be checked"):
        nfzoo.from_pretrained(ZOO, require_hash=True, cache_dir=tmp_path / "new")
    zoo.hashless = False
    assert not zoo.asked("HEAD", ".npz")
    assert not zoo.asked("GET", ".npz")
    # The same of the copy: DeepMind's server is not asked.
    zoo.repos.pop(TIMM)
    monkeypatch.setitem(COPIES, ZOO, COPIES[ZOO]._replace(size=1))
    with pytest.raises(CheckpointError, match=rf"bytes, not 1 \(in its place the Hub repository '{TIMM}' failed"):
        nfzoo.from_pretrained(ZOO, cache_dir=tmp_path / "newer")
    assert not zoo.asked("HEAD", ORIGINAL)
    assert not [said for said in caplog.messages if "was loaded from" in said]


def test_who_names_a_source_gets_that_one(zoo, params):
    several: list[dict[str, Any]] = [{"layout": "timm"}, {"revision": "v1"}, {"force_download": True}]
    for options in several:
        with pytest.raises(CheckpointError, match=f"'{TIMM}'.* does not exist"):
            nfzoo.from_pretrained(ZOO, **options)
    assert not zoo.asked("HEAD", ".npz")
    assert_same(nfzoo.from_pretrained(ZOO, layout="haiku").state_dict(), params)
    for options in several[1:]:
        with pytest.raises(CheckpointError, match=f"name it, hub:{COPY} instead of {ZOO}"):
            nfzoo.from_pretrained(ZOO, layout="haiku", **options)


def test_the_file_of_another_model_is_refused(zoo, monkeypatch):
    other = VARIANTS["nf-regnet-b0"].config.replace(num_classes=3)
    content = pickle.dumps(to_haiku(other, random_params(other)), 4)
    known = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    monkeypatch.setitem(COPIES, ZOO, COPIES[ZOO]._replace(revision=zoo.add(COPY, {"model.npz": content}), **known))
    with pytest.raises(CheckpointError, match=f"^{ZOO}: .*the tree is of nf-regnet-b0, not of {ZOO}"):
        nfzoo.from_pretrained(ZOO)


# ---------------------------------------------------------------- the table


def test_the_pins_of_the_table():
    """What was published with the files; see `python -m nfzoo.hub.pin`."""
    assert PUBLIC["nfnet-f0"].revision == "ca8e830961c2ebceffff7affff34acfe7a1da673"
    assert PUBLIC["nfnet-f3"].revision == "ca2451bf0778ae0665a2f13d1b2a7fb878c9ff27"
    f3 = repository_of("hub:ethanluoyc/dm-nfnet-f3-in1k")
    assert (f3.size, f3.layout, f3.model) == (1_019_770_037, "haiku", "nfnet-f3")
    assert f3.sha256 == "b8d589cc0f9bd91b49089cc39b1da738bd5ab264db55ebbfa7cf5f84126796ca"
    assert f3.at("main").sha256 is None
    assert read_pins().keys() <= {row.repo_id for row in (*PUBLIC.values(), *COPIES.values())}
    assert COPIES.keys() == ORIGINALS.keys() <= PUBLIC.keys()


@each(
    ("text", "told"),
    [
        ("[]", "must hold an object of objects"),
        ('{"a/b": 1}', "must hold an object of objects"),
        ("{", "cannot be read"),
        ('{"a/b": {"sha265": ""}}', "unknown key 'sha265'; did you mean 'sha256'"),
        ('{"a/b": {"sha256": "xy"}}', "sha256 must be 64 hexadecimal digits"),
        ('{"a/b": {"revision": "main"}}', "revision must be 40 hexadecimal digits"),
        ('{"a/b": {"size": true}}', "size must be a number of bytes"),
    ],
)
def test_a_table_of_pins_that_is_none(text, told, tmp_path):
    (tmp_path / PINS.name).write_text(text)
    with pytest.raises(nfzoo.ConfigError, match=told):
        read_pins(tmp_path / PINS.name)
