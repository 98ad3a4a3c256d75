"""The command: what it prints, where it writes, and how it fails."""

import argparse
import contextlib
import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nfzoo.cli.list_models
import nfzoo.cli.main
import nfzoo.train
from nfzoo.cli.main import main
from nfzoo.model import mac_count, parameter_count
from nfzoo.nn import create
from nfzoo.runtime import program
from nfzoo.variants import VARIANTS
from tests.support.forks import run_in_group
from tests.support.helpers import DEEPMIND_COUNTS, REFERENCE
from tests.support.loops import each


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = create("nfnet-test", labels=["cat", "dog", "\x1b[31mfish"])
    return model.save_pretrained(tmp_path_factory.mktemp("models") / "pets")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(("b.png", "a.png")):
        Image.fromarray(np.full((20, 30, 3), 90 * i, np.uint8)).save(folder / name)
    return folder


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nfzoo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"nfzoo( [a-z-]+)?: error: [^\n]+\n", err)
    return err


# -- list


def test_list_shows_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "family", "parameters", "train", "test", "top-1", "source"]
    assert [row.split()[0] for row in rows] == list(VARIANTS)
    assert re.split(r"\s{2,}", rows[0]) == ["nfnet-f0", "nfnet", "71.5 M", "192", "256", "83.6", "arXiv 2102.06171"]


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(VARIANTS)
    assert rows["nfnet-f0"] == {
        "name": "nfnet-f0",
        "family": "nfnet",
        "parameters": DEEPMIND_COUNTS["nfnet-f0"]["parameters"],
        "train_size": 192,
        "test_size": 256,
        "top1": 83.6,
        "source": "arXiv 2102.06171",
    }
    assert rows["nf-resnet-50"]["top1"] is None


# -- info


@pytest.mark.parametrize("name", ["nfnet-f0", "nf-resnet-50", "nf-regnet-b0", "eca-nfnet-l0", "timm-nf-regnet-b1"])
def test_info_adds_up(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", name, "--json"]) == 0
    found, row = json.loads(capsys.readouterr().out), VARIANTS[name]
    assert found["parameters"] == parameter_count(row.config) == sum(s["parameters"] for s in found["stages"])
    assert found["macs"]["test"] == sum(s["macs"] for s in found["stages"])
    assert found["macs"]["train"] == mac_count(row.config, row.preprocessing.train_size)
    stages = {s["name"]: s for s in found["stages"]}
    assert [stages[f"stages.{i}"]["blocks"] for i in range(4)] == list(row.config.depths)
    names = list(stages)
    assert (names[0], names[-1]) == ("stem", "head")
    assert stages["head"]["output"] == [1000]


def test_info_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "nfnet-f0"]) == 0
    out = capsys.readouterr().out
    total = f"{DEEPMIND_COUNTS['nfnet-f0']['parameters']:,}"
    assert re.search(f"^parameters: +{total}$", out, re.M)
    assert re.search(r"^test input: +256 x 256 pixels, 12\.38 G multiply-accumulates$", out, re.M)  # arXiv 2102.06171
    parameters, macs = stage_counts(range(3, 9), pixels=16**2)
    assert re.search(rf"^stages\.2 +6 +1536 x 16 x 16 +{parameters:,} +{macs / 1e9:.2f} G$", out, re.M)
    assert re.search(rf"^total +19 +{total} +12\.38 G$", out, re.M)


def stage_counts(blocks: range, pixels: int) -> tuple[int, int]:
    """Parameters and multiply-accumulates of a stage of DeepMind's NFNet-F0, from the shapes of its arrays.

    A convolution multiplies its kernel at each of the `pixels` of its output, which of the first block's `conv0` are
    four times as many; squeeze-excite multiplies once.
    """
    parameters = macs = 0
    for module, arrays in json.loads((REFERENCE / "nfnet_F0_1000.shapes.json").read_text()).items():
        block = re.match(r"NFNet/~/nf_block_(\d+)", module)
        if block and int(block[1]) in blocks:
            parameters += sum(map(math.prod, arrays.values()))
            times = 1 if "squeeze_excite" in module else pixels
            times *= 4 if module.endswith(f"nf_block_{blocks[0]}/~/conv0") else 1
            macs += math.prod(arrays["w"]) * times if "w" in arrays else 0
    return parameters, macs


def test_info_of_checkpoints(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for path in (checkpoint, checkpoint / "model.safetensors", checkpoint / "config.json"):
        assert main(["info", str(path)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert re.search(r"^labels: +cat, dog, \\x1b\[31mfish$", texts[0], re.M)
    assert re.search(r"^classes: +3$", texts[0], re.M)


# -- predict


def test_predict(checkpoint: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["predict", str(checkpoint), "photos", "photos/b.png", "--topk", "2", "--sheet", "predictions.png"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [lines[i] for i in (0, 3, 6)] == ["photos/a.png", "photos/b.png", "photos/b.png"]
    assert all(re.match(r"  +\d+\.\d %  (cat|dog|\\x1b\[31mfish)", lines[i]) for i in (1, 2, 4, 5, 7, 8))
    assert lines[9:] == ["wrote predictions.png"]
    with Image.open("predictions.png") as sheet:
        assert sheet.width > 800


def test_predict_as_json(checkpoint: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(checkpoint), "photos", "--json", "--sheet", "out/s.png", "--batch_size", "1"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [f["path"] for f in found] == ["photos/a.png", "photos/b.png"]
    assert {p["label"] for p in found[0]["predictions"]} == {"cat", "dog", "\x1b[31mfish"}
    assert abs(sum(p["probability"] for p in found[0]["predictions"]) - 1) < 1e-5
    assert err == "wrote out/s.png\n"
    assert Path("out/s.png").is_file()


def test_no_sheet(checkpoint: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(checkpoint), "photos"]) == 0
    assert "wrote" not in capsys.readouterr().out
    assert [p.name for p in Path.cwd().iterdir()] == ["photos"]


def test_a_second_run_does_not_look_at_the_first_ones_sheet(
    checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(images)
    texts = []
    for _ in range(2):
        assert main(["predict", str(checkpoint), ".", "--sheet", "sheet.png"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


# -- failures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nfnet-f00"], "did you mean .*'nfnet-f0'"),
        (["info", "photos"], "there is no config.json in photos"),
        (["info", "photos/a.png"], "neither a checkpoint folder nor"),
        (["predict", "nfnet-test", "photos"], "no weights are published for 'nfnet-test'"),
        (["predict", "nonsense", "photos"], "'nonsense' is no folder"),
        (["predict", "MODEL", "absent.png"], "absent.png does not exist"),
        (["predict", "MODEL", "text.png"], "text.png is no image"),
        (["predict", "MODEL", "photos", "--sheet", "s.jpg"], "must end in .png"),
        (["predict", "MODEL", "photos", "--sheet", "text.png/s.png"], "text.png"),
        (["predict", "MODEL", "photos/a.png", "--sheet", "photos/a.png"], "would overwrite"),
        (["predict", "MODEL", "photos", "--device", "nonsense"], "device 'nonsense'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, checkpoint: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.png").write_text("no image")
    assert main([str(checkpoint) if a == "MODEL" else a for a in arguments]) == 2
    assert re.search(message, error_line(capsys))
    assert not Path("predictions.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["list", "--nonsense"], ["predict", "m"], ["predict", "m", "i", "--topk", "0"], ["info"]],
)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preditc"], "nfzoo: error: there is no command 'preditc'; did you mean 'predict'?"),
        (["list", "--jsn"], "nfzoo list: error: unrecognized arguments: --jsn; did you mean '--json'?"),
        (["info"], "nfzoo info: error: the following arguments are required: MODEL"),
        (["predict", "m", "--data", "d", "--output", "o"], "use `nfzoo bulk MODEL --data SOURCE --output FOLDER`"),
        (["predict", "m", "i", "--topk", "0"], "'0' is not a whole number from 1 to"),
    ],
)
def test_wrong_usage_names_the_remedy(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in error_line(capsys)


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "examples:" in err


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in nfzoo.cli.main.COMMANDS)])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "usage: nfzoo" in capsys.readouterr().out


def test_train_gets_all_further_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    import nfzoo.train.run

    seen: list[object] = []
    monkeypatch.setattr(nfzoo.train, "main", lambda argv: seen.append(argv) or 7)
    assert main(["train", "--help", "--model", "x", "list"]) == 7
    assert seen == [["--help", "--model", "x", "list"]]


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(nfzoo.cli.list_models, "table", interrupted)
    assert main(["list"]) == 130
    assert capsys.readouterr() == ("", "")


# -- what all commands have in common


def parsers(name: str) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser of a command, or those of its subcommands."""
    module, function, _ = nfzoo.cli.main.COMMANDS[name]
    parser = program.parser_of(getattr(importlib.import_module(module), function))
    inner = parser._inner()
    yield from inner or [parser]


@each("name", nfzoo.cli.main.COMMANDS)
def test_every_command_takes_json_and_quiet(name: str) -> None:
    for parser in parsers(name):
        assert {"--json", "--quiet"} <= parser._option_string_actions.keys()


def check_output(cases: Iterable[tuple[str, Sequence[str], str]], capsys: pytest.CaptureFixture[str]) -> None:
    """Run commands with `--json` and with `--quiet`. A case has the keys of the JSON, and what --quiet leaves."""
    for command, keys, left in cases:
        status = 1 if command.startswith("data check") else 0
        assert main([*shlex.split(command), "--json"]) == status, command
        found = json.loads(capsys.readouterr().out, parse_constant=lambda text: pytest.fail(text))
        assert all(key in found for key in keys), command
        assert main([*shlex.split(command), "--quiet"]) == status, command
        out, err = capsys.readouterr()
        assert left in out if left else out == "", command
        assert "wrote" not in out, command
        assert err == "", command


@pytest.fixture
def pets(images: Path) -> Path:
    for name in ("cat", "dog"):
        shutil.copytree(images, images.parent / "pets" / name)
    return images.parent / "pets"


def test_json_is_all_that_is_printed_and_quiet_leaves_results_alone(
    checkpoint: Path, pets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        ("list", (), "nfnet-f0"),
        ("info nfnet-test", ("name", "parameters", "stages"), "parameters:"),
        (f"predict {checkpoint} pets --sheet sheet.png", (), "%"),
        (f"convert --to haiku {checkpoint} haiku.npz --overwrite", ("output", "parameters"), ""),
        (f"push {checkpoint} me/pets --dry-run", ("files", "card"), "model.safetensors"),
        ("push --all-deepmind me --dry-run", ("repositories",), "me/nfnet-f6"),
    ]
    check_output(cases, capsys)


@pytest.mark.slow
def test_json_and_quiet_of_commands_that_take_long(
    checkpoint: Path, pets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = "--data pets --workers 0 --device cpu"
    small = "--epochs 1 --validation-fraction 0.8 --train-size 16 --test-size 16 --overwrite true --workers 0"
    train = f"train --model nfnet-test --data digits {small}"
    search = small.partition(" --overwrite")[0].removeprefix("--epochs 1")
    cases = [
        ("data check pets --workers 0 --sheet sheets", ("findings", "classes"), "finding:"),
        (f"evaluate {checkpoint} {alone}", ("top1", "images"), "top-1"),
        (f"bulk {checkpoint} {alone} --output out --overwrite", ("output", "images", "parts"), ""),
        ("plot signal nfnet-test --batch-size 2 --size 16", ("blocks",), ""),
        (f"{train} --output runs/a", ("output", "epochs", "accuracy", "training_seconds"), ""),
        ("plot curves runs/a", ("output", "runs"), ""),
        (
            f"find-lr --model nfnet-test --data digits {search} --steps 20 --plot lr.png",
            ("found", "tests"),
            "found: --optim.lr",
        ),
        (f"export {checkpoint} --format torch --output exported --size 32", ("format", "written"), ""),
        ("completion bash", ("shell", "script"), "complete"),
    ]
    check_output(cases, capsys)


@pytest.mark.slow
def test_the_first_of_two_processes_prints_for_both(tmp_path: Path) -> None:
    small = "--epochs 1 --validation-fraction 0.8 --train-size 16 --test-size 16 --workers 0"
    arguments = f"--model nfnet-test --data digits {small} --output {tmp_path}/run --quiet --json".split()
    (status, out, err), other = run_in_group(nfzoo.train.main, arguments, tmp_path)
    assert (status, err) == (0, "")
    assert json.loads(out)["epochs"] == 1
    assert other == (0, "", "")


def test_the_options_of_a_run_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--model", "nfnet-test", "--optim.lr", "0.3", "--print-config", "--json"])
    assert caught.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["optim"]["lr"], found["data"]) == ("nfnet-test", 0.3, None)


def test_nothing_is_coloured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which argparse of newer Pythons obeys
    for arguments in (["--help"], ["plot", "signal", "--help"], ["nonsense"]):
        with contextlib.suppress(SystemExit):
            main(arguments)
        out, err = capsys.readouterr()
        assert out + err
        assert "x1b" not in repr(out + err).replace("\\\\", "\\")


def test_the_help_and_the_page_tell_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = re.findall(r"^  (\d+) {2,}\w", capsys.readouterr().out, re.MULTILINE)
    assert told == ["0", "1", "2", "130", "141", "143"]
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == told
    commands = re.findall(r"^\| `nfzoo ([a-z-]+)", page, re.MULTILINE)
    assert list(dict.fromkeys(commands)) == list(nfzoo.cli.main.COMMANDS)


# -- as a process


def test_version_and_module() -> None:
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"nfzoo {nfzoo.cli.main.__version__}\n"


@pytest.mark.parametrize("command", ["--version", "list", "list --json"])
def test_torch_is_not_imported_for_what_needs_none(command: str) -> None:
    code = (
        "import sys\nfrom nfzoo.cli.main import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "False\n")


def test_a_reader_that_goes_away() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "nfzoo", "list"]
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_terminal_that_knows_ascii_alone(checkpoint: Path) -> None:
    done = run("info", str(checkpoint), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\x1b[31mfish" in done.stdout


def test_every_command_tells_a_misspelt_path(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "pets").symlink_to(checkpoint)
    (tmp_path / "runs" / "pets.yaml").touch()
    runs = "runs/pts"
    commands = {
        f"info {runs}": "runs/pets",
        f"predict {runs} photos": "runs/pets",
        "predict runs/pets photos/aa.png": "photos/a.png",
        f"evaluate {runs} --data digits": "runs/pets",
        "evaluate runs/pets --data potos": "photos",
        f"bulk {runs} --data photos --output out": "runs/pets",
        "bulk runs/pets --data potos --output out": "photos",
        f"plot signal {runs}": "runs/pets",
        f"plot curves {runs}": "runs/pets",
        f"convert {runs} out": "runs/pets",
        f"convert {runs}/model.safetensors out": "runs/pets/model.safetensors",
        f"export {runs} --format torch --output out": "runs/pets",
        f"push {runs} me/pets --dry-run": "runs/pets",
        f"space --model {runs}": "runs/pets",
        f"train --model {runs} --data digits --output out": "runs/pets",
        "train --model nfnet-test --data potos --output out": "photos",
        "train --recipe runs/pts.yaml": "runs/pets.yaml",
    }
    for command, near in commands.items():
        assert main(shlex.split(command)) == 2, command
        error = error_line(capsys)
        assert f"did you mean {near!r}" in error, command
    assert not (tmp_path / "out").exists()
    for command in ("info x.safetensors", "info x/y/z", "info ./x", "predict x.pt photos"):
        assert main(shlex.split(command)) == 2
        assert "there is no file or folder" in error_line(capsys), command


def test_predict_counts_what_folders_of_classes_say(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for image in images.iterdir():
            (tmp_path / "pets" / name / image.name).write_bytes(image.read_bytes())
    assert main(["predict", str(checkpoint), "pets", "--topk", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    right = sum(row["predictions"][0]["label"] == Path(row["path"]).parent.name for row in rows)
    assert [row["path"] for row in rows] == [f"pets/{c}/{i}.png" for c in ("cat", "dog") for i in "ab"]
    share = f"{right} of 4 images of pets have their folder's name as label ({right / 4:.1%}); "
    assert f"{share}`nfzoo evaluate {checkpoint} --data pets` measures the accuracy\n" in err
    (tmp_path / "pets").rename(tmp_path / "x")
    for name in ("cat", "dog"):
        (tmp_path / "x" / name).rename(tmp_path / "x" / f"a {name}")
    assert main(["predict", str(checkpoint), "x"]) == 0
    assert "no folder of x is called as a label of the model; `nfzoo evaluate" in capsys.readouterr().out
    assert main(["predict", str(checkpoint), "photos"]) == 0
    assert "evaluate" not in capsys.readouterr().out


def test_a_closed_pipe_is_no_error(checkpoint: Path, tmp_path: Path) -> None:
    """Of the `nfzoo` command and of a module that is run by itself; nothing is said, not even when Python exits."""
    for module, argument in (("nfzoo", "list"), ("nfzoo.bulk", "--help")):
        code = f"import runpy, sys; sys.argv = ['x', '{argument}']; runpy.run_module('{module}', run_name='__main__')"
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
        )
        os.close(writer)
        assert (done.returncode in (0, 141), done.stderr) == (True, ""), module
