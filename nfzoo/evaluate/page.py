"""The page of an evaluation's report: one HTML file with its pictures in it, and without scripts."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from nfzoo.analysis.style import BLUE, INK, LIGHT_BLUE, PAGE, PAPER, QUIET, RULE
from nfzoo.evaluate.robustness import robustness_rows
from nfzoo.evaluate.scores import tells_top5
from nfzoo.runtime.output import escaped

_ALL, _LOWEST = 30, 20  # classes up to which all are shown at once, and of more, those that are

_STYLE = f"""
body {{ margin: 0; background: {PAGE}; color: {INK}; font: 15px/1.5 system-ui, sans-serif; }}
main {{ max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 0 0 .6rem; }}
p {{ margin: .5rem 0; max-width: 46rem; }}
section {{ background: {PAPER}; border: 1px solid {RULE}; border-radius: 10px; }}
section {{ padding: 1.1rem 1.3rem; margin-top: 1rem; }}
.quiet, th, summary {{ color: {QUIET}; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th {{ font-weight: 500; text-align: left; }}
th, td {{ padding: .22rem 1.3rem .22rem 0; border-bottom: 1px solid {RULE}; }}
th, td {{ max-width: 24rem; overflow-wrap: break-word; }}
th:first-child, td:first-child {{ min-width: 6rem; }}
tr:last-child td {{ border-bottom: 0; }}
td.n, th.n {{ text-align: right; white-space: nowrap; }}
img {{ display: block; max-width: 100%; max-height: 40rem; width: auto; height: auto; margin: .6rem 0; }}
img.sheet {{ max-height: none; }}
.figures {{ display: flex; flex-wrap: wrap; gap: .4rem 2.6rem; margin: .2rem 0 .8rem; }}
.figures b {{ display: block; font-size: 1.7rem; line-height: 1.2; color: {BLUE}; font-weight: 600; }}
.bar {{ display: inline-block; width: 8rem; height: .55rem; border-radius: .3rem; background: {PAGE}; }}
@media (max-width: 40rem) {{ th, td {{ padding-right: .7rem; }} .bar {{ width: 3rem; }} }}
.bar i {{ display: block; height: 100%; border-radius: .3rem; background: {LIGHT_BLUE}; }}
"""

_MEASURES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "precision": "precision, mean over classes",
    "recall": "recall, mean over classes",
    "f1": "F1, mean over classes",
    "nll": "negative log-likelihood",
    "brier": "Brier score",
}
_SHARES = ("top1", "top5", "precision", "recall", "f1")


def page(fields: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the page of a report.

    All text of it is escaped. The page asks browsers to load nothing from elsewhere, and to run nothing.

    Args:
        fields: the content of `report.json`.
        pictures: PNG files by name: see `nfzoo.evaluate.report`.
    """
    about = fields["evaluation"]
    data = about["dataset"] + (f", {about['split']}" if "split" in about else "")
    title = f"{about['model']} on {data}"
    mistakes = _mistakes(fields["mistakes"], pictures)
    sections = [
        _summary(fields),
        section("Classes", _classes(fields["classes"])),
        section("Confusion matrix", _confusions(fields["confusions"], pictures)),
        section("Calibration", _calibration(fields["calibration"], pictures)),
        *([section("Corruptions", _robustness(fields["corruptions"], pictures))] if "corruptions" in fields else []),
        section("The worst mistakes", mistakes),
        section("How it was measured", measured_how(about)),
    ]
    return document(title, sections)


def document(title: str, sections: Sequence[str]) -> str:
    """Return a page of a title and sections in HTML, which loads and runs nothing."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{in_html(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{in_html(title)}</h1>
{"".join(sections)}
</main>
</body>
</html>
"""


def in_html(value: object) -> str:
    """Return a value as text of the page, escaped."""
    shown = escaped(str(value)).encode("utf-8", "backslashreplace").decode()
    return html.escape(shown)


def section(title: str, content: str) -> str:
    """Return a section of the page; its content is in HTML."""
    return f"<section>\n<h2>{in_html(title)}</h2>\n{content}\n</section>\n"


def picture(pictures: Mapping[str, bytes], name: str, text: str, kind: str = "figure") -> str:
    """Return a picture as part of the page, with a text for those who cannot see it."""
    content = base64.b64encode(pictures[name]).decode()
    return f'<img class="{kind}" alt="{in_html(text)}" src="data:image/png;base64,{content}">'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> str:
    """Return a table of cells in HTML, of which the columns from `numbers` on are aligned to the right."""
    mark = ['<{} class="n">' if i >= numbers else "<{}>" for i in range(len(head))]
    top = "".join(f"{m.format('th')}{in_html(cell)}</th>" for m, cell in zip(mark, head, strict=True))
    lines = [
        "<tr>" + "".join(f"{m.format('td')}{cell}</td>" for m, cell in zip(mark, row, strict=True)) + "</tr>"
        for row in rows
    ]
    return f'<div class="wide"><table>\n<tr>{top}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _summary(fields: Mapping[str, Any]) -> str:
    about, metrics, drawn = fields["evaluation"], fields["metrics"], fields["bootstrap"]
    skipped = f", {about['skipped']:,} more cannot be read" if about["skipped"] else ""
    large = [
        (f"{metrics['top1']['value']:.2%}", "top-1 accuracy"),
        *([(f"{metrics['top5']['value']:.2%}", "top-5 accuracy")] if tells_top5(about["classes"]) else []),
        (f"{fields['calibration']['as_given']['ece']:.2%}", "expected calibration error"),
        (f"{about['images']:,}", f"images of {about['classes']:,} classes{skipped}"),
    ]
    figures = "".join(f"<div><b>{value}</b>{in_html(name)}</div>" for value, name in large)
    rows = []
    for name, words in _MEASURES.items():
        if name == "top5" and not tells_top5(about["classes"]):
            continue
        numbers = (metrics[name][key] for key in ("value", "low", "high"))
        value, low, high = (f"{v:.2%}" if name in _SHARES else f"{v:.4f}" for v in numbers)
        rows.append((in_html(words), value, f"{low} to {high}"))
    note = (
        f"The intervals are those of the percentile bootstrap, {drawn['resamples']:,} resamples of the images. They "
        "tell what other images of the same kind would change, and nothing of another training."
    )
    if about.get("trained_on"):
        note = f"The model was trained on most of these images: these are no held-out figures. {note}"
    interval = f"{drawn['level']:.0%} interval"
    return (
        f'<section>\n<div class="figures">{figures}</div>\n'
        f'{table(("measure", "value", interval), rows, 1)}\n<p class="quiet">{note}</p>\n</section>\n'
    )


def _classes(rows: Sequence[Mapping[str, Any]]) -> str:
    if len(rows) <= _ALL:
        return _class_table(rows)
    lowest = sorted((row for row in rows if row["support"]), key=lambda row: row["f1"])[:_LOWEST]
    return (
        f"<p>The {len(lowest)} of the lowest F1:</p>\n{_class_table(lowest)}\n"
        f"<details><summary>All {len(rows):,} classes</summary>\n{_class_table(rows)}\n</details>"
    )


def _class_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for row in rows:
        known, bar = row["support"] > 0, f'<span class="bar"><i style="width:{100 * row["f1"]:.1f}%"></i></span>'
        precision = f"{row['precision']:.1%}" if row["predicted"] else "–"
        recall, f1 = (f"{row[key]:.1%}" if known else "–" for key in ("recall", "f1"))
        counts = (f"{row[key]:,}" for key in ("support", "predicted"))
        cells.append((in_html(row["label"]), bar if known else "", precision, recall, f1, *counts))
    return table(("class", "", "precision", "recall", "F1", "images", "predicted"), cells, 2)


def _confusions(rows: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes]) -> str:
    content = picture(pictures, "confusion_matrix.png", "Predicted classes of the images of each class")
    if not rows:
        return f"{content}\n<p>All predictions are right.</p>"
    cells = [(in_html(row["label"]), in_html(row["predicted"]), f"{row['images']:,}") for row in rows]
    return f"{content}\n<p>The most frequent mistakes:</p>\n{table(('class', 'predicted', 'images'), cells, 2)}"


def _calibration(found: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    rows = [_calibration_row(f"as given, temperature {found['as_given']['temperature']:.4g}", found["as_given"])]
    if found["cross_fitted"]:
        halves = " and ".join(f"{value:.4g}" for value in found["cross_fitted"]["temperatures"])
        rows.append(_calibration_row(f"cross-fitted, temperatures {halves}", found["cross_fitted"]))
    head = ("probabilities", "ECE", "greatest error of a bin", "NLL", "Brier score")
    if found["temperature"] is None:
        text = (
            "No temperature fits: all predictions are right, or they are no better than chance, and the likelihood has "
            "no maximum."
        )
    else:
        text = (
            f"The temperature {found['temperature']:.4g} minimises the negative log-likelihood of all these images. "
            "Measured on the same images it would look too good. "
        )
        text += (
            "So the figures of the second row are cross-fitted: each half of the images is measured with the "
            "temperature that fits the other half."
            if found["cross_fitted"]
            else "No other figures are given, as one half of the images alone has no such temperature."
        )
    bins = len(found["as_given"]["bins"])
    meaning = (
        "The expected calibration error (ECE) is the mean difference of accuracy and confidence over "
        f"{bins} bins of equal width."
    )
    drawn = picture(pictures, "reliability.png", "Accuracy by confidence")
    return f'{drawn}\n{table(head, rows, 1)}\n<p>{in_html(text)}</p>\n<p class="quiet">{meaning}</p>'


def _calibration_row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    return (in_html(name), f"{found['ece']:.2%}", f"{found['mce']:.2%}", f"{found['nll']:.4f}", f"{found['brier']:.4f}")


def _robustness(found: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    head, *rows = robustness_rows(found)
    cells = [tuple(map(in_html, row)) for row in rows]
    meanings = []
    for name, meaning in found["meaning"].items():
        strengths = (f"{row['strength']:g}" for row in found["rows"] if row["corruption"] == name)
        meanings.append(f"{name.replace('_', ' ')}: {', '.join(strengths)} ({meaning})")
    note = (
        "Inputs are corrupted at severities 1 to 5, with the constants of ImageNet-C but for rotation. "
        f"{'; '.join(meanings)}."
    )
    drawn = picture(pictures, "corruptions.png", "Accuracy by severity of corruptions")
    return f'{drawn}\n{table(head, cells, 1)}\n<p class="quiet">{in_html(note)}</p>'


def _mistakes(rows: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes]) -> str:
    if not rows:
        return "<p>There are none: all predictions are right.</p>"
    cells = [
        (
            in_html(row["image"]),
            in_html(row["label"]),
            f"{row['probability']:.1%}",
            in_html(row["predicted"]),
            f"{row['confidence']:.1%}",
            f"{row['loss']:.2f}",
        )
        for row in rows
    ]
    head = ("image", "class", "probability", "predicted", "probability", "loss")
    return (
        f"<p>The {len(rows)} wrong predictions of the greatest loss.</p>\n"
        f"{picture(pictures, 'mistakes.png', 'Images of the worst mistakes', 'sheet')}\n"
        f"<details><summary>As a table</summary>\n{table(head, cells, 2)}\n</details>"
    )


def measured_how(about: Mapping[str, Any]) -> str:
    """Return the circumstances of an evaluation as a table in HTML."""
    rows = [
        ("input", f"{about['size']} x {about['size']} pixels ({about['resize']})"),
        ("classes matched by", about["matched_by"]),
        ("loss of the logits", f"{about['loss']:.4f}"),
        ("versions", f"nfzoo {about['nfzoo']}, torch {about['torch']}"),
        *((("date", about["date"]),) if "date" in about else ()),
    ]
    cells = "\n".join(f"<tr><th>{in_html(name)}</th><td>{in_html(value)}</td></tr>" for name, value in rows)
    return f"<table>\n{cells}\n</table>"
