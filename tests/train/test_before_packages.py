"""Model folders, recipes and interrupted runs that an earlier nfzoo wrote load and resume."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nfzoo
from nfzoo.train import run as train
from nfzoo.train.config import recipes

FILES = Path(__file__).resolve().parents[1] / "reference" / "before_packages"

# The resumed run's weights differ by 2e-7 with another number of threads, and by 0.15 where the last epoch is missing.
RESUMED = 1e-4


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files as the folder that commands run in: resuming writes into it."""
    shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


@pytest.mark.parametrize("name", ["model", "run", "expected/model.safetensors"])
def test_models_load(folder: Path, name: str) -> None:
    model = nfzoo.from_pretrained(folder / name)
    assert sum(p.numel() for p in model.parameters()) == 5129
    assert model.labels == tuple("0123456789")


def test_recipes_keep_their_meaning(folder: Path) -> None:
    by_hand, of_run = (
        recipes.parse(["--recipe", name, "--output", "run"]) for name in ("recipe.yaml", "run/train.yaml")
    )
    assert by_hand.accumulation is None  # chosen by the free memory since, with the same figures
    assert dataclasses.replace(by_hand, accumulation=1) == of_run


@pytest.mark.parametrize("recipe", ["recipe.yaml", "run/train.yaml"])
def test_an_interrupted_run_goes_on(folder: Path, recipe: str) -> None:
    assert train.main(["--recipe", recipe, "--output", "run", "--resume", "true"]) == 0
    ended, expected = (load_file(folder / name / "model.safetensors") for name in ("run", "expected"))
    assert ended.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ended[key], value, rtol=0, atol=RESUMED)
    rows = [
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "expected")
    ]
    for ours, theirs in zip(*rows, strict=True):
        for key in theirs.keys() - {"images_per_second"}:
            assert ours[key] == pytest.approx(theirs[key], abs=RESUMED), key
