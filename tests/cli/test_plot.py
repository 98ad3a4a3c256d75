"""`nfzoo plot`: the statistics behind the picture, and the command."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nfzoo.analysis.signal_propagation import expected_variances, open_branches, signal_metrics
from nfzoo.cli import plot
from nfzoo.cli.plot import main, measure
from nfzoo.errors import ConfigError
from nfzoo.model import init, plan
from nfzoo.nn import NFNet
from nfzoo.variants import VARIANTS
from tests.support.helpers import SMALL, generator, images, random_params, relative

# Of one batch and one draw of weights, in networks of few channels: the measured variance scatters around the theory.
THEORY = 0.25


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# ---------------------------------------------------------------- the statistics


@pytest.mark.parametrize("name", list(VARIANTS))
def test_expected_variances_are_what_beta_is_made_of(name: str) -> None:
    cfg = VARIANTS[name].config
    expected = expected_variances(cfg)
    betas = [block.beta for block in plan(cfg) if block.branches is not None]
    assert len(expected) == len(betas) + 1 == sum(cfg.depths) + 1
    for variance, beta in zip(expected, betas, strict=False):
        assert variance == pytest.approx(beta**-2)
    after = np.cumsum(cfg.depths)
    assert [expected[i] for i in after] == pytest.approx([1 + d * cfg.alpha**2 for d in cfg.depths])


@pytest.mark.parametrize("name", list(SMALL))
def test_open_branches_are_at_full_strength(name: str) -> None:
    cfg = SMALL[name]
    fresh = init(cfg, generator=generator())
    opened = open_branches(cfg, fresh)
    changed = {k for k in fresh if not torch.equal(fresh[k], opened[k])}
    assert changed == {k for k in fresh if k.startswith("stages.") and not fresh[k].any() and not k.endswith("bias")}
    assert all((opened[k] == 1).all() for k in changed)
    x = images(cfg, height=64)
    silent, loud = (signal_metrics(cfg, p, x) for p in (fresh, opened))
    stream = [block.name for block in plan(cfg) if block.branches is not None and not block.fn.geometry.transition]  # type: ignore[attr-defined]
    assert stream
    for before, after in itertools.pairwise(silent):
        if after.name in stream:
            assert torch.equal(after.avg_var, before.avg_var)  # nothing was added
    assert all(float(m.res_avg_var) > 0 for m in loud if m.res_avg_var is not None)


def test_an_nf_resnet_at_init_follows_the_theory() -> None:
    cfg = VARIANTS["nf-resnet-50"].config.replace(widths=(96, 128, 160, 192), depths=(2, 3, 3, 2))
    x = torch.randn((8, 3, 128, 128), generator=generator(1))
    rows = signal_metrics(cfg, open_branches(cfg, init(cfg, generator=generator())), x)
    for row in rows[1:]:
        assert row.expected_var is not None
        assert float(row.avg_var) == pytest.approx(row.expected_var, rel=THEORY)
        assert row.res_avg_var is not None
        assert float(row.res_avg_var) == pytest.approx(1.0, rel=2 * THEORY)
        assert float(row.avg_sq_mean) < 0.1
    resets = [i for i in range(2, len(rows)) if rows[i].avg_var < rows[i - 1].avg_var]
    assert resets == [3, 6, 9]  # the first blocks of stages 2, 3 and 4


# ---------------------------------------------------------------- measure


@pytest.mark.parametrize("name", ["nfnet-test", "timm-nf-resnet-26", "nf-regnet-b0"])
def test_any_family_by_name(name: str) -> None:
    found = measure(name, batch=2, size=32)
    assert found.model == name
    assert found.input == (2, 3, 32, 32)
    assert len(found.blocks) == sum(VARIANTS[name].config.depths) + 1
    assert all(math.isfinite(row["avg_var"]) for row in found.to_dict()["blocks"])


def test_seed_and_silence() -> None:
    def figures(**options: object) -> list[float]:
        return [float(m.avg_var) for m in measure("nfnet-test", batch=2, **options).blocks]  # type: ignore[arg-type]

    assert figures() == figures(seed=0)
    assert figures() != figures(seed=1)
    assert figures() != figures(silent=True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    cfg = SMALL["nfnet"]
    model = NFNet(cfg, name="mine", generator=generator())
    model.load_state_dict(random_params(cfg))
    return model.save_pretrained(tmp_path / "model")


def test_trained_weights_are_measured(checkpoint: Path) -> None:
    cfg = SMALL["nfnet"]
    found = measure(str(checkpoint), trained=True, batch=2, size=32, seed=3)
    expected = signal_metrics(cfg, random_params(cfg), torch.randn((2, 3, 32, 32), generator=generator(3)))
    for a, b in zip(found.blocks, expected, strict=True):
        assert a.name == b.name
        assert relative(a.avg_var, b.avg_var) < 1e-6
    assert "trained" in found.title()
    fresh = measure(str(checkpoint), batch=2, size=32, seed=3)
    assert float(fresh.blocks[-1].avg_var) != float(found.blocks[-1].avg_var)
    assert "random" in fresh.title()


def test_images_are_preprocessed_as_the_model_is_evaluated(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    found = measure(str(checkpoint), trained=True, images=[folder], batch=2, size=32)
    from nfzoo import from_pretrained

    model = from_pretrained(checkpoint)
    x = torch.stack([model.preprocess(folder / f"{i}.png", size=32) for i in range(2)])
    expected = signal_metrics(model.config, dict(model.named_parameters()), x)
    assert [float(m.avg_var) for m in found.blocks] == [float(m.avg_var) for m in expected]
    assert found.input == (2, 3, 32, 32)
    assert "2 images" in found.title()


def test_options_that_contradict() -> None:
    with pytest.raises(ConfigError, match="trained weights are as they are"):
        measure("nfnet-test", trained=True, silent=True)


# ---------------------------------------------------------------- the command


def test_signal_draws_and_writes_numbers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, numbers = tmp_path / "s.png", tmp_path / "s.json"
    arguments = ["signal", "nfnet-test", "--batch-size", "2", "--output", str(out)]
    assert main([*arguments, "--json", str(numbers)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\nwrote {numbers}\n"
    found = json.loads(numbers.read_text())
    assert found["model"] == "nfnet-test"
    assert found["weights"] == "random"
    assert [row["name"] for row in found["blocks"]] == ["stem.conv3", *(f"stages.{i}.0" for i in range(4))]
    assert set(found["blocks"][1]) == {"name", "avg_sq_mean", "avg_var", "res_avg_var", "expected_var"}
    assert "res_avg_var" not in found["blocks"][0]
    first = pixels(out)
    assert first.shape[1] > 1500
    assert main([*arguments, "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == found
    assert str(out) in captured.err
    assert np.array_equal(pixels(out), first)
    out.unlink()
    assert main([*arguments, "--json", str(tmp_path)]) == 2  # before the model is measured
    assert "is a folder; give a file in it" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["signal", "nfnet-tset"], "nfnet-tset"),
        (["signal", "nfnet-test", "--output", "a.jpg"], "must end in .png"),
        (["signal", "nfnet-test", "--batch-size", "0"], "whole number from 1"),
        (["signal", "nfnet-test", "--images", "/nowhere/at/all"], "does not exist"),
        (["signal", "nfnet-test", "--device", "gpu9"], "gpu9"),
        (["curves", "/nowhere/at/all"], "there is no file"),
        (["signla", "x"], "there is no 'signla' but signal, curves; did you mean 'signal'?"),
        ([], "required"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("nfzoo plot: error: ")
    assert message in text
    assert len(text.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_null_in_json() -> None:
    found = measure("nfnet-test", batch=2)
    broken = found._replace(blocks=[found.blocks[0]._replace(avg_var=torch.tensor(math.nan))])
    assert broken.to_dict()["blocks"][0]["avg_var"] is None


def test_curves_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"epoch": e, "loss": 1 / e, "accuracy": 1 - 0.5**e} for e in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["curves", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'curves.png'}\n"
    first = pixels(tmp_path / "curves.png")
    assert main(["curves", str(tmp_path / "metrics.jsonl"), "--output", str(tmp_path / "b.png")]) == 0
    assert np.array_equal(pixels(tmp_path / "b.png"), first)


def test_curves_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each run in each panel, of the averaged weights where there are any, with its name."""
    monkeypatch.chdir(tmp_path)
    drawn: list[dict[str, list[float]]] = []
    monkeypatch.setattr(
        "nfzoo.analysis.figures.save",
        lambda figure, output: drawn.extend(
            {str(line.get_label()): [float(y) for y in line.get_ydata()] for line in axes.get_lines()}
            for axes in figure.axes
        ),
    )
    runs: dict[str, dict[str, float]] = {"a": {}, "b": {"ema_loss": 0.25, "ema_accuracy": 0.75}}
    for name, extra in runs.items():
        (tmp_path / name).mkdir()
        rows = [{"epoch": e, "loss": 1 / e, "accuracy": 0.5, **extra} for e in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["curves", "a", "b/metrics.jsonl"]) == 0
    assert capsys.readouterr().out == "wrote curves.png\n"
    assert drawn == [
        {"a": [1, 0.5], "b/metrics.jsonl": [0.25, 0.25]},
        {"a": [50, 50], "b/metrics.jsonl": [75, 75]},
    ]
    assert main(["curves", "a", "c"]) == 2
    assert "there is no file c" in capsys.readouterr().err


def test_the_disk_gives_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot, "signal_propagation", full)
    assert main(["signal", "nfnet-test", "--batch-size", "2", "--output", str(tmp_path / "s.png")]) == 1
    assert "No space left" in capsys.readouterr().err
