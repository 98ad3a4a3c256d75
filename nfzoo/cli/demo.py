"""Do the main job on the embedded digits: train, save, load, predict. `python -m nfzoo.cli.demo [FOLDER]`."""

from __future__ import annotations

import sys
from pathlib import Path

from nfzoo import from_pretrained
from nfzoo.analysis.sheets import SheetEntry, prediction_sheet, thumbnail
from nfzoo.data.digits import DIGITS, Digits
from nfzoo.data.source import open_split
from nfzoo.errors import Stopped
from nfzoo.predict import classify
from nfzoo.runtime.output import guarded
from nfzoo.train.run import TrainConfig, train
from nfzoo.train.run_folder import CURVES_FILE, METRICS_FILE

TARGET = 0.99  # held-out accuracy that the demonstration is expected to reach
_SHOWN = 8


@guarded()
def main(argv: list[str] | None = None) -> int:
    """Train `nfnet-test` on the digits and draw its predictions; return 0 if it learned to read them, else 1."""
    arguments = sys.argv[1:] if argv is None else argv
    folder = Path(arguments[0] if arguments else "runs/demo")
    try:
        result = train(TrainConfig(model="nfnet-test", data=DIGITS, output=str(folder), overwrite=True))
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.exit_status

    model = from_pretrained(folder)
    held_out = open_split(DIGITS).validation
    assert isinstance(held_out, Digits)
    pictures = [held_out[i][0] for i in range(len(held_out))]
    tops = classify(model, [model.preprocess(picture) for picture in pictures], topk=3)
    right = sum(top[0][0] == str(label) for top, label in zip(tops, held_out.labels, strict=True))
    accuracy = right / len(held_out)
    sheet = folder / "predictions.png"
    entries = [
        SheetEntry(thumbnail(picture), f"a handwritten {label}", top)
        for picture, label, top in zip(pictures[:_SHOWN], held_out.labels, tops, strict=False)
    ]
    prediction_sheet(entries, sheet, title="nfnet-test on held-out digits")

    print(f"\ntrained in {result.training_seconds:.0f} s; reloaded from {folder} with nfzoo.from_pretrained")
    print(f"the reloaded model reads {right} of {len(held_out)} held-out digits: {accuracy:.2%}")
    for title, path in (
        ("predictions", sheet),
        ("training curves", folder / CURVES_FILE),
        ("figures", folder / METRICS_FILE),
    ):
        if path.exists():
            print(f"{title + ':':<17} {path}")
    if accuracy < TARGET:
        print(f"that is less than the {TARGET:.0%} expected", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
