"""A tiny model that matches, and a folder of pictures."""

import pytest
from helpers import photo, tiny

from tcl_hf import TCLForImageTextRetrieval
from tcl_hf.search import SearchModel


@pytest.fixture(scope="session")
def searcher():
    model, processor = tiny(TCLForImageTextRetrieval, rerank_weight=0.5)
    return SearchModel(model, processor)


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures, two of them in a folder within."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number in range(12):
        place = folder / "more" if number > 9 else folder
        photo(40 + number, 30, seed=number).save(place / f"{number:02d}.png")
    return folder
