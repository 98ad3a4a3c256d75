"""Accuracy on folders of images: equal to a plain loop's, whatever the batches and processes, and how it fails."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import nfzoo
from nfzoo.cli.main import main as cli
from nfzoo.data.label_files import LabelFiles
from nfzoo.data.labels import imagenet, imagenet_wnids
from nfzoo.data.source import open_split
from nfzoo.evaluate import Evaluation, evaluate, main, open_labelled, score, table
from nfzoo.evaluate.accuracy import Evaluator
from nfzoo.nn import NFNet
from nfzoo.runtime import execution
from tests.support.forks import run_in_group
from tests.support.pictures import write_images

LABELS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")
# A batch of another size adds a convolution's terms in another order; a loss is of order one.
LOSS_TOLERANCE = 1e-5


def make_model(seed: int = 0, labels: Sequence[str] | None = LABELS, classes: int = len(LABELS)) -> NFNet:
    generator = torch.Generator().manual_seed(seed)
    model = nfzoo.create("nfnet-test", num_classes=classes, labels=labels, generator=generator).eval()
    with torch.no_grad():  # outputs that differ from image to image
        for name, value in model.named_parameters():
            if name == "head.weight":
                value.normal_(generator=generator)
    return model


def plain_loop(model: NFNet, folder: Path, index: Callable[[str], int], size: int | None = None) -> tuple[int, ...]:
    """Images, right ones, right among five, one image at a time."""
    images = right = right5 = 0
    for path in sorted(folder.rglob("*.png")):
        with torch.no_grad():
            order = model(model.preprocess(path, size=size)[None])[0].argsort(descending=True).tolist()
        images += 1
        right += order[0] == index(path.parent.name)
        right5 += index(path.parent.name) in order[:5]
    return images, right, right5


def counts(found: Evaluation) -> tuple[int, ...]:
    right, right5 = found.top1 * found.images, found.top5 * found.images
    assert right == pytest.approx(round(right), abs=1e-6)
    return found.images, round(right), round(right5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "animals", {"bee": 11, "cat": 7, "gnu": 5})


@pytest.fixture(scope="module")
def model() -> NFNet:
    return make_model()


@pytest.fixture(scope="module")
def checkpoint(model: NFNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save_pretrained(tmp_path_factory.mktemp("models") / "animals")


# -- the numbers


@pytest.mark.parametrize("size", [None, 48])
def test_accuracy_is_that_of_a_plain_loop(model: NFNet, folder: Path, size: int | None) -> None:
    found = evaluate(model, str(folder), batch_size=4, workers=0, size=size)
    expected = plain_loop(model, folder, LABELS.index, size)
    assert counts(found) == expected
    assert 0 < expected[1] < expected[2] < expected[0]
    assert (found.size, found.classes, found.skipped) == (size or 32, 3, 0)


def test_batches_and_workers_do_not_matter(model: NFNet, folder: Path) -> None:
    first = evaluate(model, str(folder), batch_size=23, workers=0)
    for batch_size, workers in ((1, 0), (4, 2), (22, 0), (100, 1)):
        found = evaluate(model, str(folder), batch_size=batch_size, workers=workers)
        assert found._replace(loss=0) == first._replace(loss=0)
        assert found.loss == pytest.approx(first.loss, abs=LOSS_TOLERANCE)


def test_a_trained_model_is_scored_as_in_training(tmp_path: Path) -> None:
    from nfzoo.train.run import main as train

    data = tmp_path / "pets"
    write_images(data / "train", {"bee": 4, "cat": 4})
    write_images(data / "val", {"bee": 6, "cat": 5}, seed=1)
    run = ["--model", "nfnet-test", "--data", str(data), "--epochs", "1", "--batch_size", "4", "--workers", "0"]
    assert train([*run, "--output", str(tmp_path / "run")]) == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    found = evaluate(nfzoo.from_pretrained(tmp_path / "run"), str(data), workers=0)
    assert found.top1 == row["ema_accuracy"]
    assert found.loss == pytest.approx(row["ema_loss"], abs=LOSS_TOLERANCE)
    assert (found.dataset, found.split, found.images) == ("pets", "val", 11)


def test_many_images_are_computed_by_the_folded_form(
    model: NFNet, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = Evaluator.prepare(model, str(folder), workers=0, device="cpu").outputs()[1].logits
    monkeypatch.setattr(execution, "MANY", 1)
    evaluation, outputs = Evaluator.prepare(model, str(folder), workers=0, device="cpu").outputs()
    difference = np.linalg.norm(outputs.logits - exact) / np.linalg.norm(exact)
    assert 0 < difference < 1e-5
    assert evaluation.images == len(exact)
    assert not model.config.folded


def test_of_the_digits_those_held_out_from_training_are_taken() -> None:
    found, expected = open_labelled("digits", 10, None), open_split("digits").validation
    assert (found.dataset, found.split, found.matched_by) == ("digits", "held out", "numbers")
    assert np.array_equal(found.images.rows, expected.rows)
    assert np.array_equal(found.images.labels, expected.labels)


def test_equal_logits_go_to_the_first_class_and_no_number_is_right() -> None:
    nan = float("nan")
    logits = torch.tensor([[0.0] * 8, [0.0] * 8, [0.0] * 8, [nan] * 8, [nan, 1.0, *[0.0] * 6]])
    labels = torch.tensor([0, 4, 5, 0, 1])
    found = score(lambda x: x, [(logits, labels)], device="cpu")
    assert (found.images, found.top1, found.top5) == (5, 1 / 5, 3 / 5)  # one NaN beside it does not hide the second
    assert np.isnan(found.loss)


def test_the_loss_is_the_mean_over_images_not_over_batches() -> None:
    logits, labels = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2, 0])

    def identity(x: Tensor) -> Tensor:
        return x

    ragged = score(identity, zip(logits.split(3), labels.split(3), strict=True), device="cpu")
    assert ragged.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-7)
    assert ragged.top1 == int((logits.argmax(1) == labels).sum()) / 7
    assert ragged.top5 == 1.0


def test_no_images_give_no_score() -> None:
    assert score(lambda x: x, [], device="cpu").images == 0


def test_the_macro_f1_is_scikit_learns() -> None:
    from sklearn.metrics import f1_score  # takes a second

    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 4, 4])  # of six classes one is only predicted, and one not even that
    logits = torch.zeros(10, 6)
    for _ in range(5):
        logits = torch.randn(10, 6, generator=generator)
        logits[:, 5] = -10
        found = score(lambda x: x, zip(logits.split(3), labels.split(3), strict=True), device="cpu", classes=6)
        wanted = f1_score(labels, logits.argmax(1), average="macro")
        assert found.f1 == pytest.approx(wanted, abs=1e-12)
    assert math.isnan(score(lambda x: x, [], device="cpu", classes=6).f1 or 0)
    assert score(lambda x: x, [(logits, labels)], device="cpu").f1 is None


# -- several processes


def test_two_processes_count_every_image_once(model: NFNet, checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    broken = write_images(tmp_path / "animals", {"bee": 11, "cat": 7, "gnu": 6}) / "gnu" / "5.png"  # for the second
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    target = tmp_path / "two.json"
    options = ["--batch-size", "4", "--workers", "0", "--skip-broken", "--json", str(target)]
    first, second = run_in_group(main, [str(checkpoint), "--data", str(broken.parent.parent), *options], tmp_path)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert (first[1].count("top-1"), second[1]) == (1, "")
    assert (first[2] + second[2]).count(str(broken)) == 1
    found, one = json.loads(target.read_text()), evaluate(model, str(folder), workers=0)
    assert (found["images"], found["skipped"]) == (23, 1)
    assert (found["top1"], found["top5"]) == (one.top1, one.top5)
    assert found["loss"] == pytest.approx(one.loss, abs=LOSS_TOLERANCE)


def test_fewer_images_than_processes(model: NFNet, checkpoint: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "one", {"fox": 1})
    first, second = run_in_group(main, [str(checkpoint), "--data", str(folder), "--json", "-"], tmp_path)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    found = json.loads(first[1])
    assert (found["images"], found["top1"], found["top5"]) == plain_loop(model, folder, LABELS.index)


def test_what_another_process_cannot_read_is_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "animals", {"bee": 1, "cat": 1})
    (folder / "cat" / "0.png").write_bytes(b"")
    first, second = run_in_group(main, [str(checkpoint), "--data", str(folder), "--workers", "0"], tmp_path)
    assert first[0]
    assert second[0] == 2
    assert f"nfzoo evaluate: error: {folder / 'cat' / '0.png'} is empty" in second[2]
    assert "top-1" not in first[1]


def test_processes_that_would_each_do_all_the_work_are_refused(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    arguments = [str(checkpoint), "--data", str(folder)]
    first, second = run_in_group(main, arguments, tmp_path, use_cpu="false")
    assert (first[0], second[0]) == (2, 2)
    assert first[2].count("nfzoo evaluate: error: 2 processes were launched and do not find each other") == 1
    assert (first[1], *second[1:]) == ("", "", "")


@pytest.mark.slow
def test_processes_share_the_images_of_a_table(checkpoint: Path, model: NFNet, folder: Path, tmp_path: Path) -> None:
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in sorted(folder.rglob("*.png"))[::2]]
    (tmp_path / "l.csv").write_text("path,label\n" + "\n".join(rows))
    options = ["--data", str(folder), "--labels", f"{tmp_path}/l.csv", "--workers", "0", "--json", "-"]
    first, second = run_in_group(main, [str(checkpoint), *options], tmp_path)
    assert (first[0], second[0], second[1]) == (0, 0, ""), first[2] + second[2]
    found = json.loads(first[1])
    one = evaluate(model, str(folder), labels=LabelFiles(f"{tmp_path}/l.csv"), workers=0)
    assert found["images"] == one.images == len(rows)
    assert (found["top1"], found["top5"]) == (one.top1, one.top5)


@pytest.mark.slow
def test_accelerates_launcher_shares_the_work(model: NFNet, checkpoint: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", "--num_cpu_threads_per_process", "1", "-m", "nfzoo.evaluate"]
    done = subprocess.run(
        [*command, str(checkpoint), "--data", str(folder), "--json", "-"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found, one = json.loads(done.stdout), evaluate(model, str(folder), workers=0)
    assert (found["images"], found["top1"], found["top5"]) == (one.images, one.top1, one.top5)


# -- classes


def test_imagenet_folders_are_wordnet_ids_or_labels(tmp_path: Path) -> None:
    model = make_model(labels=None, classes=1000)
    indices = (0, 134, 517, 999)
    by_id = write_images(tmp_path / "ids", {imagenet_wnids()[i]: 2 for i in indices})
    found = evaluate(model, str(by_id), workers=0)
    assert found.matched_by == "WordNet ids"
    assert counts(found) == plain_loop(model, by_id, imagenet_wnids().index)
    for labels in (None, imagenet()):
        by_name = write_images(tmp_path / str(labels is None), {imagenet()[i]: 2 for i in indices})
        opened = open_labelled(str(by_name), 1000, labels)
        found = {
            Path(opened.images.name(i)).parent.name: label for i, label in enumerate(opened.images.labels.tolist())
        }
        assert found == {imagenet()[i]: i for i in indices}


@pytest.mark.parametrize(
    ("given", "dataset", "split"),
    [("pets", "pets", "val"), ("pets/val", "pets", "val"), ("pets/train", "pets", "train"), ("more", "more", None)],
)
def test_the_held_out_part_is_taken(tmp_path: Path, given: str, dataset: str, split: str | None) -> None:
    for part, count in (("pets/train", 1), ("pets/val", 2), ("more", 3)):
        write_images(tmp_path / part, {"cat": count})
    opened = open_labelled(str(tmp_path / given), len(LABELS), LABELS)
    expected = {"pets": 2, "pets/val": 2, "pets/train": 1, "more": 3}[given]
    assert (opened.dataset, opened.split, len(opened.images)) == (dataset, split, expected)
    assert set(opened.images.labels) == {2}


def test_labels_of_a_table(checkpoint: Path, model: NFNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_images(tmp_path / "animals", {"bee": 4, "cat": 3})
    for named in (False, True):  # labels that are names, and numbers of the lines of a file of names
        rows = [
            f"{p.parent.name}/{p.name},{LABELS.index(p.parent.name) if named else p.parent.name}"
            for p in sorted(folder.rglob("*.png"))
        ]
        parts = ["train", "val", "val", "test", "val", "val", "train"]
        text = "".join(f"{row},{part}\n" for row, part in zip(rows, parts, strict=True))
        (tmp_path / "l.csv").write_text(f"path,label,split\n{text}")
        (tmp_path / "names.txt").write_text("\n".join(LABELS))
        options = [str(checkpoint), "--data", str(folder), "--workers", "0", "--labels", f"{tmp_path}/l.csv"]
        options += ["--class-names", f"{tmp_path}/names.txt"] if named else []
        assert main([*options, "--json", "-"]) == 0
        found = json.loads(capsys.readouterr().out)
        for path in ("bee/0.png", "bee/3.png", "cat/2.png"):
            (folder / path).rename(tmp_path / "aside.png")
            (tmp_path / "aside.png").rename(folder / (path + ".not"))
        images, right, _ = plain_loop(model, folder, LABELS.index)
        assert (found["images"], found["split"], found["top1"]) == (images, "val", right / images)
        for path in folder.rglob("*.not"):
            path.rename(path.with_suffix(""))
    assert main([*options[:5], "--class-names", f"{tmp_path}/names.txt"]) == 2
    assert "goes with a file of labels" in capsys.readouterr().err
    (tmp_path / "l.csv").write_text("path,label\nbee/0.png,wasp\n")
    assert main(options[:7]) == 2
    assert "are no classes of the model: 'wasp'" in capsys.readouterr().err


# -- the command


def test_json_equals_the_table(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "evaluation.json"
    options = [str(checkpoint), "--data", str(folder), "--workers", "0"]
    assert cli(["evaluate", *options, "--json", str(target), "--date", "2026-01-31"]) == 0
    text = capsys.readouterr().out
    assert text.endswith(f"wrote {target}\n")
    found = json.loads(target.read_text())
    assert {"dataset", "images", "top1", "top5", "size"} <= found.keys()
    assert (found["dataset"], found["images"], found["size"]) == ("animals", 23, 32)
    assert (found["nfzoo"], found["torch"]) == (nfzoo.__version__, torch.__version__)
    assert found["date"] == "2026-01-31"
    assert str(tmp_path) not in target.read_text()
    rows = dict(re.split(r":\s+", line, maxsplit=1) for line in text.splitlines()[:-1])
    assert rows["top-1"] == f"{found['top1']:.2%}"
    assert "top-5" not in rows  # of three classes
    assert rows["loss"] == f"{found['loss']:.4f}"
    assert rows["images"] == "23"
    assert rows["input"].startswith("32 x 32 pixels (deepmind")

    assert cli(["evaluate", *options, "--json", "-"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == {key: value for key, value in found.items() if key != "date"}


def test_table_shows_what_was_left_out_and_nothing_that_moves_the_cursor() -> None:
    found = Evaluation("m\x1b", "d", None, "labels", 3, 1234, 2, 0.5, 0.75, 1.0, 32, "r", "0", "0")
    text = table(found)
    assert "1,234 (2 cannot be read)" in text
    assert "\x1b" not in text


def test_broken_images_are_named_and_fatal_unless_asked(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_images(tmp_path / "animals", {"bee": 3, "cat": 2})
    broken = folder / "bee" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200])
    options = [str(checkpoint), "--data", str(folder), "--workers", "1", "--batch-size", "2"]
    assert main(options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"nfzoo evaluate: error: {broken} ")
    assert err.endswith("; leave such images out with --skip-broken\n")
    assert err.count("\n") == 1

    assert main([*options, "--skip-broken", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["skipped"]) == (4, 1)
    assert str(broken) in caplog.text

    for image in folder.rglob("*.png"):
        image.write_bytes(b"")
    assert main([*options, "--skip-broken"]) == 2
    assert "none of the 5 images can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "arguments are required: MODEL, --data"),
        (["{model}", "--data", "/no/such/folder"], "does not exist"),
        (["/no/such/model", "--data", "{data}"], "no file or folder '/no/such/model'"),
        (["{model}", "--data", "{data}", "--size", "0"], "--size"),
        (["{model}", "--data", "{data}", "--size", "a"], "not a whole number"),
        (["{model}", "--data", "{data}", "--batch-size", "-1"], "--batch-size"),
        (["{model}", "--data", "{data}", "--workers", "²"], "not a whole number"),
        (["{model}", "--data", "{data}", "--device", "tpu9"], "'tpu9' cannot be used"),
        (["{model}", "--data", "{data}", "--date", "yesterday"], "no date"),
        (["{model}", "--data", "{data}", "--json", "{data}"], "is a folder; give a file"),
        (["{model}", "--data", "{data}", "--json", "{model}/config.json/x.json"], "cannot be written"),
        (["{model}", "--data", "{data}", "--siz", "3"], "unrecognized arguments: --siz"),
        (["{model}", "--data", "digits"], "'0', '1', '2'"),
    ],
)
def test_bad_input_ends_in_one_line(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([o.format(model=checkpoint, data=folder) for o in options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"nfzoo evaluate: error: [^\n]+\n", err)
    assert message in err


def test_damaged_weights_give_no_score(folder: Path) -> None:
    model = make_model()
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    with pytest.raises(nfzoo.CheckpointError, match="not finite"):
        evaluate(model, str(folder), workers=0)
