"""The HTTP service: its answers equal those of the pipelines, and what it refuses it refuses in a sentence."""

import asyncio
import base64
import io
import json
import re
import struct
import zlib

import pytest
import torch
from helpers import encoded, photo, png

pytest.importorskip("fastapi", reason="FastAPI is not installed (tcl_hf[serve])")
from starlette.testclient import TestClient
from transformers import pipeline

from tcl_hf.app.guard import Guard
from tcl_hf.app.heads import Heads
from tcl_hf.app.limits import Limits, RequestError
from tcl_hf.app.metrics import Metrics
from tcl_hf.app.service import Service, create_app

PHOTO = photo(60, 50)
FILE = encoded(PHOTO, "PNG")
IMAGE = base64.b64encode(FILE).decode()
TEXTS = ["a red dog", "the big house near a tree", "a cat sits on the car"]
LIMITS = Limits(image_pixels=10_000, image_bytes=50_000, request_bytes=200_000, texts=5, images=3, characters=100)


@pytest.fixture(scope="module")
def service(heads) -> Service:
    return Service(heads, limits=LIMITS)


@pytest.fixture(scope="module")
def client(service):
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client


def close(actual, expected):
    torch.testing.assert_close(torch.tensor(actual).double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-5)


def refused(response, status: int, *parts: str) -> str:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    sentence = response.json()["error"]
    assert all(part in sentence for part in parts) and sentence.endswith(".")
    return sentence


def test_embeddings_are_those_of_the_model(client, heads):
    answer = client.post("/embed", json={"texts": TEXTS, "images": [IMAGE]}).json()
    model, processor = heads.embedder.opened.model, heads.embedder.opened.processor
    inputs = processor(images=[PHOTO], text=TEXTS, return_tensors="pt")
    with torch.no_grad():
        output = model.tcl(**inputs)
    close(answer["texts"], output.text_embeds.tolist())
    close(answer["images"], output.image_embeds.tolist())
    assert answer["dimensions"] == 16 and answer["model"] == heads.opened[0].name


def test_a_form_with_files_is_a_request_too(client):
    as_json = client.post("/embed", json={"texts": TEXTS[:1], "images": [IMAGE, IMAGE]}).json()
    files = [
        ("images", ("a.png", FILE)),
        ("images", ("b.png", FILE)),
        ("json", (None, json.dumps({"texts": TEXTS[:1]}))),
    ]
    assert client.post("/embed", files=files).json() == as_json
    as_json = client.post("/match", json={"texts": TEXTS, "image": f"data:image/png;base64,{IMAGE}"}).json()
    form = client.post("/match", files={"image": FILE}, data={"json": json.dumps({"texts": TEXTS})})
    assert form.json() == as_json


def test_answers_equal_the_pipelines(client, model_folders):
    matching = pipeline("image-text-matching", model=str(model_folders["retrieval"]), device="cpu")(PHOTO, TEXTS)
    answer = client.post("/match", json={"image": IMAGE, "texts": TEXTS}).json()["results"]
    assert [one["text"] for one in answer] == TEXTS
    for name in ("score", "similarity"):
        close([one[name] for one in answer], [one[name] for one in matching])

    asked = pipeline("visual-question-answering", model=str(model_folders["answers"]), device="cpu")
    question = {"image": IMAGE, "question": "Is the dog red?"}
    answer = client.post("/answer", json=question | {"candidates": ["red", "big cat", "green"], "top_k": 2}).json()
    expected = asked(PHOTO, "Is the dog red?", candidates=["red", "big cat", "green"], top_k=2)
    assert [one["answer"] for one in answer["results"]] == [one["answer"] for one in expected]
    close([one["score"] for one in answer["results"]], [one["score"] for one in expected])
    (generated,) = client.post("/answer", json=question).json()["results"]
    assert generated == asked(PHOTO, "Is the dog red?")[0] | {"score": None}

    judged = pipeline("visual-entailment", model=str(model_folders["entailment"]), device="cpu")(PHOTO, TEXTS[0])
    answer = client.post("/judge", json={"image": IMAGE, "text": TEXTS[0]}).json()["results"]
    assert [one["label"] for one in answer] == [one["label"] for one in judged]
    close([one["score"] for one in answer], [one["score"] for one in judged])

    ground = pipeline("visual-grounding", model=str(model_folders["retrieval"]), device="cpu")
    for more in ({}, {"phrase": "big house"}, {"boxes": [[0, 0, 9, 9], [5, 5, 40, 40]]}, {"heat": "similarity"}):
        heat = more.get("heat", "matching")  # a parameter of the call, while the others may be a record's
        expected = ground({"image": PHOTO, "text": TEXTS[1]} | more, heat=heat)
        answer = client.post("/ground", json={"image": IMAGE, "text": TEXTS[1]} | more).json()
        close(answer["box"], expected["box"])
        close(answer["point"], expected["point"])
        close(answer["heat_map"], expected["heat_map"].tolist())


def test_a_search_finds_what_the_index_finds(heads, index):
    sent = [
        {"text": "a red dog", "k": 5, "rerank": 8},
        {"text": "a red dog", "k": 3, "rerank": 0},
        {"text": "the house", "k": 3, "rerank": 0, "where": "caption LIKE '%r%'", "thumbnails": True},
        {"image": base64.b64encode(png(4)).decode(), "k": 2},
        {"image": base64.b64encode(png(4)).decode(), "text": "a cat", "k": 50},
    ]
    with TestClient(create_app(Service(heads, index))) as client:
        for request in sent:
            answer = client.post("/search", json=request).json()["results"]
            given = {name: value for name, value in request.items() if name != "thumbnails"}
            if "image" in given:
                given["image"] = png(4)
            hits = index.search(**given)
            assert [one["image_id"] for one in answer] == [hit.image_id for hit in hits]
            assert [one["caption"] for one in answer] == [hit.caption for hit in hits]
            close([one["score"] for one in answer], [hit.score for hit in hits])
            assert all(
                (one["matching"] is None) == (hit.matching is None) for one, hit in zip(answer, hits, strict=True)
            )
            thumbnail = answer[0]["thumbnail"]
            assert thumbnail is None or base64.b64decode(thumbnail) == hits[0].thumbnail
            assert (thumbnail is not None) == request.get("thumbnails", False)
        assert client.get("/health").json()["pictures"] == 12
        refused(client.post("/search", json={}), 422, "query is empty")
        refused(client.post("/search", json={"text": ""}), 422, "is empty")
        refused(client.post("/search", json={"text": "?!"}), 422, "no word")
        refused(client.post("/search", json={"text": "dog " * 2500}), 413, "10000 characters")
        refused(client.post("/search", json={"text": "dog", "k": 0}), 422, "k:")
        refused(client.post("/search", json={"text": "dog", "where": "colour = 1"}), 422, "colour")


def test_two_pictures_are_judged_by_a_model_that_reads_two(model_folders):
    heads = Heads([str(model_folders["reasoning"])], "cpu")
    other = encoded(photo(seed=1), "JPEG")
    with TestClient(create_app(Service(heads))) as client:
        sent = [("images", ("a", FILE)), ("images", ("b", other)), ("json", (None, '{"text": "a red dog"}'))]
        answer = client.post("/judge", files=sent).json()["results"]
        refused(client.post("/judge", json={"image": IMAGE, "text": "a dog"}), 422, "about 2 pictures", "got 1")
    expected = pipeline("visual-reasoning", model=str(model_folders["reasoning"]), device="cpu")
    (expected,) = expected([{"images": [PHOTO, photo(seed=1)], "text": "a red dog"}])
    assert {one["label"] for one in answer} == {one["label"] for one in expected}
    from PIL import Image

    exact = pipeline("visual-reasoning", model=str(model_folders["reasoning"]), device="cpu")(
        [{"images": [PHOTO, Image.open(io.BytesIO(other))], "text": "a red dog"}]
    )[0]
    close([one["score"] for one in answer], [one["score"] for one in exact])


def test_a_batch_of_many_clients_gives_each_its_own_result(heads):
    """Texts of different lengths and pictures share batches, and each result equals that of a request alone."""
    service = Service(heads, max_wait=0.2)
    requests = [("texts", [" ".join(TEXTS[n % 3].split()[: 1 + n % 5])]) for n in range(12)]
    requests += [("images", [base64.b64encode(png(n)).decode()]) for n in range(6)]

    async def all_at_once() -> list[dict]:
        import httpx2

        transport = httpx2.ASGITransport(app=create_app(service))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            posts = [client.post("/embed", json={name: value}) for name, value in requests]
            return [response.json() for response in await asyncio.gather(*posts)]

    together = asyncio.run(all_at_once())
    sizes = re.findall(r'tcl_batch_size_sum\{kind="texts"\} (\S+)', service.metrics.text().decode())
    counts = re.findall(r'tcl_batch_size_count\{kind="texts"\} (\S+)', service.metrics.text().decode())
    assert float(sizes[0]) == 12 and float(counts[0]) < 6  # batches were shared
    with TestClient(create_app(Service(heads))) as client:
        for (name, value), answer in zip(requests, together, strict=True):
            close(answer[name], client.post("/embed", json={name: value}).json()[name])


def test_an_error_in_a_batch_concerns_its_own_request_only(service, heads):
    head = heads.by_verb["ground"]
    good = head.prepare({"image": PHOTO, "text": TEXTS[1]})
    bad = head.prepare({"image": PHOTO, "text": " ".join(["dog"] * 29) + " house", "phrase": "house"})
    assert good.kind == bad.kind

    async def both() -> list:
        one = service.batcher.submit(good.kind, [good], head.run)
        other = service.batcher.submit(bad.kind, [bad], head.run)
        return await asyncio.gather(one, other, return_exceptions=True)

    service.batcher._worker = None
    fine, error = asyncio.run(both())
    close(list(fine[0]["point"]), list(head({"image": PHOTO, "text": TEXTS[1]})["point"]))
    assert isinstance(error, RequestError) and error.status == 422 and "does not read all of" in str(error)


def test_only_the_heads_that_are_there_have_paths(model_folders):
    heads = Heads([str(model_folders["answers"])], "cpu")
    with TestClient(create_app(Service(heads))) as client:
        refused(client.post("/match", json={}), 501, "is a TCLForQuestionAnswering", "add --model")
        refused(client.post("/embed", json={}), 501, "embed")
        refused(client.post("/search", json={"text": "dog"}), 501, "no index", "--index FOLDER")
        assert set(client.get("/openapi.json").json()["paths"]) == {"/answer", "/health", "/metrics"}
        assert client.get("/health").json()["verbs"] == ["answer"]


def test_a_picture_is_refused_before_it_is_decoded(client):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    cases = {
        "a bomb": (bomb, 413, "pixels"),
        "more pixels than allowed": (
            encoded(photo(200, 100), "JPEG"),
            413,
            "200 x 100 pixels are more than 0.01 million",
        ),
        "a larger file": (FILE + bytes(60_000), 413, "0.1 MB"),
        "a text called .jpg": (b"not a picture", 422, "not a picture that can be read"),
        "a cut file": (FILE[:100], 422, "not a picture that can be read"),
        "nothing": (b"", 422, "not a picture that can be read"),
        "a format that starts a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 422, "not a picture"),
    }
    for name, (content, status, part) in cases.items():
        response = client.post("/embed", json={"images": [IMAGE, base64.b64encode(content).decode()]})
        sentence = refused(response, status, part)
        assert "images: picture 1" in sentence or name == "a larger file", name
        refused(
            client.post("/match", files={"image": ("x.jpg", content), "json": (None, '{"texts": ["dog"]}')}), status
        )


@pytest.mark.parametrize(
    ("path", "request_", "status", "part"),
    [
        ("/embed", {}, 422, "nothing to embed"),
        ("/embed", {"texts": ["a"] * 6}, 413, "6 texts are more than 5"),
        ("/embed", {"images": [IMAGE] * 4}, 413, "4 pictures are more than 3"),
        ("/embed", {"texts": ["dog " * 40]}, 413, "text 0 has 160 characters"),
        ("/embed", {"texts": ["dog", "?!..."]}, 422, "'?!...' has no word"),
        ("/embed", {"texts": [""]}, 422, "'' is empty"),
        ("/embed", {"texts": "dog"}, 422, "texts: Input should be a valid array"),
        ("/embed", {"text": ["dog"]}, 422, "text: Extra inputs"),
        ("/embed", {"images": ["http://example.org/a.png"]}, 422, "opens no addresses"),
        ("/embed", {"images": ["file:///etc/passwd"]}, 422, "is not base64"),
        ("/match", {"image": IMAGE, "texts": []}, 422, "texts: List should have at least 1 item"),
        ("/match", {"texts": ["dog"]}, 422, "image: Field required"),
        ("/ground", {"image": IMAGE, "text": "a dog", "phrase": "cat"}, 422, "does not occur"),
        ("/ground", {"image": IMAGE, "text": "a dog", "boxes": [[0, 0, 900, 9]]}, 422, "leaves the image"),
        ("/answer", {"image": IMAGE, "question": " "}, 422, "is empty"),
        ("/answer", {"image": IMAGE, "question": "dog?", "candidates": ["a"] * 6}, 413, "candidates: 6 texts"),
        ("/answer", {"image": IMAGE, "question": "dog?", "candidates": ["a", " "]}, 422, "candidate"),
        ("/answer", {"image": IMAGE, "question": "dog?", "top_k": 0}, 422, "top_k"),
        ("/judge", {"text": "a dog"}, 422, "about 1 pictures, but got 0"),
        ("/judge", {"images": [IMAGE, IMAGE], "text": "a dog"}, 422, "about 1 pictures, but got 2"),
        ("/nothing", {}, 404, "/docs lists"),
    ],
)
def test_a_wrong_request_is_answered_with_one_sentence(client, path, request_, status, part):
    refused(client.post(path, json=request_), status, part)


def test_a_body_that_is_not_a_request_is_refused(client):
    refused(client.post("/embed", content=b"{"), 422, "Invalid JSON")
    refused(client.post("/embed", content=b"[1]"), 422, "The request")
    refused(client.post("/embed", content=b"a", headers={"content-type": "text/plain"}), 415, "'text/plain'")
    refused(client.post("/match", files={"json": (None, "{")}), 422, "part 'json'")
    refused(client.post("/match", files={"other": (None, "{")}), 422, "'other'")
    refused(client.get("/embed"), 405, "GET")
    refused(client.post("/embed", content=b" " * 300_000), 413, "larger than 0.2 MB")

    def in_chunks():
        for _ in range(30):
            yield b" " * 10_000

    refused(client.post("/embed", content=in_chunks()), 413, "larger than 0.2 MB")


def test_a_token_is_asked_for_everywhere_but_where_the_service_is_described(heads):
    with TestClient(create_app(Service(heads), token="secret")) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            response = client.post("/embed", json={"texts": ["dog"]}, headers=headers)
            refused(response, 401, "Authorization: Bearer TOKEN")
            assert response.headers["www-authenticate"] == "Bearer"
            assert client.get("/metrics", headers=headers).status_code == 401
        assert client.get("/health").status_code == client.get("/docs").status_code == 200
        right = {"authorization": "Bearer secret"}
        assert client.post("/embed", json={"texts": ["dog"]}, headers=right).status_code == 200


def test_a_page_of_another_site_cannot_call_a_service_of_this_machine(heads):
    """A name of its own that resolves to 127.0.0.1 would otherwise let its scripts read the answers."""
    with TestClient(create_app(Service(heads), hosts=["localhost", "127.0.0.1", "[::1]"])) as client:
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "[::1]"):
            assert client.get("/health", headers={"host": host}).status_code == 200
        refused(client.get("/health", headers={"host": "evil.example:8000"}), 403, "evil.example")


def test_the_description_is_complete_and_needs_no_other_host(client):
    page = client.get("/docs").text
    assert "http://" not in page and "https://" not in page
    for address in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert client.get(address).status_code == 200
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/embed", "/match", "/ground", "/answer", "/judge", "/health", "/metrics"}
    for path in ("/embed", "/match", "/ground", "/answer", "/judge"):
        post = schema["paths"][path]["post"]
        assert set(post["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
        assert {"200", "413", "422", "429"} <= set(post["responses"]) and post["summary"]


def test_metrics_count_requests_and_batches(heads):
    service = Service(heads)
    with TestClient(create_app(service)) as client:
        client.post("/embed", json={"texts": TEXTS})
        client.post("/embed", json={})
        client.post("/unheard-of", json={})
        lines = client.get("/metrics").text.splitlines()
    assert 'tcl_requests_total{path="/embed",status="200"} 1.0' in lines
    assert 'tcl_requests_total{path="/embed",status="422"} 1.0' in lines
    assert 'tcl_requests_total{path="other",status="404"} 1.0' in lines
    assert 'tcl_batch_size_sum{kind="texts"} 3.0' in lines and "tcl_queue_length 0.0" in lines


def guarded(app, **fields) -> Guard:
    return Guard(app, Limits(**fields), Metrics(frozenset(["/x"])), token=None)


async def call(guard, messages, sent=None) -> list:
    """Send a request as a server does, whose client is silent after these messages, and collect the answer."""
    sent = [] if sent is None else sent
    waiting = asyncio.Event()

    async def receive():
        if not messages:
            await waiting.wait()
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    await guard({"type": "http", "path": "/x", "headers": []}, receive, send)
    return sent


def body(content: bytes, more: bool = False) -> dict:
    return {"type": "http.request", "body": content, "more_body": more}


def test_a_slow_client_is_refused_and_a_slow_answer_is_ended():
    ended = []

    async def never(scope, receive, send):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    answer = asyncio.run(call(guarded(never, seconds=0.05), [body(b"{", more=True)]))
    assert answer[0]["status"] == 408 and b"within 0.05 seconds" in answer[1]["body"] and not ended
    answer = asyncio.run(call(guarded(never, seconds=0.05), [body(b"{}")]))
    assert answer[0]["status"] == 503 and b"more than 0.05 seconds" in answer[1]["body"] and ended


def test_a_cancelled_request_frees_its_place(heads):
    """The client leaves while its text waits for the model: the text is never computed, and the queue is empty."""
    service = Service(heads)

    async def leave() -> None:
        guard = create_app(service)
        blocked = asyncio.Event()
        loop = asyncio.get_running_loop()
        busy = asyncio.ensure_future(
            service.batcher.submit(
                "busy", [0], lambda items: asyncio.run_coroutine_threadsafe(blocked.wait(), loop).result() and items
            )
        )
        await asyncio.sleep(0.05)
        gone = asyncio.Event()
        messages = [body(b'{"texts": ["dog", "cat"]}')]

        async def receive():
            if messages:
                return messages.pop(0)
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            raise AssertionError("nobody is there to answer")

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/embed",
            "raw_path": b"/embed",
            "query_string": b"",
            "headers": [],
        }
        request = asyncio.ensure_future(guard(scope | {"scheme": "http", "server": ("localhost", 80)}, receive, send))
        while service.batcher.waiting < 2:
            await asyncio.sleep(0.01)
        gone.set()
        await request
        assert service.batcher.waiting == 0
        blocked.set()
        await busy
        await service.close()

    asyncio.run(leave())
    text = service.metrics.text().decode()
    assert 'tcl_requests_total{path="/embed",status="499"} 1.0' in text and 'kind="texts"' not in text


def test_a_full_queue_answers_429():
    from tcl_hf.app.batching import Batcher

    async def fill() -> None:
        batcher = Batcher(max_queue=3)
        release = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wait(items):
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
            return items

        running = asyncio.ensure_future(batcher.submit("kind", [0], wait))
        await asyncio.sleep(0.05)
        waiting = asyncio.ensure_future(batcher.submit("kind", [1, 2, 3], wait))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="3 texts and pictures are waiting already") as error:
            await batcher.submit("kind", [4], wait)
        assert error.value.status == 429
        release.set()
        assert await running == [0] and await waiting == [1, 2, 3]
        assert batcher.waiting == 0 and not batcher._queues
        await batcher.close()

    asyncio.run(fill())


def test_memory_for_bodies_is_bounded():
    async def read(scope, receive, send):
        await receive()
        await asyncio.sleep(0.05)

    async def many() -> list[int]:
        guard = guarded(read, request_bytes=100)
        answers = await asyncio.gather(*(call(guard, [body(b"a")]) for _ in range(10)))
        return [answer[0]["status"] for answer in answers if answer]

    assert asyncio.run(many()) == [429, 429]  # 8 of an unknown size are read at a time
