"""nfzoo, timm and what the machine could do at best, side by side.

    python benchmarks/run.py inference                # latency and throughput, and the plot
    python benchmarks/run.py training                 # forward, backward, AGC, SGD, moving average
    python benchmarks/run.py compile                  # seconds from nothing to the first result
    python benchmarks/run.py optimizer                # AGC, SGD and moving average alone
    python benchmarks/run.py memory                   # what a training step needs, with and without checkpointing
    python benchmarks/run.py headline                 # NFNet-F1 at 224 against EfficientNet-B7 at 600
    python benchmarks/run.py layout                   # NCHW or channels last
    python benchmarks/run.py shell                    # what the nn.Module adds to the pure function
    python benchmarks/run.py boundary                 # what it costs that a graph ends with each block
    python benchmarks/run.py grouped                  # the grouped 3x3 convolutions in several ways
    python benchmarks/run.py profile                  # where a training step spends its time
    python benchmarks/run.py optimize                 # the fastest ways on a CPU, and those of other runtimes
    python benchmarks/run.py all                      # all of them; --budget 600 ends after so many seconds

Needs torch >= 2.11, timm, Pillow and safetensors, and nfzoo's sources beside this folder; nothing is installed. Results
go to `benchmarks/results/`; `--quick` runs small shapes, to see that everything works, and `--no-write` keeps no page.
"""

from __future__ import annotations

import argparse
import faulthandler
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import nfzoo  # noqa: E402

if not hasattr(nfzoo, "__path__") or str(ROOT) not in nfzoo.__path__:
    nfzoo.__path__.append(str(ROOT))  # hub/ and conversion/ beside nfzoo/ are nfzoo.hub and nfzoo.conversion

from benchmarks import everything, peer, report, timing  # noqa: E402
from benchmarks.contenders import Work  # noqa: E402
from benchmarks.report import Options  # noqa: E402
from benchmarks.suites.against_timm import SUITES  # noqa: E402

MODELS = ("nfnet-f0", "nfnet-f1", "nfnet-f3", "nfnet-f5")
SHARED = "Times are processor time on one machine with other programs, not wall-clock; `compile` states both."


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks/run.py", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("suite", choices=[*SUITES, "all"])
    made.add_argument("--device", help="cuda where there is one, otherwise cpu")
    made.add_argument("--dtype", choices=timing.DTYPES, help="bfloat16 on a GPU, float32 on a CPU")
    made.add_argument("--models", nargs="+", help="variants of the zoo")
    made.add_argument("--batch", type=int, nargs="+", help="batch sizes; 0 is the largest power of two that fits")
    made.add_argument("--size", type=int, help="height and width of images; the paper's by default")
    made.add_argument("--rounds", type=int, help="how often the contenders take turns")
    made.add_argument("--threads", type=int, help="of the CPU")
    made.add_argument("--processor-time", action="store_true", help="not wall-clock: for a CPU that others use too")
    made.add_argument(
        "--channels-last", action="store_true", help="for both sides; not in training, where nfzoo.train chooses"
    )
    made.add_argument("--eager", action="store_true", help="leave out what has to be compiled")
    made.add_argument("--quick", action="store_true", help="small shapes: a check, not a result")
    made.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the result pages")
    made.add_argument("--label", help="at the end of the result page's name")
    made.add_argument("--budget", type=float, help="of `all`: seconds after which nothing is started or goes on")
    made.add_argument("--no-write", action="store_true", help="print only")
    return made


def _shared(given: list[str]) -> list[str]:
    """The options that every process of `all` is given: without the suite, the models, and what is for `all`."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("suite")
    own.add_argument("--models", nargs="+")
    own.add_argument("--budget")
    own.add_argument("--label")
    return own.parse_known_args(given)[1]


def main(argv: list[str] | None = None) -> int:
    """Status 0; 1 where `all` was not done with all; 2 for what cannot be run here."""
    args = parser().parse_args(argv)
    if args.suite == "all":
        given = list(sys.argv[1:] if argv is None else argv)
        return everything.run(args.models or MODELS, _shared(given), budget=args.budget)
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        print(f"benchmarks/run.py: error: the device {name!r} cannot be used here: {error}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.processor_time:
        timing.count_processor_time()
    dtype = timing.DTYPES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    options = Options(
        work=Work(device, dtype, args.channels_last),
        models=args.models,
        batches=args.batch,
        size=args.size,
        rounds=args.rounds or (3 if args.quick else 9),
        compiled=not args.eager,
        quick=args.quick,
        plot=None if args.no_write else args.output,
    )
    if peer.timm() is None:
        print("timm is not installed: nfzoo is measured alone", file=sys.stderr)
    title, tables, notes = SUITES[args.suite](options)
    if args.processor_time:
        notes = [*notes, SHARED]
    command = "python benchmarks/run.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    text = report.page(title, command, device, tables, notes)
    print(text)
    if not args.no_write:
        label = f"{args.suite}-{args.label}" if args.label else args.suite
        print(f"wrote {report.write(text, label, device, args.output)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    faulthandler.enable()  # says where a contender brings the process down
    sys.exit(main())
