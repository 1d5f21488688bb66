"""The pictures of the benchmarks are drawn from the results that lie beside them."""

import importlib
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def texts(picture):
    return [element.text for element in ET.parse(picture).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.slow
def test_the_pictures_on_the_site_are_those_of_the_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    plots = importlib.import_module("plots")
    plots.draw_all(tmp_path)
    for name in plots.PICTURES:
        assert texts(tmp_path / name) == texts(ROOT / "docs" / "pictures" / name)
        assert len(texts(tmp_path / name)) > 10
