"""Rates as people see them."""

import csv

import pytest
import torch

from lt_det.data import ClassStatistics
from lt_det.meta import plot_rates, rates_by_group, summary_of_rates, write_rates

RATES = torch.tensor([0.2, 0.4, 0.9, 0.5])


def statistics(**changes):
    fields = {
        "image_count": [0, 5, 50, 500],
        "instance_count": None,
        "num_images": 600,
        "names": ["a", "b,b", "c", "d"],
    }
    return ClassStatistics(**{**fields, **changes})


def test_groups_and_line():
    assert rates_by_group(RATES, statistics()) == pytest.approx({"r": 0.3, "c": 0.9, "f": 0.5})
    line = summary_of_rates(RATES, statistics())
    assert "rare 0.300, common 0.900, frequent 0.500" in line and "highest c 0.900" in line and "lowest a 0.200" in line
    all_rare = statistics(image_count=[1, 2, 3, 4])
    assert rates_by_group(RATES, all_rare) == pytest.approx({"r": 0.5})


@pytest.mark.parametrize("instances", [None, [0, 9, 99, 999]])
def test_table(tmp_path, instances):
    path = tmp_path / "new" / "rates.csv"
    write_rates(RATES, statistics(instance_count=instances), path)
    rows = list(csv.DictReader(open(path)))
    assert [row["name"] for row in rows] == ["a", "b,b", "c", "d"] and [row["frequency"] for row in rows] == list(
        "rrcf"
    )
    assert [row["instance_count"] for row in rows] == ([""] * 4 if instances is None else [str(n) for n in instances])
    assert [float(row["rate"]) for row in rows] == pytest.approx(RATES.tolist())
    assert [p.name for p in path.parent.iterdir()] == ["rates.csv"]


def test_picture(tmp_path):
    """Drawn in both places alike; a class without images does not break the logarithm."""
    picture = plot_rates(RATES, statistics(), tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert picture.shape[0] == 3 and picture.dtype.name == "uint8" and 0 < picture.std()
