"""The commands `index`, `search` and `filter`, as a person runs them one after another."""

import importlib
import json
import shutil

import pytest
from helpers import photo, tiny

import tcl_hf_command as program
from tcl_hf import TCLForImageTextRetrieval

pytest.importorskip("lancedb", reason="LanceDB is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model where the demo leaves its own, and pictures."""
    place = tmp_path_factory.mktemp("place")
    model, processor = tiny(TCLForImageTextRetrieval, rerank_weight=0.5)
    model.save_pretrained(place / "runs" / "openmoji")
    processor.save_pretrained(place / "runs" / "openmoji")
    (place / "pictures").mkdir()
    for number in range(6):
        photo(seed=number).save(place / "pictures" / f"{number}.jpg")
    (place / "pictures" / "captions.csv").write_text("image,caption\n0.jpg,a red dog\n")
    return place


def run(capsys, *argv: str) -> str:
    program.main(list(argv))
    return capsys.readouterr().out


def refused(*argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        program.main(list(argv))
    return str(stopped.value.code)


def test_index_search_and_filter_one_after_another(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert refused("search", "a dog").startswith("error: ") and "holds no index" in refused("search", "a dog")
    out = run(capsys, "index", "pictures")
    assert out.startswith("pictures: 6 new\nruns/index: 6 pictures, exact search, model ")
    assert run(capsys, "index", "pictures").startswith("pictures: 0 new, 6 unchanged\n")
    facts = json.loads(run(capsys, "index", "--json"))
    assert facts["rows"] == 6 and facts["changes"] == {} and facts["model"] == str(place / "runs" / "openmoji")
    lines = run(capsys, "search", "a red dog", "--k", "3").splitlines()
    assert len(lines) == 4 and lines[0].split() == ["score", "similarity", "matching", "picture"]
    hits = json.loads(run(capsys, "search", "a red dog", "--k", "3", "--json", "--open"))
    assert [f"{hit['score']:.3f}" for hit in hits] == [line.split()[1] for line in lines[1:]]
    assert (place / "search.html").read_text().count("<figure>") == 3
    alike = json.loads(run(capsys, "search", "--image", "pictures/4.jpg", "--json"))
    assert alike[0]["name"] == "4.jpg" and alike[0]["matching"] is None
    assert run(capsys, "search", "dog", "--where", "width < 3") == "No picture was found.\n"
    out = run(capsys, "filter", "pictures", "--output", "good", "--keep_share", "1")
    assert out == "1 of 1 pairs were kept, in 1 of 1 records and 1 files in good\n"
    assert run(capsys, "index", "--remove", "pictures").startswith("6 pictures of pictures were removed\n")


def test_one_command_indexes_a_folder_and_searches_it_alone(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    (place / "others").mkdir()
    for number in range(3):
        photo(seed=10 + number).save(place / "others" / f"{number}.jpg")
    run(capsys, "index", "pictures", "--index", "both")
    out = run(capsys, "search", "a dog", "--folder", "others", "--index", "both")
    assert out.startswith("others: 3 new\n") and out.count("others/") == 3 and "pictures/" not in out
    hits = json.loads(
        run(capsys, "search", "a dog", "--folder", "others", "--index", "both", "--where", "width > 3", "--json")
    )
    assert sorted(hit["name"] for hit in hits) == ["0.jpg", "1.jpg", "2.jpg"]
    assert run(capsys, "search", "a dog", "--folder", "others", "--index", "new").startswith("others: 3 new\n")


def test_their_errors_are_one_sentence(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    run(capsys, "index", "pictures")
    for argv, message in (
        (["search"], "error: The query is empty: give a text, a picture, or both."),
        (["search", "dog", "--where", "colour = 3"], "error: where='colour = 3' cannot be used: "),
        (["search", "dog", "--k", "0"], "error: k must be a whole number of at least 1, got 0."),
        (["search", "dog", "--open", "x.docx"], "error: x.docx is neither a page nor a picture"),
        (["index", "nowhere", "--index", "new"], "error: nowhere "),
        (["filter", "pictures", "--output", "other"], "error: Say what to keep"),
    ):
        assert refused(*argv).startswith(message), argv
    shutil.copytree("runs/openmoji", "copy")
    monkeypatch.chdir(place / "pictures")
    assert "make one with `tcl-hf demo`" in refused("index", ".", "--index", "../another")


@pytest.mark.parametrize("name", ["index", "search", "filter"])
def test_the_module_of_a_command_is_that_of_its_name(name):
    assert importlib.import_module(f"tcl_hf.cli.{name}").parser().prog == f"tcl-hf {name}"
