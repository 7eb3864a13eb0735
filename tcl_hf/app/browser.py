"""The app in a browser: Gradio tabs for the heads that are there."""

import functools
import html
import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which may report a start

import gradio as gr
from PIL import Image

from ..data.embedded.openmoji import ATTRIBUTION
from ..data.records import DataError
from ..search import Hit, ImageIndex, SearchError
from .heads import Head, Heads
from .library import Library
from .limits import Limits, RequestError, check_texts
from .pictures import read_picture

logger = logging.getLogger(__name__)

TITLE = "TCL: search, look, ask"
SIDE = 384  # pixels of a side of small pictures, so that heat maps drawn on them are not coarse
# Tiles of equal size on every width of screen, with the caption below the picture and not on it.
CSS = """
.gradio-container {max-width: 1280px !important; margin: auto !important}
.tiles .grid-wrap {min-height: 0 !important; max-height: none !important; overflow: visible !important}
.tiles .grid-container {grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) !important; height: auto !important}
.tiles .thumbnail-item {aspect-ratio: auto !important; height: auto !important; display: flex; flex-direction: column}
.tiles .thumbnail-item img {aspect-ratio: 1; height: auto !important}
.tiles .caption-label {position: static !important; width: 100%; max-width: none; border: none; text-align: center;
  font-size: 0.8rem; white-space: normal; background: none}
#words input {display: none}
footer {display: none !important}
"""
# Fonts of the system, so that no page of the app asks another host for any.
THEME = gr.themes.Soft(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="indigo", radius_size="md"
)


def upload(label: str, **options: Any) -> gr.Image:
    """A place for a picture, which is uploaded, pasted, or taken by the camera of a phone.

    Its value is the path of the file, and what the file holds is checked by `read_picture`. Gradio would open it,
    whatever its size is. A class of its own would be a component of its own to the page.
    """
    place = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=260, **options)
    place.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return place


class App:
    """The models and pictures of an app, and what its tabs do with them.

    Args:
        heads: the models.
        library: the pictures; None leaves out what needs them.
        limits: how much is accepted at once.
    """

    def __init__(self, heads: Heads, library: Library | None, limits: Limits | None = None):
        self.heads, self.library, self.limits = heads, library, limits or Limits()
        self.lock = threading.Lock()  # the model is used by one event at a time

    def picture(self, path: str | None, what: str = "picture") -> Image.Image:
        """The picture of an uploaded file, enlarged if it is small.

        Raises:
            RequestError: if there is none, or it is refused.
        """
        if path is None:
            raise RequestError(422, f"There is no {what}: drop one on the frame, or click one of the pictures.")
        image = read_picture(Path(path).read_bytes(), self.limits, what)
        return enlarged(image)

    def text(self, given: str | None, what: str = "text") -> str:
        """A text within the limits.

        Raises:
            RequestError: if it is empty or too long.
        """
        if not given or not given.strip():
            raise RequestError(422, f"The {what} is empty: write at least one word.")
        check_texts([given], self.limits, what)
        return given.strip()

    def search(
        self, index: ImageIndex, text: str | None, path: str | None, k: int, where: str | None, rerank: int
    ) -> list[Hit]:
        """Hits of an index for a text, a picture, or both.

        Args:
            index: the index.
            text: what the pictures show; None or empty for a picture alone.
            path: file of an uploaded picture.
            k: number of hits.
            where: a filter, as for `ImageIndex.search`; empty for none.
            rerank: number of candidates to rank anew.

        Raises:
            RequestError: if there is neither, or one of them is refused.
            SearchError: if the text has no word, or the filter is wrong.
        """
        words = self.text(text) if text and text.strip() else None
        if words is None and path is None:
            raise RequestError(422, "There is nothing to search for: write a text, or drop a picture.")
        image = None if path is None else read_picture(Path(path).read_bytes(), self.limits, "picture")
        return index.search(words, image, int(k), rerank=rerank, where=(where or "").strip() or None)


def enlarged(image: Image.Image) -> Image.Image:
    """A picture whose longer side has at least `SIDE` pixels."""
    factor = SIDE / max(image.size)
    if factor <= 1:
        return image
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def answered(app: App, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a tab: it runs alone, and an error of its input is shown as a sentence.

    Raises:
        gradio.Error: with the sentence, when the function is called.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        try:
            with app.lock:
                return function(*args)
        except (RequestError, SearchError, DataError) as error:
            raise gr.Error(html.escape(str(error)), duration=8, print_exception=False, title="Not possible") from error
        except Exception as error:
            logger.exception("The app failed")
            message = "The app failed to answer; the terminal in which it runs shows the reason."
            raise gr.Error(message, print_exception=False) from error

    return run


def tiles(hits: list[Hit], by_matching: bool) -> list[tuple[Image.Image, str]]:
    """Pictures for a gallery, each with its score and caption."""
    found = []
    for hit in hits:
        image = enlarged(hit.image())
        image.thumbnail((SIDE, SIDE))
        score = f"{hit.matching:.0%}" if by_matching and hit.matching is not None else f"{hit.similarity:.2f}"
        caption = (hit.caption or hit.name).splitlines()[0] if hit.caption or hit.name else ""
        found.append((image, f"{score}  {caption[:60]}"))
    return found


def gallery(title: str, **options: Any) -> gr.Gallery:
    """A gallery with a title above it, whose pictures are clicked and not enlarged."""
    gr.Markdown(f"#### {title}")
    fixed: dict[str, Any] = {"height": "auto", "allow_preview": False, "object_fit": "contain", "buttons": []}
    return gr.Gallery(show_label=False, container=False, interactive=False, elem_classes="tiles", **fixed, **options)


def chosen(event: gr.SelectData) -> tuple[str, str]:
    """The file of the picture of a gallery that was clicked, and its caption."""
    return event.value["image"]["path"], event.value.get("caption") or ""


def search_tab(app: App) -> None:
    """Search by text, picture or both: similarity and re-ranked rows side by side."""
    library = app.library
    index = library.indexes[0]
    can_match = index.model.can_match
    with gr.Row():
        with gr.Column(scale=3):
            text = gr.Textbox(label="Text", placeholder="a lion", elem_id="query", autofocus=True)
            with gr.Accordion("Filter and number", open=False):
                where = gr.Textbox(label="Filter", placeholder="caption LIKE '%dog%' AND width > 500")
                k = gr.Slider(4, 48, value=12, step=4, label="Pictures")
            button = gr.Button("Search", variant="primary", elem_id="search")
            status = gr.Markdown(library.status(), elem_id="status")
            gr.Markdown("Click a picture that was found for more like it.")
        with gr.Column(scale=1, min_width=220):
            picture = upload("Or a picture")
    with gr.Row():
        with gr.Column(min_width=300):
            nearest = gallery("Nearest, with the cosine similarity", elem_id="by_similarity")
        if can_match:
            with gr.Column(min_width=300):
                matched = gallery("Re-ranked, with the probability of matching", elem_id="by_matching")

    def search(words: str, path: str | None, number: int, condition: str) -> list[Any]:
        found = [tiles(app.search(index, words, path, number, condition, rerank=0), by_matching=False)]
        if can_match:
            ranked = app.search(index, words, path, number, condition, rerank=32) if words and words.strip() else []
            found.append(tiles(ranked, by_matching=True))
        return [*found, library.status()]

    outputs: list[Any] = [nearest, matched, status] if can_match else [nearest, status]
    listen([button.click, text.submit], answered(app, search), [text, picture, k, where], outputs)

    def more(event: gr.SelectData) -> tuple[str, str]:
        return "", chosen(event)[0]

    for shown in outputs[:-1]:
        taken = shown.select(more, None, [text, picture], api_visibility="private")
        taken.then(answered(app, search), [text, picture, k, where], outputs, **MODEL)


MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}


def listen(triggers: list[Any], function: Callable[..., Any], inputs: Any, outputs: Any) -> Any:
    """Run a function on events, one at a time for all tabs, because they share the model.

    Args:
        triggers: events of components.
        function: called with the values of the inputs; it returns those of the outputs.
        inputs, outputs: components.
    """
    return gr.on(triggers, function, inputs, outputs, **MODEL)


def examples(app: App, tab: gr.Tab, *outputs: Any, title: str = "Pictures to try") -> None:
    """A row of pictures of the library that are clicked to fill a picture and, if it is given, a text.

    Args:
        app: the app; without a library it shows none.
        tab: the tab, which reads the pictures when it is chosen.
        outputs: the place of the picture and, perhaps, that of its caption.
        title: stands above the row.
    """
    if app.library is None:
        return
    index = app.library.indexes[0]
    shown = gallery(title)

    def some() -> list[tuple[Image.Image, str]]:
        hits = index.search("an animal", k=8, rerank=0) if len(index) else []
        return [(image, caption.partition("  ")[2]) for image, caption in tiles(hits, by_matching=False)]

    tab.select(answered(app, some), None, shown, **MODEL)

    def take(event: gr.SelectData) -> Any:
        path, caption = chosen(event)
        return (path, caption) if len(outputs) > 1 else path

    shown.select(take, None, list(outputs), api_visibility="private")


def look_tab(app: App, tab: gr.Tab) -> None:
    """See where in a picture each word of a caption is, and boxes for phrases."""
    head: Head = app.heads.by_verb["ground"]
    with gr.Row():
        with gr.Column():
            picture = upload("Picture")
            caption = gr.Textbox(label="Caption", placeholder="a dog on grass", elem_id="caption")
            heat = gr.Radio(
                [("similarity of picture and phrase", "similarity"), ("matching of picture and caption", "matching")],
                value=default_heat(head), label="The heat explains the",
            )  # fmt: skip
            button = gr.Button("Look", variant="primary", elem_id="look")
        with gr.Column():
            drawn = gr.Image(label="Heat map and box", height=360, interactive=False, buttons=[], elem_id="heat_map")
            words = gr.Radio([], label="Click a word", elem_id="words", visible=False)
            phrase = gr.Textbox(label="Or a phrase of the caption", placeholder="on grass", elem_id="phrase")
    examples(app, tab, picture, caption)

    def ground(path: str | None, given: str, kind: str, part: Any) -> Image.Image:
        record = {"image": app.picture(path), "text": app.text(given, "caption"), "phrase": part}
        return head(record, heat=kind, draw=True)["drawn"]

    def look(path: str | None, given: str, kind: str) -> tuple[Any, ...]:
        found = ground(path, given, kind, None)
        spans = [(one.group(), f"{one.start()}-{one.end()}") for one in re.finditer(r"\S+", given)]
        return found, gr.Radio(spans, value=None, visible=True), ""

    def word(path: str | None, given: str, kind: str, span: str | None) -> Any:
        if span is None:
            return gr.skip()
        start, end = map(int, span.split("-"))
        return ground(path, given, kind, (start, end))

    def part(path: str | None, given: str, kind: str, words_of: str) -> Image.Image:
        return ground(path, given, kind, app.text(words_of, "phrase"))

    inputs = [picture, caption, heat]
    listen([button.click, caption.submit], answered(app, look), inputs, [drawn, words, phrase])
    listen([words.input], answered(app, word), [*inputs, words], drawn)
    listen([phrase.submit], answered(app, part), [*inputs, phrase], drawn)


def default_heat(head: Head) -> str:
    """The heat that shows something: with a single fusion layer, only [CLS] has a map of matching."""
    text = head.opened.model.config.text_config
    return "matching" if text.num_hidden_layers - text.fusion_layer > 1 else "similarity"


def ask_tab(app: App, tab: gr.Tab) -> None:
    """Ask a question about a picture, with answers to choose among or free."""
    head = app.heads.by_verb["answer"]
    with gr.Row():
        with gr.Column():
            picture = upload("Picture")
            question = gr.Textbox(label="Question", placeholder="What colour is the dog?", elem_id="question")
            candidates = gr.Textbox(
                label="Answers to choose among, one a line", lines=3, elem_id="candidates",
                placeholder="empty: the answers that the model was trained on, or else one in its own words",
            )  # fmt: skip
            free = gr.Checkbox(label="Answer in its own words")
            button = gr.Button("Ask", variant="primary", elem_id="ask")
        answer = gr.Label(label="Answer", num_top_classes=5, elem_id="answer")
    examples(app, tab, picture)

    def ask(path: str | None, asked: str, given: str, is_free: bool) -> Any:
        record = {"image": app.picture(path), "question": app.text(asked, "question")}
        listed = [line.strip() for line in (given or "").splitlines() if line.strip()]
        check_texts(listed, app.limits, "answers")
        among = None if is_free else listed or head.opened.answers
        if not among:
            return head(record)[0]["answer"] or "(no words)"
        return {one["answer"]: one["score"] for one in head(record, candidates=list(dict.fromkeys(among)))}

    listen([button.click, question.submit], answered(app, ask), [picture, question, candidates, free], answer)


def judge_tab(app: App, tab: gr.Tab, verb: str) -> None:
    """Judge a statement about one picture, or about two."""
    head = app.heads.by_verb[verb]
    names = ["Left picture", "Right picture"] if verb == "judge_two" else ["Picture"]
    with gr.Row():
        with gr.Column(scale=2):
            with gr.Row():
                pictures = [upload(name) for name in names]
            statement = gr.Textbox(label="Statement", placeholder="There is a dog.", elem_id=f"{verb}_statement")
            button = gr.Button("Judge", variant="primary", elem_id=verb)
        verdict = gr.Label(label="Judgement", elem_id=f"{verb}_verdict")
    for name, picture in zip(names, pictures, strict=True):
        title = f"Pictures to try as the {name.lower()}" if len(names) > 1 else "Pictures to try"
        examples(app, tab, picture, title=title)

    def judge(given: str, *paths: str | None) -> dict[str, float]:
        images = [app.picture(path, name.lower()) for path, name in zip(paths, names, strict=True)]
        return {one["label"]: one["score"] for one in head({"images": images, "text": app.text(given, "statement")})}

    listen([button.click, statement.submit], answered(app, judge), [statement, *pictures], verdict)


def compare_tab(app: App) -> None:
    """Search with two checkpoints for the same text."""
    pairs = list(zip(app.library.indexes, app.heads.embedders, strict=True))[:2]
    text = gr.Textbox(label="Text", placeholder="a lion", elem_id="compare_query")
    button = gr.Button("Compare", variant="primary", elem_id="compare")
    with gr.Row():
        shown = []
        for number, (_, embedder) in enumerate(pairs):
            with gr.Column(min_width=300):
                shown.append(gallery(embedder.opened.name, elem_id=f"compared_{number}"))

    def compare(words: str) -> list[Any]:
        found = [app.search(index, app.text(words), None, 12, None, rerank=32) for index, _ in pairs]
        return [tiles(hits, by_matching=False) for hits in found]

    listen([button.click, text.submit], answered(app, compare), text, shown)


def create_blocks(app: App) -> gr.Blocks:
    """The page of an app: a tab for each thing that its heads can do."""
    verbs = app.heads.by_verb
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# {TITLE}")
        with gr.Tabs():
            if app.library is not None:
                with gr.Tab("Search", id="search"):
                    search_tab(app)
            if "ground" in verbs:
                with gr.Tab("Look", id="look") as tab:
                    look_tab(app, tab)
            if "answer" in verbs:
                with gr.Tab("Ask", id="ask") as tab:
                    ask_tab(app, tab)
            if "judge" in verbs:
                with gr.Tab("Judge", id="judge") as tab:
                    judge_tab(app, tab, "judge")
            if "judge_two" in verbs:
                with gr.Tab("Judge two", id="judge_two") as tab:
                    judge_tab(app, tab, "judge_two")
            if app.library is not None and len(app.library.indexes) > 1:
                with gr.Tab("Compare", id="compare"):
                    compare_tab(app)
        models = ", ".join(f"`{opened.name}`" for opened in app.heads.opened)
        gr.Markdown(f"Models: {models}. {ATTRIBUTION if app.library is not None and app.library.is_demo else ''}")
    return blocks.queue(max_size=32)


def launch(blocks: gr.Blocks, host: str, port: int | None, max_mb: float, **options: Any) -> Any:
    """Show the page to browsers of this machine, or of others if `host` says so. It never asks another machine.

    Args:
        port: the port; the first free one from 7860 on if None.
        max_mb: size of an uploaded file.
        options: of `gradio.Blocks.launch`.
    """
    return blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        show_error=True,
        quiet=True,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=f"{max_mb}mb",
        theme=THEME,
        css=CSS,
        **options,
    )
