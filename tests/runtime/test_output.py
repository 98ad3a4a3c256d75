"""What the programs print drives no terminal, whatever files and servers say."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

import nfzoo
from nfzoo.cli.main import COMMANDS, main
from nfzoo.data.digits import DIGITS
from nfzoo.runtime.output import csv_cell, escape_log, escaped, guarded, json_text, without_bars
from tests.support.loops import each
from tests.support.pictures import write_images

ROOT = Path(__file__).resolve().parents[2]

# Escapes that clear the screen and set the title, a bell, C1's form of the former, a mark that turns the direction of
# writing, a line separator, a carriage return, a byte that is no UTF-8, and a line of its own.
EVIL = "a\x1b[2J\x1b]0;t\x07\x9b31m\u202egnp.exe\u2028\rb\udcff\nnfzoo: c"
TRAINING = ["--epochs", "1", "--batch-size", "4", "--max-broken", "1", "--workers", "0"]
CHARACTERS = [chr(i) for i in (*range(0x3000), *range(0xD7F0, 0x10010), *range(0xE0000, 0xE0100))]


def harmless(text: str) -> bool:
    return re.sub(r"[\n\t]", "", text).isprintable()


# ---------------------------------------------------------------- the escape


def test_what_is_escaped_can_be_seen_and_what_can_be_seen_stays() -> None:
    for c in CHARACTERS:
        shown = escaped(c)
        assert shown.isprintable(), ascii(c)
        assert shown == c if c.isprintable() else shown == repr(c)[1:-1], ascii(c)
        assert escaped(shown) == shown
    text = "".join(CHARACTERS)
    assert escaped(text) == "".join(map(escaped, text))


def test_no_credentials_of_an_address_are_shown(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As where a warning of another library names a proxy, or a mirror that HF_ENDPOINT names."""
    escape_log()
    with guarded():
        print("no answer of https://me:secret@mirror.org/x")
        sys.stderr.write("proxy http://me:secret@proxy:3128\n")
    logging.getLogger("nfzoo").warning("%s could not be read", "https://me:secret@mirror.org/x")
    printed = capsys.readouterr()
    assert printed.out == "no answer of https://mirror.org/x\n"
    assert printed.err == "proxy http://proxy:3128\n"
    assert caplog.messages == ["https://mirror.org/x could not be read"]


@each("text", ["", "cat", "ñandú, 图像", "C:\\new\\x1b", "\N{OLD ITALIC LETTER A}"])
def test_ordinary_text_stays(text: str) -> None:
    assert escaped(text) == text


def test_json_shows_every_character_and_reads_back_what_was_written() -> None:
    reverse = "".join(CHARACTERS[::-1])  # so that no two surrogates are one character
    shown = json_text({reverse: ["é", 1, None, {"a": CHARACTERS}]})
    assert harmless(shown)
    assert (json.loads(shown) == {reverse: ["é", 1, None, {"a": CHARACTERS}]}) is True
    assert (
        json_text(["é", "\x7f", "\udcff", "\U000e0001"])
        == '[\n  "é",\n  "\\u007f",\n  "\\udcff",\n  "\\udb40\\udc01"\n]\n'
    )


# ---------------------------------------------------------------- the streams of a program


def test_everything_that_is_printed_goes_through_the_guard(capsys: pytest.CaptureFixture[str]) -> None:
    with guarded(), guarded():
        print(EVIL, "\tb", end="\n\n")
        print(EVIL, file=sys.stderr)
        sys.stdout.writelines([EVIL, "\n"])
        handler = logging.StreamHandler()
        handler.emit(logging.LogRecord("other", logging.WARNING, "", 0, EVIL, (), None))
        for _ in tqdm([0], desc=EVIL):
            pass
    out, err = capsys.readouterr()
    assert harmless(out)
    assert out.endswith("\n")
    assert " \tb\n\n" in out
    assert harmless(re.sub(r"\r(?=a\\x1b|\n|\Z| )", "", err)), ascii(err)
    assert err.count("\\x1b[2J") >= 3


def test_no_cell_of_a_table_is_a_formula() -> None:
    for text in ("=1+1", "+1", "-1", "@SUM(A1)", " =1", "=cmd|' /C calc'!A0"):
        assert csv_cell(text) == f"'{text}"
    for text in ("cat", "", " ", "a=b", "'=1"):
        assert csv_cell(text) == text
    assert csv_cell("\t=1\x1b") == "\\t=1\\x1b"


def test_bars_move_as_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    def bars() -> str:
        with tqdm(total=1, file=sys.stderr, bar_format="{desc}", desc="x") as first:
            with tqdm(total=1, file=sys.stderr, bar_format="{desc}", desc="y", leave=False) as second:
                second.update()
            first.update()
        return capsys.readouterr().err

    bare = bars()
    with guarded():
        assert bars() == bare
    assert "\x1b[A" in bare


@each(
    ("encoding", "shown"),
    [("ascii", "\\xe9\\U0001f408\\x1b\n"), ("latin-1", "é\\U0001f408\\x1b\n"), ("utf-8", "é🐈\\x1b\n")],
)
def test_what_the_terminal_lacks_is_escaped_too(encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with guarded():
            print("é🐈\x1b", flush=True)
            assert sys.stdout.encoding == encoding
        assert sys.stdout is stream
    assert stream.buffer.getvalue().decode(encoding) == shown  # type: ignore[attr-defined]


def test_the_guard_ends_with_its_block_but_for_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    monkeypatch.delenv("NO_COLOR", raising=False)
    before = sys.stdout, sys.stderr
    for end in (SystemExit, KeyboardInterrupt):
        with pytest.raises(end), guarded():
            raise end
        assert (sys.stdout, sys.stderr) == before
    assert "NO_COLOR" not in os.environ
    with pytest.raises(ValueError, match="x"), guarded():
        raise ValueError("x")
    assert sys.stdout is not before[0]
    assert sys.stderr is not before[1]
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw
    with guarded():
        print(EVIL)


FAILS = f"""
import warnings
from nfzoo.runtime.program import run
def work():
    warnings.warn({EVIL!r})
    raise RuntimeError({EVIL!r})
run("x", work)
"""


def test_warnings_and_tracebacks_are_escaped() -> None:
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert "RuntimeError: a\\x1b[2J" in done.stderr
    assert "UserWarning: a\\x1b[2J" in done.stderr
    assert harmless(done.stderr)


def test_the_log_is_escaped_in_any_process(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("nfzoo")
    count = len(log.filters)
    escape_log()
    assert len(log.filters) == count == 1
    log.warning("%s is %d, %r", EVIL, 3, "é")
    assert caplog.messages == [f"{escaped(EVIL)} is 3, 'é'"]
    code = f"import logging, nfzoo.errors; logging.getLogger('nfzoo').warning('%s', {EVIL!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stderr == f"{escaped(EVIL)}\n"


# ---------------------------------------------------------------- the programs


def test_every_program_is_guarded_and_there_is_one_log() -> None:
    bare, programs = [], 0
    for path in (path for folder in ("nfzoo", "hub", "conversion") for path in (ROOT / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for name in re.findall(r"getLogger\((.*?)\)", source):
            assert name == '"nfzoo"' or name.startswith('"torch.'), path
        for node in ast.walk(ast.parse(source)):
            whole = ast.unparse(node) if isinstance(node, ast.FunctionDef) else ""
            if re.search(r"^def \w+\(argv: .*\) -> int:", whole, re.MULTILINE):
                programs += 1
                if not re.search(r"program\.run(_parsed)?\(|@guarded\(\)", whole):
                    bare.append(path.name)
    assert bare == ["tpu_worker.py"]  # which answers another program, in JSON
    assert programs > len(COMMANDS)


def test_names_of_files_and_labels_in_every_command(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = EVIL.replace("\udcff", "").replace("/", "")
    monkeypatch.chdir(tmp_path)
    data = write_images(tmp_path / text, {text: 6, "dog": 6})
    (data / "dog" / f"{EVIL}.png").write_bytes(b"no image")
    (data / "dog" / f"{EVIL}.psd").write_bytes(b"")
    Path(f"{text}.csv").write_text(f'path,label\ndog/0.png,"{text}"\ndog/1.png,dog\n')
    model = nfzoo.create("nfnet-test", labels=["dog", EVIL]).save_pretrained(f"{text}-model")
    json_of_predict = ["predict", str(model), str(data / text), "--json"]
    for arguments, status in (
        (["info", str(model)], 0),
        (["info", str(model), "--json"], 0),
        (["predict", str(model), str(data / text)], 0),
        (json_of_predict, 0),
        (["predict", str(model), str(data / "dog")], 2),
        (["predict", text, text], 2),
        (["evaluate", str(model), "--data", str(data), "--device", "cpu", "--workers", "0"], 2),
        (["bulk", str(model), "--data", str(data), "--output", f"{text}-out", "--skip-broken", "--workers", "0"], 0),
        (["train", "--model", str(model), "--data", str(data), "--output", "o", "--recipe", text], 2),
        (["train", "--model", str(model), "--data", str(data), "--output", "o", *TRAINING], 0),
        (["data", "check", str(data), "--workers", "0"], 1),
        (["data", "check", str(data), "--workers", "0", "--labels", f"{text}.csv"], 1),
        (["push", str(model), "org/name", "--dry-run"], 0),
        (["space", "--model", text], 2),
        ([text], 2),
        (["plot", "curves", text], 2),
        (["compare", text, "o"], 2),
        (["export", str(model), "--format", "onnx", "--output", str(model / "config.json")], 2),
        (["convert", str(data / "dog" / f"{EVIL}.png"), text], 2),
        (["evaluate", str(model), "--data", DIGITS, "--json", text], 2),
    ):
        assert main(arguments) == status, (arguments, capsys.readouterr())
        out, err = capsys.readouterr()
        assert harmless(out + err), ascii(out + err)
        assert err.count("\n") == (status == 2), ascii(err)
        if arguments is json_of_predict:
            assert json.loads(out)[0]["path"] == str(sorted((data / text).iterdir())[0])
            assert {p["label"] for p in json.loads(out)[0]["predictions"]} == {"dog", EVIL}
    assert "left out" in caplog.text
    assert harmless(caplog.text), ascii(caplog.text)


def test_no_bars_are_drawn_in_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    with without_bars():
        assert not sys.stderr.isatty()
        assert tqdm(range(3), disable=None).disable
        code = "import datasets, os; print(datasets.are_progress_bars_disabled())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "True\n"
    assert sys.stderr.isatty()
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"
    assert "HF_DATASETS_DISABLE_PROGRESS_BARS" not in os.environ
