"""The example that sees, as a script for Intel GPUs: trained where "xpu" is the CPU, packed to int8, compared."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from lowbit_assets import pictures
from seeds.running import run_script

ROOT = Path(__file__).parents[2]


def test_pictures_are_split_and_labelled() -> None:
    train, valid = pictures(valid=False), pictures(valid=True)
    assert train.names == valid.names and len(train.names) == 8
    assert train.pixels.shape[1:] == (32, 32, 3) and len(train.labels) == len(train.pixels)
    assert 0.1 < len(valid.labels) / len(train.labels) < 0.4
    for part in (train, valid):
        assert set(part.labels.tolist()) == set(range(8))
    seen = {picture.tobytes() for picture in train.pixels}
    assert not [picture for picture in valid.pixels if picture.tobytes() in seen]


@pytest.mark.slow
def test_the_example_in_short(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    script = Path(shutil.copy(ROOT / "examples" / "train_on_pictures.py", tmp_path / "examples"))
    ran = run_script(script, 4)
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", ran.out)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    found = re.search(r"the same answer to ([\d.]+)%", ran.out)
    assert found is not None and float(found[1]) > 95
    # A fifth of the pictures are of one kind: who learns nothing is right that often.
    right = re.search(r"right: ([\d.]+)% in float32, ([\d.]+)% in int8", ran.out)
    assert right is not None and min(map(float, right.groups())) > 35
