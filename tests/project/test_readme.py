"""The README is true: its commands run as they are written, its Python too, and its table is that of the code.

The fast tests run commands and code in this process, on the smallest model; the slow one runs all as a user would.
"""

import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import nfzoo
import nfzoo.data.labels
from nfzoo import model
from nfzoo.cli.main import main
from nfzoo.conversion.haiku import to_haiku
from nfzoo.conversion.timm import write_timm
from nfzoo.export import run as export
from nfzoo.hub.registry import PUBLIC
from nfzoo.variants import VARIANTS
from tests.support.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_table_of_models() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) M \| ([\d.]+) G \| (\d+) / (\d+) \| ([\d.]*)", README, re.MULTILINE)
    assert len(rows) >= 14
    for name, parameters, macs, train, test, top1 in rows:
        row = VARIANTS[name]
        size = row.preprocessing.test_size
        assert f"{model.parameter_count(row.config) / 1e6:.1f}" == parameters, name
        assert f"{model.mac_count(row.config, size) / 1e9:.2f}" == macs, name
        assert (row.preprocessing.train_size, size) == (int(train), int(test)), name
        assert row.top1 == (float(top1) if top1 else None), name
    assert f"all {len(VARIANTS)}," in README


def test_links_lead_somewhere() -> None:
    for text in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / text).read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{text}: {target}"


def shell_commands() -> list[str]:
    lines = [line.split("    #")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("make ")]  # those, CI runs


CODE = [text for kind, text in BLOCKS if kind == "python"]
COMMANDS = shell_commands()


def photographs(folder: Path) -> Path:
    """Write a photograph and two classes of photographs."""
    from sklearn.datasets import load_sample_image  # takes seconds

    Image.fromarray(load_sample_image("china.jpg")).save(folder / "photo.jpg")
    for name in ("china", "flower"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(12):
            picture = Image.fromarray(load_sample_image(f"{name}.jpg")).crop((20 * i, 0, 20 * i + 400, 400))
            picture.save(folder / "photos" / name / f"{i}.jpg")
    return folder


def haiku_file(path: Path, network: nfzoo.NFNet) -> None:
    path.write_bytes(pickle.dumps(to_haiku(network.config, dict(network.named_parameters()))))


# ---------------------------------------------------------------- in this process, small


def in_process(command: str) -> list[str]:
    """Return the arguments of `nfzoo` that do what a command does, in one process, with the smallest model and work."""
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch("[A-Z_]+=.*", word)]
    if words[:2] == ["accelerate", "launch"]:
        module = words.index("-m") + 1
        words = ["nfzoo", words[module].removeprefix("nfzoo."), *words[module + 1 :]]
    assert words.pop(0) == "nfzoo"
    if words[0] == "train":
        words += ["--epochs", "1"]
        if "nfnet-f0-finetune" in words:
            words += ["--model", "nfnet-test", "--pretrained", "null", "--train-size", "32", "--test-size", "32"]
        else:
            # Fewer and smaller digits.
            words += ["--validation-fraction", "0.8", "--train-size", "16", "--test-size", "16"]
    if words[:3] == ["convert", "--to", "timm"]:
        words[3] = "timm-model"  # timm has nothing as small as the model of the others
    return [*words, "--size", "32"] if words[:2] == ["plot", "signal"] else words


def test_every_command_does_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photographs(tmp_path))
    haiku_file(tmp_path / "F1_haiku.npz", nfzoo.create("nfnet-test"))
    nfzoo.create("timm-nf-regnet-b0").save_pretrained("timm-model")
    assert len(COMMANDS) >= 9
    for command in COMMANDS:
        words = in_process(command)
        if words[0] == "export":  # whose compilers take long: tests/export runs each
            assert export._parser().parse_args(words[1:])
        else:
            assert main(words) == 0, f"{command}\n{capsys.readouterr().err}"
    assert all((tmp_path / name).exists() for name in ("predictions.png", "runs/digits/curves.png", "F1_again.npz"))


@pytest.mark.parametrize("code", CODE[1:], ids=range(1, len(CODE)))
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec", dont_inherit=True), {})


def test_stages_are_shown_as_info_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "nfnet-f1"]) == 0
    assert section("Three uses").split("```\nstage ")[1].split("```")[0] in capsys.readouterr().out


# ---------------------------------------------------------------- as a user runs them


@pytest.fixture
def user(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Return a folder with photographs and DeepMind's file of F1, and the environment.

    The Hub is a local server, and the weights on it are random: of F1, the same as in the file.
    """
    photographs(tmp_path)
    with HubServer() as hub:
        for n in (0, 1):
            network = nfzoo.create(f"nfnet-f{n}", generator=torch.Generator().manual_seed(n))
            torch.nn.init.normal_(network.get_parameter("head.bias"), generator=torch.Generator().manual_seed(n))
            folder = write_timm(tmp_path / "timm", network.description, dict(network.named_parameters()))
            files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
            hub.add(PUBLIC[f"nfnet-f{n}"].repo_id, files)
            shutil.rmtree(folder)
            if n == 1:
                haiku_file(tmp_path / "F1_haiku.npz", network)
        home = str(tmp_path / "home")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        yield (
            tmp_path,
            {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "PATH": path},
        )


def run(command: list[str], where: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_commands_and_code_run_as_written(user: tuple[Path, dict[str, str]]) -> None:
    folder, environment = user
    assert len(CODE) >= 3
    printed = run([sys.executable, "-c", CODE[0]], folder, environment)
    assert printed.strip() in nfzoo.data.labels.imagenet()
    for text in CODE[1:]:
        run([sys.executable, "-c", text], folder, environment)
    output = {command: run(["bash", "-c", command], folder, environment) for command in COMMANDS}
    shown = section("Three uses").split("```\nstage ")[1].split("```")[0]
    assert shown in output["nfzoo info nfnet-f1"]
    assert all((folder / name).exists() for name in ("predictions.png", "runs/digits/curves.png", "F1_again.npz"))

    # From the Hub and from DeepMind's file come the same numbers.
    check = (
        "import nfzoo, sys; m = nfzoo.from_pretrained(sys.argv[1]); x = m.preprocess('photo.jpg')[None]; "
        "print(m(x)[0, :5].tolist())"
    )
    converted = run([sys.executable, "-c", check, "./nfnet-f1"], folder, environment)
    (folder / "nfnet-f1").rename(folder / "elsewhere")
    assert run([sys.executable, "-c", check, "nfnet-f1"], folder, environment) == converted
