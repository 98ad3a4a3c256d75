"""Write result pages: what a suite is given and returns, the machine, tables, the plot of accuracy against latency."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.contenders import Work
from nfzoo.checkpoint.atomic import replaced

RESULTS = Path(__file__).resolve().parent / "results"


class Options(NamedTuple):
    """Hold what the command line chose; `None` leaves it to the suite."""

    work: Work
    models: list[str] | None = None
    batches: list[int] | None = None
    size: int | None = None
    rounds: int = 9
    compiled: bool = True
    quick: bool = False
    plot: Path | None = None

    @property
    def gpu(self) -> bool:
        return self.work.device.type != "cpu"


class Table(NamedTuple):
    """Hold a titled table and a note on it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        cells = [list(self.header), *[list(row) for row in self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.header))]
        lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
        lines.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
        return "\n".join([f"## {self.title}", "", *lines, *(["", self.note] if self.note else [])])


Page = tuple[str, Sequence[Table], Sequence[str]]
"""Title, tables, notes: what a suite returns."""


def publish(text: str, output: Path | None, name: str) -> None:
    """Print a page, and write it to the file `name` in the folder `output` if there is one."""
    print(text, end="")
    if output is not None:
        with replaced(output / name) as scratch:
            scratch.write_text(text, encoding="utf-8")


def machine() -> str:
    """Return one line: processor, threads, system, versions."""
    return (
        f"{processor()}, {os.cpu_count()} cores visible, {torch.get_num_threads()} used; {platform.system()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def processor() -> str:
    """Return the processor's own name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def number(value: float, digits: int = 3) -> str:
    """Format three significant digits, without an exponent."""
    return f"{value:.{max(0, digits - len(str(int(abs(value)))))}f}" if abs(value) >= 1 else f"{value:.{digits}f}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def page(title: str, command: str, device: torch.device, tables: Sequence[Table], notes: Sequence[str] = ()) -> str:
    versions = [f"{n} {importlib.metadata.version(n)}" for n in ("timm", "triton") if importlib.util.find_spec(n)]
    hardware = machine() if device.type == "cpu" else f"{device_name(device)}; {machine()}; CUDA {torch.version.cuda}"
    head = [
        f"# {title}",
        "",
        f"{datetime.date.today()}, {hardware}{''.join(', ' + v for v in versions)}.",
        "",
        f"    {command}",
        "",
        "Contenders ran in turn in one process. Ratios are medians over the rounds of ratios within a round.",
    ]
    return "\n".join([*head, *[f"\n{note}" for note in notes], *[f"\n{t.markdown()}" for t in tables], ""])


def write(text: str, name: str, device: torch.device, folder: Path = RESULTS) -> Path:
    """Write `DATE-DEVICE-NAME.md`."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.date.today()}-{slug}-{name}.md"
    path.write_text(text, encoding="utf-8")
    return path


class Point(NamedTuple):
    """Hold one model of the plot: a series, a label, seconds an image, ImageNet top-1 in percent as published."""

    series: str
    label: str
    seconds: float
    accuracy: float


def plot(points: Sequence[Point], path: Path, *, xlabel: str) -> Path | None:
    """Plot published accuracy against measured latency, as figure 1 of arXiv 2102.06171; `None` without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.6), dpi=150, layout="constrained")
    markers = {"nfzoo NFNet": ("o", "#0b5fa5"), "timm NFNet": ("s", "#8a8a8a"), "timm EfficientNet": ("^", "#c0562b")}
    for series in dict.fromkeys(p.series for p in points):
        found = sorted((p for p in points if p.series == series), key=lambda p: p.seconds)
        marker, colour = markers.get(series, ("o", None))
        axes.plot([p.seconds for p in found], [p.accuracy for p in found], marker, ls="-", color=colour, label=series)
        for p in found:
            if series != "timm NFNet":
                below = series == "timm EfficientNet"
                offset = (5, -11) if below else (-5, 6)
                axes.annotate(
                    p.label,
                    (p.seconds, p.accuracy),
                    offset,
                    textcoords="offset points",
                    fontsize=8,
                    color=colour,
                    ha="left" if below else "right",
                )
    axes.set_xscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel("ImageNet top-1 as published, %")
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.legend(frameon=False, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
