"""Fine-tuning on small data: what AGC costs the classifier's bias, which rates are smooth, what frozen parts save.

    python -m benchmarks.claims.fine_tuning bias  --output benchmarks/results
    python -m benchmarks.claims.fine_tuning rates --output benchmarks/results
    python -m benchmarks.claims.fine_tuning cost  --output benchmarks/results

A small NFNet is trained on the digits 0 to 4 and then fine-tuned by `nfzoo train` on small data that it has not seen:

- *few*: the digits 5 to 9, 20 images of each for training;
- *unbalanced*: the digits 5 to 9 with 120, 60, 30, 15 and 8 images;
- *patches*: crops of two photographs, 180 of one and 60 of the other.

The held-out images are 40 of each digit, and 50 crops of each photograph's other half. Figures in proportion to the
classes of the training data are computed from those of each class.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.report import machine
from nfzoo import create, from_pretrained, variants
from nfzoo.analysis.style import BLUE, INK, ORANGE, PAPER, QUIET, RULE
from nfzoo.checkpoint.atomic import replaced
from nfzoo.checkpoint.model_folder import Description
from nfzoo.data.source import open_all, open_split
from nfzoo.model import init
from nfzoo.nn import NFNet
from nfzoo.optim.fine_tuning import freeze_
from nfzoo.optim.sgd import sgd, sgd_init, warmup_cosine
from nfzoo.train.config import recipes
from nfzoo.train.run import train

SIDE = 16  # pixels
COUNTS = {
    "few": dict.fromkeys("56789", 20),
    "unbalanced": dict(zip("56789", (120, 60, 30, 15, 8), strict=True)),
    "patches": {"china": 180, "flower": 60},
}
BATCHES = {"few": 16, "unbalanced": 32, "patches": 32}
LENGTHS = (2, 5, 15)  # epochs
SEEDS = (0, 1, 2)
COMMON = ["--train-size", str(SIDE), "--test-size", str(SIDE), "--workers", "0", "--mixed-precision", "no"]
COMMON += ["--augment.scale", "[0.7,1.0]", "--augment.ratio", "[0.85,1.18]", "--augment.flip", "0"]


# ---------------------------------------------------------------- data


def write_digits(folder: Path, train: Mapping[str, int], held_out: int) -> None:
    """Write so many images of each digit for training, and others to test on."""
    source = open_all("digits")
    for label, count in train.items():
        places = np.flatnonzero(np.asarray(source.labels) == int(label))
        for part, chosen in (("val", places[:held_out]), ("train", places[held_out : held_out + count])):
            (folder / part / label).mkdir(parents=True)
            for i in chosen:
                source[int(i)][0].save(folder / part / label / f"{i:04}.png")


def write_patches(folder: Path, train: Mapping[str, int], held_out: int) -> None:
    """Write crops of 32 x 32 pixels, for training from the left halves of the photographs."""
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(0)
    for name, count in train.items():
        pixels = load_sample_image(f"{name}.jpg")
        half = pixels.shape[1] // 2
        for part, number, side in (("train", count, pixels[:, :half]), ("val", held_out, pixels[:, half:])):
            (folder / part / name).mkdir(parents=True)
            for i in range(number):
                y, x = rng.integers(0, side.shape[0] - 32), rng.integers(0, side.shape[1] - 32)
                Image.fromarray(side[y : y + 32, x : x + 32]).save(folder / part / name / f"{i:04}.png")


def write_data(folder: Path) -> None:
    """Write the three data sets, and the digits 0 to 4 to train on first."""
    for name in ("few", "unbalanced"):
        write_digits(folder / name, COUNTS[name], 40)
    write_patches(folder / "patches", COUNTS["patches"], 50)
    write_digits(folder / "first", dict.fromkeys("01234", 120), 40)


# ---------------------------------------------------------------- runs


def run(options: Sequence[str], output: Path) -> list[dict[str, Any]]:
    """Train without a word; return the figures of all epochs."""
    config = recipes.parse([*options, *COMMON, "--output", str(output)])
    with mock.patch("nfzoo.train.run_folder.training_curves"), contextlib.redirect_stdout(io.StringIO()):
        train(config)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def first_model(folder: Path) -> None:
    """Train the model that is fine-tuned later."""
    options = ["--model", "nfnet-test", "--data", str(folder / "first"), "--epochs", "12", "--optim.ema-decay", "0.99"]
    rows = run(options, folder / "model")
    # The same with as many features as nfnet-f0 has: twelve times as many.
    variant = variants.variant("nfnet-test")
    config = variant.config.replace(head_ratio=24.0, num_classes=5)
    params = init(config, generator=torch.Generator().manual_seed(0))
    NFNet.from_params(Description(config, variant.preprocessing), params).save_pretrained(folder / "wide-start")
    options[1] = str(folder / "wide-start")
    run([*options, "--optim.lr", "0.05"], folder / "wide")
    print(f"trained on the digits 0 to 4: {rows[-1]['ema_accuracy']:.1%} of the held-out ones")


def fine_tune(folder: Path, data: str, seed: int, *options: str) -> tuple[list[dict[str, Any]], Path]:
    """Fine-tune the model on one of the data sets; return the figures, and the folder, which the next call uses too."""
    output = folder / "tuned"
    settings = ["--model", str(folder / "model"), "--data", str(folder / data), "--seed", str(seed)]
    rows = run([*options, *settings, "--batch-size", str(BATCHES[data]), "--overwrite", "true"], output)
    return rows, output


def by_prior(folder: Path, data: str, output: Path) -> dict[str, float]:
    """Return the loss and accuracy of a model with classes weighted as in the training data, and its bias's norm."""
    model = from_pretrained(output).eval()
    held_out = open_split(str(folder / data)).validation
    images = torch.stack([model.preprocess(held_out[i][0]) for i in range(len(held_out))])
    labels = torch.tensor(np.asarray(held_out.labels))
    with torch.no_grad():
        logits = model(images)
    counts = torch.tensor([float(COUNTS[data][name]) for name in held_out.classes])
    weights = (counts / counts.sum() / torch.bincount(labels, minlength=len(counts)))[labels]
    right = (logits.argmax(1) == labels).float()
    recalls = [float(right[labels == i].mean()) for i in range(len(counts))]
    return {
        "loss": float((weights * F.cross_entropy(logits, labels, reduction="none")).sum()),
        "accuracy": float((weights * right).sum()),
        "balanced": float(np.mean(recalls)),
        "bias": float(model.get_parameter("head.bias").detach().norm()),
    }


# ---------------------------------------------------------------- the bias


BIAS_RUNS = {
    "head": ["--recipe", "head", "--optim.lr", "0.01", "--optim.clip", "0.16"],
    "all": ["--recipe", "nfnet-f0-finetune"],
}


def bias_runs(folder: Path) -> list[dict[str, Any]]:
    """Fine-tune with the bias under AGC and without, for every part, length and seed."""
    found = []
    for (tune, options), epochs, seed, clipped in itertools.product(BIAS_RUNS.items(), LENGTHS, SEEDS, (True, False)):
        settings = [*options, "--epochs", str(epochs), "--optim.clip-head-bias", str(clipped).lower()]
        rows, output = fine_tune(folder, "unbalanced", seed, *settings)
        row = {
            "tune": tune,
            "epochs": epochs,
            "seed": seed,
            "clipped": clipped,
            **by_prior(folder, "unbalanced", output),
        }
        found.append({**row, "train_loss": rows[-1]["train_loss"], "steps": rows[-1]["step"]})
        print(json.dumps(found[-1]), flush=True)
    return found


def bias_page(found: Sequence[Mapping[str, Any]], command: str) -> str:
    """Return the result as Markdown."""
    lines = [
        "| trained | epochs | steps | loss, clipped | exempt | difference (each seed) | accuracy, clipped | exempt | "
        "balanced accuracy, clipped | exempt | norm of the bias, clipped | exempt |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for tune, epochs in itertools.product(BIAS_RUNS, LENGTHS):
        some = [row for row in found if (row["tune"], row["epochs"]) == (tune, epochs)]
        two = [[row for row in some if row["clipped"] is clipped] for clipped in (True, False)]

        def mean(key: str, two: list[list[Mapping[str, Any]]] = two) -> list[float]:
            return [float(np.mean([row[key] for row in rows])) for rows in two]

        each = ", ".join(f"{b['loss'] - a['loss']:+.3f}" for a, b in zip(*two, strict=True))
        cells = [f"{value:.3f}" for value in mean("loss")] + [each]
        cells += [f"{100 * value:.1f} %" for key in ("accuracy", "balanced") for value in mean(key)]
        cells += [f"{value:.4f}" for value in mean("bias")]
        lines.append(f"| {tune} | {epochs} | {some[0]['steps']} | " + " | ".join(cells) + " |")
    return BIAS_PAGE.format(table="\n".join(lines), machine=machine(), command=command, reading=BIAS_READING)


# Written after the run of 2026-11-28; another run's figures need another reading.
BIAS_READING = """**It costs nothing that these runs show.** With the classifier alone, an exempt bias lowers the loss
by 0.005 in two epochs, which are 14 steps, and changes it by no more than 0.002 later. With all weights it raises the
loss by 0.002 to 0.006. The accuracies differ by an image or two of 200. An exempt bias does learn something: its norm
reaches 0.1 to 0.3. But the pooled features have a mean of their own, half of their mean square here, and the
classifier's weight, which AGC never clips, learns the classes' frequencies along it. The recipes therefore keep
DeepMind's rule. `head` has no threshold at all, as of the classifier alone only the bias would be clipped.
`--optim.clip-head-bias false` exempts it elsewhere."""
BIAS_PAGE = """# The classifier's bias under AGC, in short fine-tunings

AGC limits a unit's gradient to its threshold times the norm of its weights, of which the floor is 0.001. A new
classifier's bias begins at zero and is one unit. At the threshold of 0.16 its gradient is therefore cut to a norm of
0.00016 as long as its own norm is below 0.001. DeepMind's rule clips it so, in runs of a hundred thousand steps. Here
it is short fine-tunings on unbalanced data, where a bias has something to learn: the classes' frequencies.

- data: *unbalanced*, the digits 5 to 9 with 120, 60, 30, 15 and 8 images; held out are 40 of each. Loss and accuracy
  are those of held-out images in proportion to the classes of the training data; the balanced accuracy is the mean
  over the classes.
- model: `nfnet-test`, trained on the digits 0 to 4, with a new classifier
- *head*: the recipe `head` at a rate of 0.01 and a threshold of 0.16; *all*: the recipe `nfnet-f0-finetune`, which
  has the same rate and threshold. Batches of 32, means of three seeds; the differences are those of each seed, exempt
  minus clipped.
- on: {machine}
- command: `{command}`

{table}

{reading}
"""


# ---------------------------------------------------------------- the rates


RATE_RUNS = {"head": ["--recipe", "head"], "all": ["--recipe", "nfnet-f0-finetune"]}
RATES = {"head": (0.1, 0.03, 0.01, 0.003), "all": (0.1, 0.03, 0.01)}
RATE_SEEDS = (0, 1)
RATE_EPOCHS = 10


def rate_runs(folder: Path) -> list[dict[str, Any]]:
    """Fine-tune at every rate, on every data set, with every seed; keep the losses of all epochs."""
    found = []
    for tune, data in itertools.product(RATE_RUNS, COUNTS):
        for lr, seed in itertools.product(RATES[tune], RATE_SEEDS):
            settings = [*RATE_RUNS[tune], "--optim.lr", str(lr), "--epochs", str(RATE_EPOCHS)]
            rows, _ = fine_tune(folder, data, seed, *settings, "--optim.ema-decay", "null")
            figures = {key: [row[key] for row in rows] for key in ("train_loss", "loss", "accuracy")}
            found.append({"tune": tune, "data": data, "lr": lr, "seed": seed, **figures})
            last = {key: round(value[-1], 3) for key, value in figures.items()}
            print(json.dumps({**found[-1], **last}), flush=True)
    return found


def rise(losses: Sequence[float]) -> float:
    """Return by how much a curve of losses lies above its lowest point before, at most."""
    lowest, most = math.inf, 0.0
    for loss in losses:
        lowest = min(lowest, loss)
        most = max(most, loss - lowest)
    return most


def features_of(network: Any, folder: Path, data: str, side: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pooled features of a data set's parts, "train" and "validation", with the labels."""
    found = {}
    for part, images in open_split(str(folder / data))._asdict().items():
        with torch.inference_mode():
            batch = torch.stack([network.preprocess(images[i][0], size=side) for i in range(len(images))])
            features = torch.cat([network.embed(some) for some in batch.split(20)])
        found[part] = features.clone(), torch.tensor(np.asarray(images.labels))
    return found


def largest_rate(features: Tensor, classes: int) -> tuple[float, float]:
    """Return the largest eigenvalue of the features' second moments, and the rate above which a classifier diverges.

    The curvature of the cross-entropy along that direction is its eigenvalue divided by the number of classes, where
    all are equally likely, as at the beginning. Nesterov momentum m is stable on a curvature c up to the rate
    `2 (1 + m) / (1 + 2 m) / c`.
    """
    eigenvalue = float(torch.linalg.matrix_norm(features, 2).square() / len(features))
    return eigenvalue, 2 * 1.9 / 2.8 / eigenvalue * classes


def classifier_alone(
    parts: Mapping[str, tuple[Tensor, Tensor]], classes: int, lr: float, seed: int
) -> tuple[list[float], list[float]]:
    """Train a classifier of fixed features as the recipe `head` does.

    Return the losses on the training and on the held-out images after each epoch.
    """
    x, y = parts["train"]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, x.shape[1], generator=generator) * 0.01  # as `init` draws it
    params = {"w": weight, "b": torch.zeros(classes)}
    state, batch = sgd_init(params), 32
    losses: tuple[list[float], list[float]] = [], []
    steps, order = len(x) // batch, torch.arange(len(x))
    for step in range(RATE_EPOCHS * steps):
        if step % steps == 0:
            order = torch.randperm(len(x), generator=generator)
        chosen = order[step % steps * batch :][:batch]
        leaves = {name: p.requires_grad_() for name, p in params.items()}
        loss = F.cross_entropy(x[chosen] @ leaves["w"].T + leaves["b"], y[chosen], label_smoothing=0.1)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        rate = warmup_cosine(step, peak=lr, warmup=steps, total=RATE_EPOCHS * steps)
        with torch.no_grad():
            params, state = sgd(params, grads, state, lr=rate)
            if step % steps == steps - 1:
                for kept, (features, labels) in zip(losses, parts.values(), strict=True):
                    kept.append(float(F.cross_entropy(features @ params["w"].T + params["b"], labels)))
    return losses


def draw_rates(found: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Draw the held-out losses by epoch: a row of panels for each recipe, a panel for each data set."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 6.2), dpi=140, layout="constrained", facecolor=PAPER)
    colours = dict(zip((0.1, 0.03, 0.01, 0.003), ("#b3261e", ORANGE, BLUE, QUIET), strict=True))
    panels: Any = figure.subplots(len(RATE_RUNS), len(COUNTS), sharey="row", sharex=True)
    with mpl.rc_context({"font.size": 9}):
        for (r, tune), (c, data) in itertools.product(enumerate(RATE_RUNS), enumerate(COUNTS)):
            axes = panels[r, c]
            for row in (row for row in found if (row["tune"], row["data"]) == (tune, data)):
                label = f"rate {row['lr']:g}" if row["seed"] == RATE_SEEDS[0] else None
                x = range(1, len(row["loss"]) + 1)
                axes.plot(x, row["loss"], color=colours[row["lr"]], label=label, linewidth=1.6, alpha=0.85)
            axes.set_title(f"{TITLES[tune]}; {data}", fontsize=10, color=INK)
            axes.grid(color=RULE, linewidth=0.6)
            for spine in axes.spines.values():
                spine.set_visible(False)
            axes.tick_params(colors=QUIET, length=0)
            if c == 0:
                axes.set_ylabel("held-out loss", color=QUIET)
            if r + 1 == len(RATE_RUNS):
                axes.set_xlabel("epoch", color=QUIET)
        handles = {line.get_label(): line for line in panels[0, 0].get_lines() if line.get_label()[0] != "_"}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    with replaced(output) as scratch:
        figure.savefig(scratch, format="png")


TITLES = {"head": "classifier alone", "all": "all weights"}


def rates_page(found: Sequence[Mapping[str, Any]], limits: Sequence[Sequence[str]], command: str) -> str:
    """Return the result as Markdown."""
    lines = ["| trained | data | rate | lowest loss | last loss | largest rise | last accuracy |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for tune, data in itertools.product(RATE_RUNS, COUNTS):
        for lr in RATES[tune]:
            some = [row for row in found if (row["tune"], row["data"], row["lr"]) == (tune, data, lr)]
            figures = [
                *(f"{np.mean([pick(row['loss']) for row in some]):.3f}" for pick in (min, lambda losses: losses[-1])),
                f"{max(rise(row['loss']) for row in some):.3f}",
                f"{100 * np.mean([row['accuracy'][-1] for row in some]):.1f} %",
            ]
            lines.append(f"| {TITLES[tune]} | {data} | {lr:g} | " + " | ".join(figures) + " |")
    table = [
        "| features | data | largest eigenvalue | largest rate | "
        + " | ".join(f"at {r:g}" for r in RATES["head"])
        + " |"
    ]
    table += ["| ---: | --- | ---: | ---: |" + " ---: |" * len(RATES["head"])]
    table += ["| " + " | ".join(row) + " |" for row in limits]
    return RATES_PAGE.format(
        table="\n".join(lines),
        limits="\n".join(table),
        machine=machine(),
        command=command,
        reading=RATES_READING,
        epochs=RATE_EPOCHS,
    )


# Written after the run of 2026-11-28; another run's figures need another reading.
RATES_READING = """**The recipe `head` has a rate of 0.03, and those that tune all weights stay at 0.01.** With the
classifier alone, 0.1 rises by up to 0.20, on the unbalanced data, and 0.03 by at most 0.07. Lower rates gain no
smoothness and end higher. The rise of 0.33 at 0.01 is between the first two epochs, when the classifier learns the
frequencies of the unbalanced classes, which the held-out images do not have. With all weights, 0.1 rises by up to
0.53, 0.03 by up to 0.24, and 0.01 by at most 0.11. On these data 0.03 ends lower than 0.01; who can watch the curves
may try it."""
RATES_PAGE = """# Rates of the fine-tuning recipes on small data

Curves of the held-out loss that `nfzoo train` measures after each epoch, without a moving average, for the recipes
`head` and `nfnet-f0-finetune` at other rates. A rate is smooth where the loss does not rise by more than
about a tenth above its lowest point before.

- data: *few*, 100 images of five digits; *unbalanced*, 233 images of the same, 120 to 8 of each; *patches*, 180 and
  60 crops of two photographs. Held out are 40 of each digit, 50 of each photograph.
- model: `nfnet-test`, trained on the digits 0 to 4, with a new classifier; two seeds, {epochs} epochs, batches of 16
  (*few*) and 32
- on: {machine}
- command: `{command}`

![curves](fine-tuning-rates.png)

{reading}

{table}

The rise is the largest of the seeds', the other columns are their means.

## How far this carries to larger networks

A linear classifier's gradient descent diverges above a rate that its features set: the table has the largest
eigenvalue of their second moments, and the largest stable rate for Nesterov momentum 0.9 where all classes are
equally likely, as at the beginning. 3072 features are those of `nfnet-test` with a final convolution as wide as that
of `nfnet-f0`, trained in the same way. For each rate stand the last held-out loss of a classifier of fixed features,
and the largest rise of its training loss (ten epochs, batches of 32, no augmentation, three seeds).

{limits}

The lowest of these rates is 0.060, so 0.03 leaves a factor of two. None of these networks is `nfnet-f0` with
DeepMind's weights, which could not be reached: where the loss of `head` rises there, pass `--optim.lr 0.01`.
"""


# ---------------------------------------------------------------- the cost


def cost_page(command: str, *, model: str = "nfnet-f0", batch: int = 4, side: int = 96, rounds: int = 5) -> str:
    """Time the forward and backward pass with parts of a network frozen; return the result as Markdown."""
    network = create(model, num_classes=10).train()
    images, labels = torch.randn(batch, 3, side, side), torch.arange(batch) % 10

    def step() -> None:
        network.zero_grad()
        F.cross_entropy(network(images), labels).backward()

    parts = ("all", "stages:2", "stages:1", "head")
    seconds: dict[str, list[float]] = {part: [] for part in parts}
    step()
    for part in parts * rounds:  # in turn
        freeze_(network, part)
        began = time.process_time()
        step()
        seconds[part].append(time.process_time() - began)
    lines = ["| `--tune` | processor time | of all |", "| --- | ---: | ---: |"]
    for part in parts:
        spent, of_all = float(np.median(seconds[part])), float(np.median(seconds["all"]))
        lines.append(f"| {part} | {spent:.2f} s | {spent / of_all:.2f} |")
    return f"""# What a step costs with parts of a network frozen

Forward and backward pass of {model} for {batch} images of {side} x {side} pixels, in float32 on one core. The backward
pass ends below the lowest part that is trained. The forward pass is the same for all. Processor times are medians of
{rounds} rounds in turn.

- on: {machine()}
- command: `{command}`

{chr(10).join(lines)}
"""


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    """Run one of the experiments, and write its page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.fine_tuning", allow_abbrev=False)
    parser.add_argument("experiment", choices=("bias", "rates", "cost"))
    parser.add_argument("--output", type=Path, default=Path("runs/fine-tuning"), metavar="FOLDER")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    command = f"python -m benchmarks.claims.fine_tuning {options.experiment} --output {options.output}"
    options.output.mkdir(parents=True, exist_ok=True)
    if options.experiment == "cost":
        write(options.output, "fine-tuning-cost", cost_page(command))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(folder)
        first_model(folder)
        if options.experiment == "bias":
            write(options.output, "fine-tuning-bias", bias_page(bias_runs(folder), command))
        else:
            found = rate_runs(folder)
            draw_rates(found, options.output / "fine-tuning-rates.png")
            write(options.output, "fine-tuning-rates", rates_page(found, limits(folder), command))
    return 0


def limits(folder: Path) -> list[list[str]]:
    """Return the rows of the table of largest rates, and what a classifier of fixed features does at each rate."""
    rows = []
    for name, data in itertools.product(("model", "wide"), COUNTS):
        network = from_pretrained(folder / name).eval()
        classes, parts = len(COUNTS[data]), features_of(network, folder, data, SIDE)
        features = parts["train"][0]
        eigenvalue, rate = largest_rate(features, classes)
        cells = []
        for lr in RATES["head"]:
            runs = [classifier_alone(parts, classes, lr, seed) for seed in SEEDS]
            cells.append(f"{np.mean([test[-1] for _, test in runs]):.2f}; {max(rise(train) for train, _ in runs):.2f}")
        rows.append([str(features.shape[1]), data, f"{eigenvalue:.0f}", f"{rate:.3f}", *cells])
        print(rows[-1], flush=True)
    return rows


def write(folder: Path, name: str, text: str) -> None:
    with replaced(folder / f"{name}.md") as scratch:
        scratch.write_text(text, encoding="utf-8")
    print(f"wrote {folder / name}.md")


if __name__ == "__main__":
    sys.exit(main())
