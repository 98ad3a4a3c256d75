"""What the programs of the command line share."""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest

from nfzoo.config import MAX_SIZE
from nfzoo.errors import ConfigError
from nfzoo.runtime import program as command


def fail(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("no such\nmodel \x1b[31m"), 2, "prog: error: no such model \\x1b[31m\n"),
        (ConfigError(""), 2, "prog: error: ConfigError\n"),
        (OSError(28, "No space left on device"), 1, "prog: error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_is_one_line_and_a_status(error, status, line, capsys):
    assert command.run("prog", fail(error)) == status
    assert capsys.readouterr().err == line


def test_what_is_no_fault_of_input_or_disk_shows_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        command.run("prog", fail(RuntimeError("a bug")))
    assert command.run("prog", fail(RuntimeError("a compiler")), failures=(RuntimeError,)) == 1


def test_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert command.run("prog", fail(ConfigError("x"))) == 2
    assert capsys.readouterr().err == ""
    assert command.run("prog", fail(ConfigError("x")), reports=lambda error: True) == 2
    assert capsys.readouterr().err == "prog: error: x\n"


def test_the_status_of_the_work():
    assert command.run("prog", lambda: None) == 0
    assert command.run("prog", lambda: 3) == 3


@pytest.mark.parametrize("text", ["-1", "1.0", "", " 1", "²", "1e3", "1_0", "9" * 10])
def test_numbers_that_are_none(text):
    for kind in (command.nonnegative_int, command.positive_int):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
            kind(text)


def test_numbers():
    assert command.nonnegative_int("0") == 0
    assert command.nonnegative_int("999999999") == 999999999
    assert command.positive_int(str(MAX_SIZE)) == MAX_SIZE
    for text in ("0", str(MAX_SIZE + 1)):
        with pytest.raises(argparse.ArgumentTypeError, match="from 1 to"):
            command.positive_int(text)


def test_options_are_not_abbreviated_and_errors_are_raised():
    parser = command.Parser(prog="prog", description="two\nlines")
    parser.add_argument("--size", type=command.positive_int)
    assert parser.parse_args(["--size", "3"]).size == 3
    assert "two\nlines" in parser.format_help()
    for arguments in (["--si", "3"], ["--size", "0"], ["more"]):
        with pytest.raises(ConfigError):
            parser.parse_args(arguments)


def test_outputs_are_looked_at_before_the_work(tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    command.check_writable(file)
    command.check_writable(tmp_path / "a" / "b.json")
    command.check_writable(tmp_path, folder=True)
    command.check_writable(tmp_path / "a" / "b", folder=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ConfigError, match="is a folder; give a file"):
        command.check_writable(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ConfigError, match="is a device or a pipe; give a file"):
            command.check_writable(path)
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        command.check_writable(file, folder=True)
    for folder in (True, False):
        with pytest.raises(ConfigError, match="no folder that takes files"):
            command.check_writable(file / "below", folder=folder)


def never(options: argparse.Namespace) -> None:
    raise AssertionError("the work was not to begin")


def spoken(words: list[str], fields: object = None, text: str | None = "text", *, word_is_file: bool = False) -> None:
    """Do as a command that notes something, and has this result."""
    parser = command.Parser(prog="prog")
    parser.add_argument("names", nargs="*")
    command.add_output_options(parser, word_is_file=word_is_file)

    def work(options: argparse.Namespace) -> None:
        print("a note")
        command.write_result(options, {"a": "é"} if fields is None else fields, text)

    assert command.run_parsed(parser, words, work) == 0


def test_a_result_is_printed_or_written(tmp_path: Path, capsys):
    target = tmp_path / "new" / "a.json"
    printed = '{\n  "a": "é"\n}\n'
    for words, out, err in (
        ([], "a note\ntext\n", ""),
        (["--quiet"], "text\n", ""),
        (["--json"], printed, "a note\n"),
        (["--json=-"], printed, "a note\n"),
        (["--json", "-"], printed, "a note\n"),
        (["--quiet", "--json"], printed, ""),
        ([f"--json={target}"], f"a note\ntext\nwrote {target}\n", ""),
        ([f"--json={target}", "--quiet"], "", ""),
    ):
        target.unlink(missing_ok=True)
        spoken(words)
        assert capsys.readouterr() == (out, err), words
        if str(target) in out or "--quiet" in words[1:]:
            assert json.loads(target.read_text("utf-8")) == {"a": "é"}, words
    spoken(["--json"], {"a": [float("nan"), -float("inf"), 1.5], "b": {"c": (float("inf"),)}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "b": {"c": [None]}}
    spoken(["--quiet"], text=None)
    assert capsys.readouterr() == ("", "")


def test_the_word_after_json(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cat.jpg").write_text("a cat")
    spoken(["--json", "cat.jpg"])
    assert json.loads(capsys.readouterr().out) == {"a": "é"}
    assert Path("cat.jpg").read_text() == "a cat"
    spoken(["--json", "out.json", "name"], word_is_file=True)
    assert json.loads(Path("out.json").read_text("utf-8")) == {"a": "é"}
    capsys.readouterr()
    parser = command.Parser(prog="prog")
    command.add_output_options(parser)
    assert command.run_parsed(parser, [f"--json={tmp_path}"], never) == 2  # before the work
    assert "is a folder; give a file" in capsys.readouterr().err


def test_quiet_hides_progress_bars_and_no_errors(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    parser = command.Parser(prog="prog")
    command.add_output_options(parser)

    def work(options: argparse.Namespace) -> None:
        shown.append(sys.stderr.isatty())
        print("a warning", file=sys.stderr)
        raise ConfigError("no")

    for words in ([], ["--quiet"], ["--json"]):
        assert command.run_parsed(parser, words, work) == 2
        assert capsys.readouterr() == ("", "a warning\nprog: error: no\n")
    assert shown == [True, False, True]


def test_the_parser_of_a_command_is_found_without_its_work():
    parser = command.Parser(prog="prog")
    assert command.parser_of(lambda argv: command.run_parsed(parser, argv, never)) is parser
    with pytest.raises(TypeError, match="by no Parser"):
        command.parser_of(lambda argv: 0)


def test_a_misspelt_option_has_its_nearest():
    parser = command.Parser(prog="prog")
    for option in ("--optim.lr", "--optim.min-lr", "--topk", "--batch-size", "--data"):
        parser.add_argument(option)
    outer = command.Parser(prog="prog")
    inner = outer.add_subparsers().add_parser("picture")
    inner.add_argument("--output", choices=("png", "jpg"))
    for words, near in (
        ("--lr 0.1", "'--optim.lr'"),  # and not --help, which has as many letters in common
        ("--min_lr=3", "'--optim.min-lr'"),
        ("--top", "'--topk'"),
        ("--batchsize", "'--batch-size'"),
        ("picture --outptu x", "'--output'"),
        ("pictrue", "'picture'"),
        ("picture --output pgn", "'png' or 'jpg'"),
        ("--xyzzy", None),
    ):
        with pytest.raises(ConfigError) as caught:
            (outer if words.startswith("pic") else parser).parse_args(words.split())
        told = str(caught.value).partition("; did you mean ")[2]
        assert told == (f"{near}?" if near else ""), words
