"""The pages for users are true: their commands and their Python run, and their links lead somewhere.

The fast test runs all in this process, on the smallest model; the long one runs all as a user would.
"""

import importlib
import importlib.util
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path

import pytest
import torch

import nfzoo
import nfzoo.data.labels
from nfzoo.cli.main import COMMANDS, main
from nfzoo.conversion.haiku import to_haiku
from nfzoo.conversion.timm import write_timm
from nfzoo.hub.registry import PUBLIC
from tests.support.hub_server import HubServer
from tests.support.loops import each
from tests.support.pages import (
    FENCE,
    ROOT,
    RUN,
    anchors,
    blocks,
    links,
    new_folder,
    pages,
    photographs,
    run_blocks,
    small,
)

REPOSITORY = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
DIGITS = ["train", "--model", "nfnet-test", "--data", "digits", "--output", "runs/digits"]

# How many blocks of a page say that they are not run. Each gives its reason in the page.
EXEMPT = {
    "docs/hub.md": 2,
    "docs/onnx.md": 1,
    "docs/release.md": 1,
    "docs/serve.md": 4,
    "docs/tasks/detection.md": 1,
    "docs/tasks/export.md": 1,
    "docs/timm.md": 3,
    "docs/transformers.md": 4,
}


@each("page", [*pages(), *REPOSITORY])
def test_links_lead_somewhere(page: str) -> None:
    for path, anchor in links(page):
        assert (ROOT / path).exists(), path
        if anchor:
            assert anchor in anchors(path), f"{path}#{anchor}"


def test_what_is_not_run() -> None:
    exempt = Counter(block.page for page in pages() for block in blocks(page) if block.exempt and block.kind in RUN)
    assert dict(exempt) == {page: n for page, n in EXEMPT.items() if (ROOT / page).exists()}


def test_commands_and_python_stand_under_the_names_that_are_run() -> None:
    kinds = {block.kind for page in pages() for block in blocks(page)}  # `py` and `console` are shown only
    assert not [kind for kind in kinds if re.fullmatch("bash|shell.*|zsh|python3|ipython.*|pycon", kind)]


def test_set_up_is_by_targets_that_exist() -> None:
    text = "".join(block.text for page in pages() for block in blocks(page) if block.kind == "sh")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make (\S+)", text, re.MULTILINE)) <= set(targets)


# Options of other programs, of nfzoo's modules that are no commands, and of `nfzoo` itself, named in the text.
OTHERS = "--(fix|ignore-scripts|max-restarts|nnodes|nproc-per-node|rdzv-.*|sign|clip-norm|ema-decay|lr|noise|version)"


def test_options_that_are_named_exist(capsys: pytest.CaptureFixture[str]) -> None:
    helps = [[command] for command in COMMANDS] + [["data", "check"], ["plot", "signal"], ["plot", "curves"]]
    for words in helps:
        with suppress(SystemExit):
            main([*words, "--help"])
    option = r"(?<![\w-])--[a-zA-Z][\w.-]*"
    known = set(re.findall(option, capsys.readouterr().out))
    for page in pages():
        for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", (ROOT / page).read_text())):
            for name in re.findall(option, code):
                name = name.replace("_", "-")
                assert name in known or re.fullmatch(OTHERS, name), f"{page}: {name} in {code}"


def haiku_file(path: Path, network: nfzoo.NFNet) -> None:
    path.write_bytes(pickle.dumps(to_haiku(network.config, dict(network.named_parameters()))))


# ---------------------------------------------------------------- in this process, small


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of photographs, a trained model, DeepMind's file of F1, and small models under public names."""
    folder = photographs(tmp_path_factory.mktemp("shared"))
    labels = nfzoo.data.labels.imagenet()
    for name in ("nfnet-f0", "nfnet-f1"):
        nfzoo.NFNet(nfzoo.create("nfnet-test", num_classes=1000).config, labels=labels).save_pretrained(folder / name)
    haiku_file(folder / "F1_haiku.npz", nfzoo.create("nfnet-test"))
    nfzoo.create("timm-nf-regnet-b0").save_pretrained(folder / "timm-model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_small("nfzoo " + " ".join(DIGITS))
    return folder


def run_small(command: str) -> None:
    command, arrow, target = command.partition(" > ")
    module, words = small(command)
    if module == "nfzoo":
        module, function, _ = COMMANDS[words[0]]
        if words[0] == "export":  # whose compilers take long: tests/export runs each
            from nfzoo.export import run as export

            assert export._parser().parse_args(words[1:])
            return
        if words[0] == "convert":
            shutil.rmtree(words[-1], ignore_errors=True)
        words = words[1:]
    else:
        function = "main"
    with open(target, "w") if arrow else nullcontext() as file, redirect_stdout(file or sys.stdout):
        assert getattr(importlib.import_module(module), function)(words) == 0, command


README = "README.md"
SITE = [page for page in pages() if run_blocks(page) and page != README]


@pytest.mark.parametrize("page", [README, *(pytest.param(page, marks=pytest.mark.slow) for page in SITE)])
def test_commands_and_code_run(
    page: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(new_folder(tmp_path / page.replace("/", "-"), shared, page))
    names: dict[str, object] = {}  # the Python of a page is read from its top
    for block in run_blocks(page):
        for command in block.commands if block.kind == "sh" else []:
            try:
                run_small(command)
            except BaseException as error:
                error.add_note(f"in {command}\n{capsys.readouterr().err}")
                raise
        if block.kind == "python":
            exec(compile(block.text, page, "exec", dont_inherit=True), names)


# ---------------------------------------------------------------- as a user runs them


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """Return a folder with photographs, a trained model and DeepMind's file of F1, and the environment.

    The Hub is a local server, and the weights on it are random: of F1, the same as in the file.
    """
    folder = photographs(tmp_path_factory.mktemp("user"))
    with HubServer() as hub:
        for n in (0, 1):
            network = nfzoo.create(f"nfnet-f{n}", generator=torch.Generator().manual_seed(n))
            torch.nn.init.normal_(network.get_parameter("head.bias"), generator=torch.Generator().manual_seed(n))
            timm = write_timm(folder / "timm", network.description, dict(network.named_parameters()))
            files = {name: (timm / name).read_bytes() for name in ("config.json", "model.safetensors")}
            hub.add(PUBLIC[f"nfnet-f{n}"].repo_id, files)
            shutil.rmtree(timm)
            if n == 1:
                haiku_file(folder / "F1_haiku.npz", network)
        home = str(folder / "home")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "PATH": path}
        environment = {**os.environ, **environment}
        run(["nfzoo", *DIGITS], folder, environment)
        yield folder, environment


def run(command: list[str], where: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", [README, *SITE])
def test_commands_and_code_run_as_written(page: str, user: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    shared, environment = user
    folder = new_folder(tmp_path / "page", shared, page)
    code = ""
    for block in run_blocks(page):
        for command in block.commands if block.kind == "sh" else []:
            run(["bash", "-c", command], folder, environment)
        if block.kind == "python":
            code += block.text
            run([sys.executable, "-c", block.text if page == README else code], folder, environment)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_from_the_hub_and_from_the_file_come_the_same_numbers(
    user: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    shared, environment = user
    folder = new_folder(tmp_path / "folder", shared)
    run(["nfzoo", "convert", "F1_haiku.npz", "nfnet-f1"], folder, environment)
    check = (
        "import nfzoo, sys; m = nfzoo.from_pretrained(sys.argv[1]); x = m.preprocess('photo.jpg')[None]; "
        "print(m(x)[0, :5].tolist())"
    )
    converted = run([sys.executable, "-c", check, "./nfnet-f1"], folder, environment)
    (folder / "nfnet-f1").rename(folder / "elsewhere")
    assert run([sys.executable, "-c", check, "nfnet-f1"], folder, environment) == converted


# ---------------------------------------------------------------- the site's own code


def test_what_the_site_makes_of_links_and_navigation() -> None:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = "[a](../models.md#x) `[b](../c)`\n```py\nf[0](x)\n```\n[d](../../recipes/head.yaml) [e](https://f) [g](#h)\n"
    assert hooks.links(text) == ["../models.md#x", "../../recipes/head.yaml", "https://f", "#h"]
    shown = hooks.relinked(text, "docs/tasks/data.md")
    assert "[a](../models.md#x)" in shown
    assert "```py\nf[0](x)\n```" in shown
    assert "[d](../repository/recipes/head.yaml) [e](https://f) [g](data.md#h)" in shown
    assert hooks.relinked("[a](../docs/models.md)", "benchmarks/README.md") == "[a](../../models.md)"
    nav = [{"A": "a.md"}, {"B": ["b/two.md", "b/*.md", "c*.md"]}, {"D": ["d*.md"]}]
    expected = [{"A": "a.md"}, {"B": ["b/two.md", "b/one.md"]}]
    assert hooks.expanded(nav, ["a.md", "b/one.md", "b/two.md"]) == expected
