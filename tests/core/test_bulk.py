"""Results in parts: the model's, whatever the processes and interruptions, and never those of two runs in a folder."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

import nfzoo
from nfzoo import bulk
from nfzoo.bulk import main, predict_all
from nfzoo.checkpoint import part_files
from nfzoo.checkpoint.lock import locked
from nfzoo.checkpoint.model_folder import MULTI_LABEL
from nfzoo.errors import CheckpointError, ConfigError, DataError
from nfzoo.nn import NFNet
from nfzoo.predict import image_files, predict
from nfzoo.runtime import execution
from tests.evaluate.test_accuracy import make_model
from tests.support.forks import FORK, run_in_group
from tests.support.helpers import relative
from tests.support.pictures import picture, write_images, write_tar

# The folded model rounds its weights once more, and batches of another size add in another order.
TOLERANCE = 1e-4
SHARD = ["--shard-size", "7", "--batch-size", "4", "--workers", "0"]
PARTS = [f"part-{k:05}-of-00004" for k in range(4)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that are started: the number of threads is part of the rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_images(tmp_path_factory.mktemp("data") / "photos", {"bee": 11, "cat/black": 7})
    for i in range(5):
        (root / f"{i}.png").write_bytes(picture(100 + i))
    return root


@pytest.fixture(scope="module")
def model() -> NFNet:
    made = make_model()
    made.temperature = 2.5
    return made


@pytest.fixture(scope="module")
def checkpoint(model: NFNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save_pretrained(tmp_path_factory.mktemp("models") / "animals")


def rows(output: Path) -> list[dict[str, Any]]:
    files = sorted(output.glob("part-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def manifest(output: Path) -> dict[str, Any]:
    return json.loads((output / "manifest.json").read_text())


def contents(output: Path) -> dict[str, bytes]:
    """The parts, and whatever else lies there but the manifest and the notes on the files that stopped a run."""
    others = [path for path in output.iterdir() if path.name != "manifest.json"]
    return {path.name: path.read_bytes() for path in others if not path.name.endswith(".stopped.json")}


# -- what is written


def test_labels_are_those_of_predict(model: NFNet, checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    assert main([str(checkpoint), "--data", str(folder), "--output", str(tmp_path / "out"), "--topk", "3", *SHARD]) == 0
    found = rows(tmp_path / "out")
    names = [row["image"] for row in found]
    assert names == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert len(names) == 23
    assert names[-1] == "cat/black/6.png"
    for row, prediction in zip(found, predict(model, [folder / name for name in names], topk=3), strict=True):
        assert [(p["label"]) for p in row["predictions"]] == [label for label, _ in prediction.top]
        assert [nfzoo_label(model, p["class"]) for p in row["predictions"]] == [p["label"] for p in row["predictions"]]
        values = [p["probability"] for p in row["predictions"]]
        assert values == pytest.approx([value for _, value in prediction.top], abs=TOLERANCE)


def test_sets_are_those_of_predict(model: NFNet, folder: Path, tmp_path: Path) -> None:
    twin = copy.deepcopy(model)
    twin.temperature, twin.problem_type = None, MULTI_LABEL
    twin.thresholds = (1.0, *[0.5] * (model.config.num_classes - 1))
    checkpoint = str(twin.save_pretrained(tmp_path / "sets"))
    run = [checkpoint, "--data", str(folder), *SHARD, "--output"]
    assert main([*run, str(tmp_path / "out")]) == 0
    assert manifest(tmp_path / "out")["identity"]["results"] == "labels at their thresholds"
    found = rows(tmp_path / "out")
    expected = predict(twin, [folder / row["image"] for row in found])
    assert len({len(answer.top) for answer in expected}) > 1, "sets of one size would tell little"
    for row, answer in zip(found, expected, strict=True):
        assert [p["label"] for p in row["predictions"]] == [label for label, _ in answer.top]
        assert [nfzoo_label(model, p["class"]) for p in row["predictions"]] == [label for label, _ in answer.top]
        values = [p["probability"] for p in row["predictions"]]
        assert values == pytest.approx([value for _, value in answer.top], abs=TOLERANCE)
    assert main([*run, str(tmp_path / "out"), "--topk", "1"]) == 2  # others than those that are there
    assert main([*run, str(tmp_path / "table"), "--format", "parquet"]) == 0
    table = [
        row for path in sorted((tmp_path / "table").glob("*.parquet")) for row in parquet.read_table(path).to_pylist()
    ]
    assert [row["labels"] for row in table] == [[p["label"] for p in row["predictions"]] for row in found]
    assert [row["classes"] for row in table] == [[p["class"] for p in row["predictions"]] for row in found]


def nfzoo_label(model: NFNet, number: int) -> str:
    assert model.labels is not None
    return model.labels[number]


@pytest.mark.parametrize(("dtype", "size", "precision"), [("float32", None, TOLERANCE), ("float16", 48, 1e-3)])
def test_embeddings_are_those_of_the_model(
    model: NFNet, folder: Path, tmp_path: Path, dtype: str, size: int | None, precision: float
) -> None:
    done = predict_all(
        model, str(folder), tmp_path / "out", embeddings=True, dtype=dtype, size=size, shard_size=20, workers=0
    )
    assert (done.images, done.written, done.parts, done.broken) == (23, 2, 2, 0)
    for part, count in enumerate((20, 3)):
        with np.load(tmp_path / "out" / f"part-{part:05}-of-00002.npz") as file:
            names, found = file["image"].tolist(), file["embeddings"]
        assert found.dtype == dtype
        with torch.no_grad():
            expected = model.embed(torch.stack([model.preprocess(folder / name, size=size) for name in names]))
        assert found.shape == expected.shape == (count, expected.shape[1])
        assert relative(found, expected) < precision


def test_parquet_holds_what_jsonl_and_npz_hold(model: NFNet, folder: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"shard_size": 12, "workers": 0}
    predict_all(model, str(folder), tmp_path / "lines", **given)
    predict_all(model, str(folder), tmp_path / "table", format="parquet", **given)
    found = [
        row for path in sorted((tmp_path / "table").glob("*.parquet")) for row in parquet.read_table(path).to_pylist()
    ]
    assert len(found) == 23
    for row, line in zip(found, rows(tmp_path / "lines"), strict=True):
        assert row == {
            "image": line["image"],
            "classes": [p["class"] for p in line["predictions"]],
            "labels": [p["label"] for p in line["predictions"]],
            "probabilities": [p["probability"] for p in line["predictions"]],
        }
    for dtype in ("float32", "float16"):
        given |= {"embeddings": True, "dtype": dtype}
        predict_all(model, str(folder), tmp_path / f"arrays {dtype}", **given)
        predict_all(model, str(folder), tmp_path / f"table {dtype}", format="parquet", **given)
        for path in (tmp_path / f"arrays {dtype}").glob("*.npz"):
            table = parquet.read_table(tmp_path / f"table {dtype}" / f"{path.stem}.parquet")
            with np.load(path) as file:
                assert table["image"].to_pylist() == file["image"].tolist()
                assert np.array_equal(np.stack(table["embeddings"].to_numpy()), file["embeddings"])
                assert table["embeddings"].to_pylist()[0][0] == file["embeddings"][0, 0]


def test_workers_do_not_matter(model: NFNet, folder: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        predict_all(model, str(folder), tmp_path / str(workers), shard_size=7, batch_size=4, workers=workers)
    assert contents(tmp_path / "0") == contents(tmp_path / "2")
    assert sorted(contents(tmp_path / "0")) == [f"{part}.jsonl" for part in PARTS]


def test_the_manifest_says_what_the_parts_are(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    assert main([str(checkpoint), "--data", str(folder), "--output", str(tmp_path / "out"), *SHARD]) == 0
    found = manifest(tmp_path / "out")
    assert (found["model"], found["source"], found["parts"]) == ("nfnet-test", str(folder), 4)
    assert found["identity"].items() >= {"images": 23, "results": "top-5", "shard_size": 7, "size": 32}.items()
    assert (found["complete"], found["broken"]) == (True, [])
    (run,) = found["runs"]
    versions = {"nfzoo": nfzoo.__version__, "torch": str(torch.__version__)}
    assert run == {**versions, "device": "cpu", "processes": 1, "batch_size": 4, "parts": 4}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_batches_have_one_size(
    model: NFNet, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    shapes = []

    def compile_blocks(self: NFNet) -> NFNet:
        self.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
        return original(self, enabled=compiled, backend="eager")

    original = NFNet.compile_blocks
    predict_all(model, str(folder), tmp_path / "plain", shard_size=7, batch_size=4, workers=0)
    monkeypatch.setattr(NFNet, "compile_blocks", compile_blocks)
    predict_all(model, str(folder), tmp_path / "compiled", shard_size=7, batch_size=4, workers=0, compile=True)
    assert shapes == [(4, 3, 32, 32)] * 7
    for one, other in zip(rows(tmp_path / "plain"), rows(tmp_path / "compiled"), strict=True):
        assert one["image"] == other["image"]
        assert [p["class"] for p in one["predictions"]] == [p["class"] for p in other["predictions"]]
        values = [p["probability"] for p in one["predictions"]]
        assert values == pytest.approx([p["probability"] for p in other["predictions"]], abs=TOLERANCE)


def test_low_precision_is_near_and_not_equal(model: NFNet, folder: Path, tmp_path: Path) -> None:
    found = []
    for low in ("no", "bf16"):
        predict_all(model, str(folder), tmp_path / low, embeddings=True, workers=0, mixed_precision=low)
        with np.load(tmp_path / low / "part-00000-of-00001.npz") as file:
            found.append(file["embeddings"])
    assert 1e-5 < relative(found[1], found[0]) < 0.1  # bfloat16 keeps 8 bits


# -- going on


def test_another_backend_gets_batches_of_one_size(
    model: NFNet, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    options: dict[str, Any] = {"shard_size": 10, "batch_size": 4, "device": "cpu", "embeddings": True}
    predict_all(model, str(folder), plain, **options)
    shapes: list[tuple[int, ...]] = []

    def make(model: Any, x: torch.Tensor) -> Any:
        blocks = copy.copy(model)

        def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            shapes.append(tuple(x.shape))
            pooled = blocks.embed(x)
            return pooled, blocks.head(pooled)

        return run

    monkeypatch.setattr(execution, "candidates", lambda *_, **__: [execution.Candidate("openvino", True, make)])
    predict_all(model, str(folder), other, backend="openvino", **options)
    side = model.preprocessing.test_size
    assert set(shapes) == {(4, 3, side, side)}
    for part in sorted(plain.glob("part-*")):
        ours, theirs = (np.load(root / part.name)["embeddings"] for root in (other, plain))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert manifest(other)["runs"][0]["backend"] == "openvino"
    for changed, message in (
        ({"backend": "tensorrt"}, "torch or openvino"),
        ({"backend": "openvino", "compile": True}, "OpenVINO compiles"),
    ):
        with pytest.raises(ConfigError, match=message):
            predict_all(model, str(folder), tmp_path / "none", **{**options, **changed})


def test_what_is_there_is_left_alone(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = [str(checkpoint), "--data", str(folder), "--output", str(output), *SHARD]
    assert main(command) == 0
    assert re.fullmatch(
        rf"wrote 4 of 4 parts to {output}: 23 images in [\d.]+ s, [\d,.]+ images/s\n", capsys.readouterr().out
    )
    whole = contents(output)
    (output / f"{PARTS[2]}.jsonl").unlink()
    (output / f"{PARTS[1]}.jsonl").write_text("marked")
    (output / f".{PARTS[3]}.jsonl.x1y2.jsonl").write_text("what a killed run left")
    assert main(command) == 0
    assert "wrote 1 of 4 parts" in (out := capsys.readouterr().out)
    assert ", 3 were there: 7 images in" in out
    assert contents(output) == {**whole, f"{PARTS[1]}.jsonl": b"marked"}
    assert main(command) == 0
    assert capsys.readouterr().out == f"all 4 parts are in {output} already\n"
    assert [run["parts"] for run in manifest(output)["runs"]] == [4, 1]
    assert main([*command, "--overwrite"]) == 0
    assert contents(output) == whole
    assert [run["parts"] for run in manifest(output)["runs"]] == [4]


def test_a_killed_run_leaves_whole_parts_and_is_taken_up(checkpoint: Path, tmp_path: Path) -> None:
    data = write_images(tmp_path / "photos", {"a": 240})
    command = [str(checkpoint), "--data", str(data), "--shard-size", "2", "--workers", "0", "--device", "cpu"]
    output = tmp_path / "killed"
    process = FORK.Process(target=main, args=([*command, "--output", str(output)],))
    process.start()
    end = time.monotonic() + 300
    while process.is_alive() and len(list(output.glob("part-*"))) < 5:
        assert time.monotonic() < end
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = {path.name: path.read_bytes() for path in output.glob("part-*")}
    assert 5 <= len(left) < 120
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) == 120
    assert left.items() < whole.items()
    assert manifest(output)["complete"] is False
    assert main([*command, "--output", str(output)]) == 0
    assert contents(output) == whole
    assert manifest(output)["complete"] is True


def test_a_full_disk_leaves_the_parts_before(
    checkpoint: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if PARTS[2] in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    output = tmp_path / "out"
    command = [str(checkpoint), "--data", str(folder), "--output", str(output), *SHARD]
    with monkeypatch.context() as context:
        context.setattr(os, "replace", full)
        assert main(command) == 1
    assert "No space left" in capsys.readouterr().err
    assert sorted(contents(output)) == [f"{part}.jsonl" for part in PARTS[:2]]
    assert main(command) == 0
    assert sorted(contents(output)) == [f"{part}.jsonl" for part in PARTS]


def test_a_second_run_is_kept_out(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(checkpoint), "--data", str(folder), "--output", str(tmp_path / "out"), *SHARD]
    with locked(tmp_path / "out"):
        assert main(command) == 2
    assert f"another run is writing into '{tmp_path / 'out'}' (process {os.getpid()}" in capsys.readouterr().err
    assert main(command) == 0
    assert sorted(contents(tmp_path / "out")) == [f"{part}.jsonl" for part in PARTS]


CHANGES: dict[str, tuple[list[str], str]] = {
    "labels": (["--topk", "2"], "results top-5 and not top-2"),
    "kind": (
        ["--embeddings", "--format", "parquet"],
        "results top-5 and not embeddings, float32, format jsonl and not",
    ),
    "shards": (["--shard-size", "8"], "shard_size 7 and not 8"),
    "size": (["--size", "48"], "size 32 and not 48"),
    "precision": (["--mixed-precision", "bf16"], "mixed_precision no and not bf16"),
    "model": (["{other}"], "weights "),
    "data": (["--data", "digits"], "data "),
}


def test_results_of_two_runs_do_not_mix(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    other = make_model(seed=1).save_pretrained(tmp_path / "other")
    command = ["--data", str(folder), "--output", str(output), *SHARD]
    assert main([str(checkpoint), *command]) == 0
    before = {path: path.read_bytes() for path in output.iterdir()}
    for name, (options, message) in CHANGES.items():
        source = str(other) if name == "model" else str(checkpoint)
        capsys.readouterr()
        assert main([source, *command, *(option for option in options if option != "{other}")]) == 2, name
        err = capsys.readouterr().err
        assert re.fullmatch(r"nfzoo bulk: error: [^\n]+ --overwrite to replace them\n", err), name
        assert message in err
    assert {path: path.read_bytes() for path in output.iterdir()} == before
    # What changes the rounding alone does not make another run of it.
    assert main([str(checkpoint), *command, "--batch-size", "5", "--skip-broken"]) == 0
    # Other images under other names, and parts of nobody knows what.
    shutil.copytree(folder, tmp_path / "more")
    (tmp_path / "more" / "5.png").write_bytes(picture(5))
    assert main([str(checkpoint), *command, "--data", str(tmp_path / "more")]) == 2
    (output / "manifest.json").unlink()
    assert main([str(checkpoint), *command]) == 2
    assert "without a manifest.json" in capsys.readouterr().err
    assert main([str(other), *command, "--topk", "1", "--overwrite"]) == 0
    assert {len(row["predictions"]) for row in rows(output)} == {1}
    (output / "manifest.json").write_text('{"mine": 1}')
    assert main([str(checkpoint), *command, "--overwrite"]) == 2
    assert "is no manifest of predictions" in capsys.readouterr().err
    assert (output / "manifest.json").read_text() == '{"mine": 1}'


# -- broken images


def test_broken_images_are_named_and_fatal_unless_asked(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(folder, tmp_path / "photos"))
    output = tmp_path / "out"
    command = [str(checkpoint), "--data", str(data), "--output", str(output), *SHARD]
    names = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.png"))
    broken = [names[8], names[9], names[22]]
    for name in broken:
        (data / name).write_bytes(picture(3)[:200])
    assert main(command) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"nfzoo bulk: error: [^\n]+, or leave such images out with --skip-broken\n", err)
    assert str(data / broken[0]) in err
    assert sorted(contents(output)) == [f"{PARTS[0]}.jsonl"]

    assert main([*command, "--skip-broken"]) == 0
    assert "3 images cannot be read; manifest.json names them" in capsys.readouterr().out
    assert [row["image"] for row in rows(output)] == [name for name in names if name not in broken]
    found = manifest(output)["broken"]
    assert [(entry["image"], entry["part"]) for entry in found] == list(zip(broken, (1, 1, 3), strict=True))
    assert all(str(data / entry["image"]) in entry["problem"] for entry in found)
    assert sorted(contents(output)) == [f"{part}.jsonl" for part in PARTS]

    # The others are computed as if nothing were broken beside them.
    assert main([str(checkpoint), "--data", str(folder), "--output", str(tmp_path / "good"), *SHARD]) == 0
    good = {row["image"]: row for row in rows(tmp_path / "good")}
    assert all(good[row["image"]] == row for row in rows(output))

    # A part that is made again takes its broken images with it.
    (output / f"{PARTS[1]}.jsonl").unlink()
    for name in broken:
        shutil.copy(folder / name, data / name)
    assert main(command) == 0
    assert [entry["image"] for entry in manifest(output)["broken"]] == broken[2:]
    assert len(rows(output)) == 22


def test_nothing_but_broken_images_is_an_error(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "photos", {"a": 3})
    for path in image_files([data / "a"]):
        path.write_bytes(b"")
    command = [str(checkpoint), "--data", str(data), "--output", str(tmp_path / "out"), "--skip-broken", "--workers"]
    for _ in range(2):
        assert main([*command, "0"]) == 2
        assert "none of the 3 images can be read, such as: " in capsys.readouterr().err
        assert manifest(tmp_path / "out")["complete"] is False


def test_damaged_weights_give_no_results(folder: Path, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        dict(model.named_parameters())["head.bias"].fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"the outputs for '0\.png' are not finite"):
        predict_all(model, str(folder), tmp_path / "out", workers=0)
    assert contents(tmp_path / "out") == {}


def test_embeddings_beyond_half_precision_are_refused(folder: Path, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "final_conv.gain":
                p.mul_(1e6)
    with pytest.raises(ConfigError, match="do not fit into float16; take --dtype float32"):
        predict_all(model, str(folder), tmp_path / "out", embeddings=True, dtype="float16", workers=0)


# -- several processes


def test_two_processes_write_what_one_writes(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(folder, tmp_path / "photos"))
    (data / "bee" / "0.png").write_bytes(b"")
    command = [str(checkpoint), "--data", str(data), *SHARD, "--skip-broken", "--output"]
    assert main([*command, str(tmp_path / "one")]) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for part in (0, 2, 3):
        (tmp_path / "two" / f"{PARTS[part]}.jsonl").unlink()
    before = (tmp_path / "two" / f"{PARTS[1]}.jsonl").stat().st_mtime_ns
    (status, out, err), other = run_in_group(main, [*command, str(tmp_path / "two")], tmp_path)
    assert (status, other[0]) == (0, 0), err + other[2]
    assert "wrote 3 of 4 parts" in out
    assert other[1] == ""
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert (tmp_path / "two" / f"{PARTS[1]}.jsonl").stat().st_mtime_ns == before
    one, two = manifest(tmp_path / "one"), manifest(tmp_path / "two")
    assert [run["processes"] for run in two["runs"]] == [1, 2]
    assert {**two, "runs": None} == {**one, "runs": None}
    assert [entry["image"] for entry in one["broken"]] == ["bee/0.png"]


def test_what_ends_one_process_is_told_once_and_the_rest_is_kept(
    checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    command = [str(checkpoint), "--data", str(folder), *SHARD, "--output"]
    (status, _, err), other = run_in_group(main, [*command, str(folder / "inside")], tmp_path)
    assert (status, other[0]) == (2, 2)
    assert "among the data" in err
    assert other[2] == ""

    data = Path(shutil.copytree(folder, tmp_path / "photos"))
    broken = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.png"))[22]
    (data / broken).write_bytes(b"")
    command = [str(checkpoint), "--data", str(data), *SHARD, "--output", str(tmp_path / "out")]
    (status, out, err), other = run_in_group(main, command, tmp_path)
    assert (status, other[0], out) == (2, 2, "")
    assert other[2].count(f"nfzoo bulk: error: {data / broken}") == 1
    assert "another process has ended early; run the same command again" in err
    assert sorted(contents(tmp_path / "out")) == [f"{part}.jsonl" for part in PARTS[:3]]

    shutil.copy(folder / broken, data / broken)
    assert main(command) == 0
    assert len(rows(tmp_path / "out")) == 23


@pytest.mark.slow
def test_the_module_runs_under_accelerates_launcher(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", "--num_cpu_threads_per_process", "1", "-m", "nfzoo.bulk"]
    done = subprocess.run(
        [*command, str(checkpoint), "--data", str(folder), *SHARD, "--output", str(tmp_path / "out")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(contents(tmp_path / "out")) == [f"{part}.jsonl" for part in PARTS]
    assert manifest(tmp_path / "out")["runs"][0]["processes"] == 2


# -- the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "arguments are required: MODEL, --data, --output"),
        (["{model}", "--data", "/no/such", "--output", "{out}"], "the data '/no/such' do not exist"),
        (["/no/such/model", "--data", "{data}", "--output", "{out}"], "no file or folder '/no/such/model'"),
        (["{model}", "--data", "{data}", "--output", "{model}/config.json"], "is a file; give a folder"),
        (["{model}", "--data", "{data}", "--output", "{data}/out"], "among the data"),
        (["{model}", "--data", "{data}", "--output", "{out}", "--format", "npz"], "top-k are written as jsonl or parq"),
        (["{model}", "--data", "{data}", "--output", "{out}", "--embeddings", "--format", "jsonl"], "npz or parquet"),
        (["{model}", "--data", "{data}", "--output", "{out}", "--dtype", "float16"], "applies to embeddings only"),
        (["{model}", "--data", "{data}", "--output", "{out}", "--topk", "0"], "--topk"),
        (["{model}", "--data", "{data}", "--output", "{out}", "--shard-size", "-1"], "--shard-size"),
        (["{model}", "--data", "{data}", "--output", "{out}", "--device", "tpu9"], "'tpu9' cannot be used"),
        (["{model}", "--data", "{data}", "--output", "{out}", "--part", "train"], "has no parts"),
        (["{model}", "a.png", "--data", "{data}", "--output", "{out}"], "unrecognized arguments: a.png"),
    ],
)
def test_bad_input_ends_in_one_line(
    checkpoint: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    output = tmp_path / "out"
    assert main([o.format(model=checkpoint, data=folder, out=output) for o in options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"nfzoo bulk: error: [^\n]+\n", err)
    assert message in err
    assert not output.exists()


def test_ctrl_c_ends_with_130(checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bulk, "compute", interrupt)
    assert main([str(checkpoint), "--data", str(folder), "--output", str(tmp_path / "out"), "--workers", "0"]) == 130
    assert contents(tmp_path / "out") == {}


def test_tar_files_keep_their_names(checkpoint: Path, tmp_path: Path) -> None:
    for k in range(2):
        members = [(f"x/{i}.png", picture(10 * k + i)) for i in range(3)]
        write_tar(tmp_path / "tars" / f"{k:03}.tar", members)
    output = tmp_path / "out"
    assert main([str(checkpoint), "--data", f"{tmp_path}/tars/{{000..001}}.tar", "--output", str(output)]) == 0
    assert [row["image"] for row in rows(output)] == [f"{k:03}.tar/x/{i}.png" for k in range(2) for i in range(3)]


def test_parts_follow_images_and_processes(model: NFNet, folder: Path, tmp_path: Path) -> None:
    """Each process has something to do, and a rerun keeps the parts of the run before."""
    for images, processes, batch_size, size in (
        (2000, 2, 32, 256),
        (2000, 1, 32, 512),
        (23, 1, 4, 8),
        (3, 8, 32, 32),
        (10_000_000, 8, 32, 4096),
        (1, 1, 1, 1),
    ):
        assert part_files.share_size(images, processes, batch_size) == size
        files = -(-images // size)
        assert files >= min(4 * processes, images / batch_size) * 0.7
    options: dict[str, Any] = {"workers": 0, "size": 16}
    done = predict_all(model, str(folder), tmp_path / "out", batch_size=4, **options)
    assert done.parts == 3
    (tmp_path / "out" / "part-00001-of-00003.jsonl").unlink()
    again = predict_all(model, str(folder), tmp_path / "out", batch_size=2, **options)
    assert (again.written, again.parts) == (1, 3)
    anew = predict_all(model, str(folder), tmp_path / "out", batch_size=2, overwrite=True, **options)
    assert (anew.written, anew.parts) == (4, 4)
    with pytest.raises(ConfigError, match="shard_size 6 and not 5"):
        predict_all(model, str(folder), tmp_path / "out", shard_size=5, **options)


def test_a_run_goes_on_without_the_file_that_stopped_it(model: NFNet, folder: Path, tmp_path: Path) -> None:
    """Removed or mended: finished parts stay, and each image that is there has its row, once."""
    data = shutil.copytree(folder, tmp_path / "photos")
    names = [row["image"] for row in predicted(model, data, tmp_path / "whole")]
    for index, mend in ((9, False), (15, True), (0, False)):  # in the second, third and first part of eight images
        path = data / names[index]
        content = path.read_bytes()
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
        if index == 0:
            (tmp_path / "out" / "part-00000-of-00003.jsonl").unlink()
        for _ in range(2):
            with pytest.raises(DataError, match="mend or remove it, and run the same command to go on"):
                predicted(model, data, tmp_path / "out")
        if mend:
            path.write_bytes(content)
        else:
            path.unlink()
    found = predicted(model, data, tmp_path / "out")
    assert [row["image"] for row in found] == [name for i, name in enumerate(names) if i not in (0, 9)]
    assert manifest(tmp_path / "out")["removed"] == [0, 9]
    (data / names[3]).unlink()  # no file that stopped the run
    with pytest.raises(ConfigError, match="results of another run"):
        predicted(model, data, tmp_path / "out")


def predicted(model: NFNet, data: Path, output: Path) -> list[dict[str, Any]]:
    predict_all(model, str(data), output, shard_size=8, batch_size=4, workers=0, size=16)
    text = "".join(path.read_text() for path in sorted(output.glob("part-*.jsonl")))
    return [json.loads(line) for line in text.splitlines()]
