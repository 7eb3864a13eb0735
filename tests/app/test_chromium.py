"""A headless Chromium clicks through every tab of the app. It is skipped where Chromium or Playwright is missing."""

import shutil

import pytest
from helpers import encoded, photo, png

pytest.importorskip("gradio", reason="Gradio is not installed (tcl_hf[app])")
pytest.importorskip("lancedb", reason="LanceDB is not installed (tcl_hf[search])")
pytest.importorskip("playwright", reason="Playwright is not installed")
from playwright.sync_api import sync_playwright

from tcl_hf.app.browser import App, create_blocks, launch
from tcl_hf.app.heads import Heads
from tcl_hf.app.library import Library
from tcl_hf.app.limits import Limits

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"),
]
WAIT = 60_000  # ms; a shared machine may be slow


@pytest.fixture(scope="module")
def address(model_folders, tmp_path_factory):
    """The address of an app with every tab."""
    root = tmp_path_factory.mktemp("app")
    (root / "pictures").mkdir()
    for number in range(6):
        (root / "pictures" / f"{number}.png").write_bytes(png(number))
    shutil.copytree(model_folders["retrieval"], root / "again")
    names = [str(model_folders[name]) for name in ("retrieval", "answers", "entailment", "reasoning")]
    heads = Heads([*names, str(root / "again")], "cpu")
    library = Library(str(root / "pictures"), heads, str(root / "indexes"))
    library.wait()
    blocks = create_blocks(App(heads, library, Limits(characters=200)))
    launch(blocks, "127.0.0.1", None, 10, prevent_thread_lock=True)
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request, browser, address):
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(WAIT)
    hosts: set[str] = set()
    page.on("request", lambda sent: hosts.add(sent.url.split("/")[2]) if sent.url.startswith("http") else None)
    page.goto(address)
    page.wait_for_selector("#search")
    yield page
    assert hosts == {address.split("/")[2]}  # it asks nobody but this machine
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0
    page.close()


def tab(page, name: str) -> None:
    """Choose a tab, which a narrow screen may hold in its menu."""
    button = page.get_by_role("tab", name=name, exact=True)
    if not button.first.is_visible():
        page.locator(".overflow-menu button").first.click()
        page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()
        return
    button.first.click()


def upload(page, number: int, name: str, content: bytes) -> None:
    files = page.locator("input[type=file] >> visible=false")
    shown = [one for one in files.all() if one.evaluate("e => e.closest('.tabitem').offsetParent !== null")]
    shown[number].set_input_files({"name": name, "mimeType": "image/jpeg", "buffer": content})


def take(page, number: int = 0) -> None:
    """Click a picture of the row of examples, and wait until the upload shows it."""
    page.locator(".tiles .thumbnail-item >> visible=true").nth(number).click()
    page.wait_for_selector("[data-testid=image] img >> visible=true")


def test_search_finds_filters_and_goes_on_with_a_hit(page):
    page.fill("#query textarea", "a red dog")
    page.click("#search")
    page.wait_for_selector("#by_matching img")
    assert page.locator("#by_similarity img").count() == page.locator("#by_matching img").count() == 6
    first = page.locator("#by_similarity .thumbnail-item").nth(2)
    name = first.locator(".caption-label").inner_text().split()[-1]
    first.click()
    page.wait_for_function(f"document.querySelector('#by_similarity .caption-label').innerText == '1.00 {name}'")
    assert page.input_value("#query textarea") == ""
    page.get_by_text("Filter and number").click()
    page.get_by_label("Filter", exact=True).fill("name = '3.png'")
    page.fill("#query textarea", "a red dog")
    page.click("#search")
    page.wait_for_function("document.querySelectorAll('#by_similarity img').length == 1")


def test_errors_are_shown_as_sentences(page):
    page.click("#search")
    page.wait_for_selector("text=There is nothing to search for: write a text, or drop a picture.")
    page.fill("#query textarea", "dog " * 100)
    page.click("#search")
    page.wait_for_selector("text=has 400 characters, and at most 200 are read")
    page.fill("#query textarea", "")
    upload(page, 0, "text.jpg", b"a text called .jpg")
    page.wait_for_timeout(1000)
    page.click("#search")
    page.wait_for_selector("text=not a picture that can be read")


def test_a_word_that_is_clicked_has_its_heat_map(page):
    tab(page, "Look")
    page.wait_for_selector(".tiles .thumbnail-item >> visible=true")
    take(page)
    page.fill("#caption textarea", "a red dog near the house")
    page.click("#look")
    page.wait_for_selector("#heat_map img")

    def shown() -> str:
        return page.get_attribute("#heat_map img", "src")

    before = shown()
    page.locator("#words label", has_text="house").click()
    page.wait_for_function(f"document.querySelector('#heat_map img').src != '{before}'")
    assert page.locator("#words label").count() == 6
    before = shown()
    page.fill("#phrase textarea", "red dog")
    page.press("#phrase textarea", "Enter")
    page.wait_for_function(f"document.querySelector('#heat_map img').src != '{before}'")
    page.fill("#phrase textarea", "cat")
    page.press("#phrase textarea", "Enter")
    page.wait_for_selector("text=does not occur in")


def test_a_question_is_answered_with_candidates_and_freely(page):
    tab(page, "Ask")
    upload(page, 0, "photo.jpg", encoded(photo(60, 50), "JPEG"))
    page.wait_for_selector("[data-testid=image] img >> visible=true")
    page.fill("#question textarea", "is the dog red")
    page.fill("#candidates textarea", "red\nbig cat\ngreen")
    page.click("#ask")
    page.wait_for_selector("#answer >> text=big cat")
    assert page.locator("#answer").inner_text().count("%") >= 3
    page.get_by_label("Answer in its own words").check()
    page.click("#ask")
    page.wait_for_function("!document.querySelector('#answer').innerText.includes('%')")


def test_statements_about_one_picture_and_two_are_judged(page):
    tab(page, "Judge")
    page.wait_for_selector(".tiles .thumbnail-item >> visible=true")
    take(page)
    page.fill("#judge_statement textarea", "there is a dog")
    page.click("#judge")
    page.wait_for_selector("#judge_verdict >> text=entailment")
    tab(page, "Judge two")
    for number in range(2):
        upload(page, number if number == 0 else -1, "photo.jpg", encoded(photo(60, 50, seed=number), "JPEG"))
        page.wait_for_function(
            "n => [...document.querySelectorAll('[data-testid=image] img')].filter(e => e.offsetParent).length == n",
            arg=number + 1,
        )
    page.fill("#judge_two_statement textarea", "there is a dog")
    page.click("#judge_two")
    page.wait_for_selector("#judge_two_verdict >> text=True")


def test_two_checkpoints_are_compared(page):
    tab(page, "Compare")
    page.fill("#compare_query textarea", "a red dog")
    page.click("#compare")
    page.wait_for_selector("#compared_1 img")
    captions = [page.locator(f"#compared_{number} .caption-label").all_inner_texts() for number in range(2)]
    assert len(captions[0]) == 6 and captions[0] == captions[1]  # the same weights give the same order
