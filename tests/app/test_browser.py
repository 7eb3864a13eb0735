"""The app's page: its tabs, its pictures, and its errors as sentences. A real browser clicks in `test_chromium`."""

import shutil
import time

import pytest
from helpers import png

pytest.importorskip("gradio", reason="Gradio is not installed (tcl_hf[app])")
pytest.importorskip("lancedb", reason="LanceDB is not installed (tcl_hf[search])")
import gradio as gr

from tcl_hf.app.browser import THEME, App, answered, create_blocks, default_heat
from tcl_hf.app.heads import Heads
from tcl_hf.app.library import Library
from tcl_hf.app.limits import Limits, RequestError
from tcl_hf.cli import app as command
from tcl_hf.search import SearchError


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


def grown(library: Library) -> Library:
    """The library once it is complete: what another object writes to an index is seen after two seconds."""
    library.wait()
    time.sleep(2.1)
    return library


@pytest.fixture
def library(pictures, heads, tmp_path) -> Library:
    library = Library(str(pictures), heads, str(tmp_path / "indexes"))
    return grown(library)


def tabs_of(blocks: gr.Blocks) -> list[str]:
    return [block.label for block in blocks.blocks.values() if isinstance(block, gr.Tab)]


def test_tabs_are_those_of_the_heads(heads, library, model_folders):
    assert tabs_of(create_blocks(App(heads, library))) == ["Search", "Look", "Ask", "Judge"]
    two = Heads([str(model_folders["reasoning"])], "cpu")
    assert tabs_of(create_blocks(App(two, None))) == ["Judge two"]


def test_two_checkpoints_can_be_compared(model_folders, pictures, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(model_folders["retrieval"], again)
    heads = Heads([str(model_folders["retrieval"]), str(again)], "cpu")
    library = Library(str(pictures), heads, str(tmp_path / "indexes"))
    assert len(library.indexes) == 2 and tabs_of(create_blocks(App(heads, library))) == ["Search", "Look", "Compare"]


def test_a_folder_is_followed_from_start_to_start(library, pictures, heads, tmp_path):
    assert len(library) == 3 and library.status() == "3 pictures."
    (pictures / "new.png").write_bytes(png(9))
    (pictures / "0.png").unlink()
    again = grown(Library(str(pictures), heads, str(tmp_path / "indexes")))
    hits = again.indexes[0].search("a dog", k=9, rerank=0)
    assert {hit.name for hit in hits} == {"1.png", "2.png", "new.png"}


def test_an_index_is_opened_as_it_is(index, heads):
    library = Library(index.uri, heads)
    assert len(library) == 12 and not library.is_growing
    found = App(heads, library).search(library.indexes[0], "a red dog", None, 4, "", 8)
    assert [hit.image_id for hit in found] == [hit.image_id for hit in index.search("a red dog", k=4, rerank=8)]


def test_pictures_that_are_not_there_are_refused(heads, tmp_path, model_folders):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SearchError, match="empty has no pictures"):
        Library(str(tmp_path / "empty"), heads, str(tmp_path / "indexes"))
    for argv, message in (
        ([], "There is no runs/openmoji: make it with `tcl-hf demo`"),
        ([str(tmp_path), "--model", str(model_folders["answers"])], "Nothing here can embed"),
        (["--max_image_mb", "0"], "--max_image_mb must be above 0"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            with pytest.raises(SystemExit, match=message):
                command.main(argv)
    args = command.parser().parse_args([])
    assert args.host == "127.0.0.1" and args.folder is None


def test_errors_are_sentences(heads, library, tmp_path):
    app = App(heads, library, Limits(characters=50, image_pixels=1000))
    index = library.indexes[0]
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "large.png").write_bytes(png(1))
    cases = (
        (("", None, 4, "", 0), "nothing to search for"),
        (("dog " * 20, None, 4, "", 0), "has 80 characters"),
        (("?!", None, 4, "", 0), "no word that the model reads"),
        (("dog", None, 4, "colour = 1", 0), "colour"),
        ((None, str(tmp_path / "text.jpg"), 4, "", 0), "not a picture that can be read"),
        ((None, str(tmp_path / "large.png"), 4, "", 0), "40 x 30 pixels are more than"),
    )
    for arguments, message in cases:
        with pytest.raises(gr.Error, match=message) as error:
            answered(app, app.search)(index, *arguments)
        assert "\n" not in error.value.message and not error.value.print_exception
    with pytest.raises(RequestError, match="There is no picture"):
        app.picture(None)

    def broken() -> None:
        raise KeyError("inside")

    with pytest.raises(gr.Error, match="the terminal in which it runs shows the reason"):
        answered(app, broken)()


def test_the_page_asks_nothing_of_other_hosts(heads):
    assert not any(isinstance(font, gr.themes.GoogleFont) for font in [*THEME._font, *THEME._font_mono])
    assert not create_blocks(App(heads, None)).analytics_enabled


def test_the_heat_that_is_shown_first_is_one_that_shows_something(heads):
    """The tiny model has two fusion layers; with a single one, only the maps of similarity are not all 0."""
    head = heads.by_verb["ground"]
    text = head.opened.model.config.text_config
    assert default_heat(head) == "matching"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "fusion_layer", text.num_hidden_layers - 1)
        assert default_heat(head) == "similarity"
