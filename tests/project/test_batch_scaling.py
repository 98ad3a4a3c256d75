"""The benchmark like figure 2 of the paper: its data, which runs it chooses, and what its page says of them."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.claims import batch_scaling, batch_scaling_page, stability
from benchmarks.claims.batch_scaling import CPU, FULL, LINES, TWIN, Result, Spec, Study
from benchmarks.claims.stacked_runs import Data, Ended
from benchmarks.report import processor
from nfzoo.errors import DataError

STUDY = Study((8, 32), (0, 1), 1, {name: LINES[name] for name in ("no clipping", "AGC", TWIN)}, True, (), None)


def pixels(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def labels(count: int) -> np.ndarray:
    return (np.arange(count) % 10).astype(np.uint8)


def write_npz(path: Path) -> Path:
    np.savez(path, x_train=pixels(1, 40), y_train=labels(40), x_test=pixels(2, 20), y_test=labels(20))
    return path


def write_idx(folder: Path) -> Path:
    folder.mkdir()
    for part, seed, count in (("train", 1, 40), ("t10k", 2, 20)):
        for name, array in (("images-idx3", pixels(seed, count)), ("labels-idx1", labels(count))):
            header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    return folder


def test_a_folder_and_an_npz_give_the_same_images(tmp_path: Path) -> None:
    first = batch_scaling.read_data(str(write_npz(tmp_path / "a.npz")))
    second = batch_scaling.read_data(str(write_idx(tmp_path / "idx")))
    for (x, y), (other, known) in zip(first, second, strict=True):
        assert torch.equal(x, other)
        assert torch.equal(y, known)
    assert first.train[0].shape == (40, 1, 14, 14)
    grey = torch.from_numpy(pixels(1, 40)).float()
    pooled = grey.reshape(40, 14, 2, 14, 2).mean((2, 4))
    expected = (pooled - pooled.mean()) / pooled.std()
    assert torch.allclose(first.train[0][:, 0], expected, atol=1e-5)


def test_other_data_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "few.npz", x_train=pixels(1, 4))
    for name in ("absent", "empty", "bad.npz", "few.npz", "absent.npz"):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            batch_scaling.read_data(str(tmp_path / name))
    assert stability.main(["--data", str(tmp_path / "absent"), "--output", str(tmp_path)]) == 2
    assert stability.main(["--device", "nowhere", "--output", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "absent" in lines[0]
    assert "nowhere" in lines[1]


def test_thresholds_halve_as_the_batch_doubles() -> None:
    assert [batch_scaling.threshold(b) for b in FULL.batches] == [0.16, 0.16, 0.16, 0.08, 0.04, 0.02, 0.01]


def test_the_first_runs_lie_about_the_guess() -> None:
    line = LINES["no clipping"]
    assert batch_scaling.bases(CPU, line, 2048) == pytest.approx([0.0015625, 0.00625, 0.025])
    assert batch_scaling.bases(FULL, line, 2048) == pytest.approx([0.00625 * 2.0**k for k in range(-3, 4)])
    assert batch_scaling.bases(CPU, LINES["AGC"], 64) == pytest.approx([0.05, 0.1, 0.2])
    whole = batch_scaling.first_specs(FULL, 4096)
    assert len(whole) == len(LINES) * 7 * 3
    assert {s.limit for s in whole if s.method == "AGC"} == {0.01}
    assert all(batch_scaling.is_of_grid(FULL, s) for s in whole)
    assert len(batch_scaling.first_specs(CPU, 4096)) == len(LINES) * 3
    others = [s for name, s in batch_scaling.changes(FULL).items() if "warm-up" in name or "wide" in name]
    assert len(others) == 2
    assert not any(batch_scaling.is_of_grid(FULL, s) for s in others)


def test_a_study_climbs_to_the_best_rate_and_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are pretended: accuracy falls with the distance from a rate, and a run of 10 diverges."""
    peaks = {"no clipping": 0.1, "AGC": 0.4, TWIN: 0.2}  # learning rates, of AGC the base rate
    trained: list[list[float]] = []

    def train(cfg, rule, batch, settings, *, data, epochs, twin):  # type: ignore[no-untyped-def]
        trained.append([s.rate for s in settings])
        method = TWIN if twin else "AGC" if rule == "AGC" else "no clipping"
        return [(method, batch, s) for s in settings]

    def evaluate(cfg, fitted, **_):  # type: ignore[no-untyped-def]
        ends = []
        for method, batch, s in fitted:
            away = abs(math.log2(s.rate / peaks[method] / (batch / 256 if method == "AGC" else 1)))
            ends.append(Ended(0.0, math.inf, 3) if s.rate > 10 else Ended(0.9 - 0.01 * away, 0.5, None))
        return ends

    monkeypatch.setattr(batch_scaling, "train", train)
    monkeypatch.setattr(batch_scaling, "evaluate", evaluate)
    data = Data(
        (torch.zeros(64, 1, 14, 14), torch.zeros(64).long()), (torch.zeros(8, 1, 14, 14), torch.zeros(8).long())
    )
    store = tmp_path / "a.jsonl"
    results = batch_scaling.run_study(STUDY, store, data=data)
    assert len({r.spec for r in results}) == len(results)
    chosen = batch_scaling_page.best([r for r in results if batch_scaling.is_of_grid(STUDY, r.spec)])
    for (name, batch), point in chosen.items():
        assert len(point.accuracies) == 2, (name, batch)
        rate = point.spec.base if name == "AGC" else point.spec.rate
        assert rate == pytest.approx(peaks[name], rel=0.01 if name == "AGC" else 0.3), (name, batch)
    for line in store.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no Infinity: it is no JSON
    count = len(trained)
    again = batch_scaling.run_study(STUDY, store, data=data)
    assert [r.spec for r in again] == [r.spec for r in results]
    assert len(trained) == count
    assert {r.on for r in again} == {f"{processor()}, torch {torch.__version__}"}


def test_the_page_names_each_machine_and_counts_its_runs() -> None:
    one, *two = [result("AGC", 64, 0.5, seed=seed) for seed in range(3)]
    assert batch_scaling_page.machines([one._replace(on="A")]) == "A"
    assert batch_scaling_page.machines([one._replace(on="A"), *(r._replace(on="B") for r in two)]) == (
        "B (runs: 2); A (runs: 1)"
    )


def result(method: str, batch: int, accuracy: float, *, base: float = 0.1, seed: int = 0) -> Result:
    limit = batch_scaling.threshold(batch) if method == "AGC" else LINES[method].start.limit
    at = None if accuracy else 3
    return Result(Spec(method, batch, base, limit, seed, 1), accuracy, 0.5 if accuracy else math.inf, at)


def test_page_and_pictures_say_what_the_runs_say(tmp_path: Path) -> None:
    results = [result("AGC", batch, a, seed=seed) for batch in (8, 32) for seed, a in ((0, 0.80), (1, 0.82))]
    results += [result(TWIN, 8, 0.83), result(TWIN, 8, 0.5, base=0.2), result(TWIN, 32, 0.84)]
    results += [
        result("no clipping", 8, 0.80),
        result("no clipping", 32, 0.0),
        result("no clipping", 32, 0.6, base=0.2),
    ]
    text = batch_scaling_page.page(STUDY, results, "the command", (64, 8))
    assert "| AGC | 81.0 ± 1.0 at 0.1 | 81.0 ± 1.0 at 0.1 | 32 |" in text
    assert "| no clipping | 80.0 at 0.1 | 60.0 at 0.2 | 8 |" in text
    assert "| no clipping | 0.1 | 80.0 | diverged |" in text
    assert "so 8, 2 steps" in text
    batch_scaling_page.write(STUDY, results, tmp_path, command="the command", images=(64, 8))
    assert (tmp_path / "stability.md").read_text() == text
    for name in ("stability.png", "stability-heat.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_a_method_is_stable_up_to_its_first_fall() -> None:
    top = {64: 0.9, 128: 0.9, 256: 0.9}
    assert batch_scaling_page.largest_stable({64: 0.9, 128: 0.86, 256: 0.8}, top) == 128
    assert batch_scaling_page.largest_stable({64: 0.8, 128: 0.9, 256: 0.9}, top) is None
    assert batch_scaling_page.largest_stable(top, top) == 256
