"""The completion scripts, in a real bash; those of other shells by what they hold."""

import builtins
import shlex
import subprocess
from pathlib import Path

import pytest

from nfzoo.cli.main import COMMANDS, main
from nfzoo.train.config.recipes import shipped
from nfzoo.variants import VARIANTS
from tests.support.loops import each


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    assert main(["completion", "bash", f"--json={folder / 'bash.json'}", "--quiet"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        path = folder / "bash"
        with path.open("w") as file:
            patch.setattr("sys.stdout", file)
            assert main(["completion", "bash"]) == 0
    return path


def completed(script: Path, folder: Path, *words: str) -> list[str]:
    """What bash offers for the last of these words; it calls the function of `complete` as Tab does."""
    code = f"""
        source {shlex.quote(str(script))}
        [[ $(complete -p nfzoo) =~ -F\\ ([^ ]+) ]]
        COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}
        "${{BASH_REMATCH[1]}}" nfzoo {shlex.quote(words[-1])} {shlex.quote(words[-2])}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "--norc", "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return sorted(done.stdout.split())


@each(
    ("words", "offered"),
    [
        (["nfzoo", "tr"], ["train"]),
        (["nfzoo", ""], sorted(COMMANDS)),
        (["nfzoo", "train", "--optim.lr"], ["--optim.lr"]),
        (["nfzoo", "train", "--resume-f"], ["--resume-from"]),
        (["nfzoo", "train", "--model", "nfnet-f0"], [name for name in VARIANTS if name.startswith("nfnet-f0")]),
        (["nfzoo", "train", "--data", "r"], ["runs"]),
        (["nfzoo", "train", "--recipe", "nfnet-f0-f"], [name for name in shipped() if name.startswith("nfnet-f0-f")]),
        (["nfzoo", "train", "--resume", ""], ["false", "true"]),
        (["nfzoo", "find-lr", "--cli"], ["--clips"]),  # its own, and those of train
        (["nfzoo", "find-lr", "--optim.lr"], ["--optim.lr"]),
        (["nfzoo", "info", "r"], ["runs"]),
        (["nfzoo", "plot", "si"], ["signal"]),
        (["nfzoo", "plot", "signal", "--sil"], ["--silent"]),
        (["nfzoo", "data", "check", "--val"], ["--validation-labels"]),
        (["nfzoo", "list", "--q"], ["--quiet"]),
        (["nfzoo", "completion", "f"], ["fish"]),
    ],
)
def test_bash_completes_commands_options_and_values(
    words: list[str], offered: list[str], script: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir(exist_ok=True)
    assert completed(script, tmp_path, *words) == sorted(offered)


def test_the_other_shells_know_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("zsh", "fish"):
        assert main(["completion", shell]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert "x1b" not in out
        for word in (*COMMANDS, "optim.lr", "silent", "nfnet-f0", "nfnet-f0-finetune"):
            assert word in out, (shell, word)


def test_without_shtab_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usual = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "shtab":
            raise ModuleNotFoundError(name)
        return usual(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'nfzoo[completion]'" in capsys.readouterr().err
