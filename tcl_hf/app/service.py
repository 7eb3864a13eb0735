"""The HTTP service: which requests there are, and how each is answered."""

import asyncio
import base64
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from PIL import Image
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException

from ..models.processing_tcl import TCLProcessor
from ..search import Hit, ImageIndex, SearchError
from .addresses import fetch
from .batching import Batcher
from .guard import Guard, extra_headers
from .heads import Head, Heads, Prepared, check_readable
from .limits import Limits, RequestError, check_texts
from .metrics import Metrics
from .pictures import from_base64, read_picture
from .requests import (
    AnswerRequest,
    AnswerResponse,
    EmbedRequest,
    EmbedResponse,
    Found,
    GroundRequest,
    GroundResponse,
    Health,
    JudgeRequest,
    JudgeResponse,
    MatchRequest,
    MatchResponse,
    SearchRequest,
    SearchResponse,
    error_examples,
)

logger = logging.getLogger(__name__)

ABOUT = "TCL as a service: features, matching, search, grounding, answers and judgements of pictures and texts."


class Service:
    """Answers requests with the heads of models, and with an index of pictures.

    Args:
        heads: the models.
        index: pictures to search; None for none.
        limits: how much one request may ask for.
        allow_urls: whether pictures may be given as addresses on the internet.
        max_batch_size, max_wait: of `Batcher`.
    """

    def __init__(
        self,
        heads: Heads,
        index: ImageIndex | None = None,
        limits: Limits | None = None,
        allow_urls: bool = False,
        max_batch_size: int = 32,
        max_wait: float = 0.005,
    ):
        self.heads, self.index, self.allow_urls = heads, index, allow_urls
        self.limits = limits or Limits()
        self.metrics = Metrics(frozenset([*(path for path, *_ in ROUTES), "/health", "/metrics"]))
        self.batcher = Batcher(max_batch_size, max_wait, self.limits.queue, self.metrics.batch)
        self.metrics.watch_queue(lambda: self.batcher.waiting)
        self.readers = ThreadPoolExecutor(os.cpu_count(), "reader")  # Pillow decodes outside of Python's lock
        self.is_stopping = False

    def has(self, verb: str) -> bool:
        """Whether requests of this kind can be answered."""
        if verb == "search":
            return self.index is not None
        if verb == "embed":
            return self.heads.embedder is not None
        return any(name in self.heads.by_verb for name in ((verb, "judge_two") if verb == "judge" else (verb,)))

    def why_absent(self, verb: str) -> str:
        """A sentence about a kind of request that cannot be answered."""
        if verb == "search":
            return "This service has no index of pictures; start it with --index FOLDER, which `tcl-hf index` makes."
        return self.heads.why_absent(verb)

    async def close(self) -> None:
        """Answer what waits, and end the threads."""
        self.is_stopping = True
        await self.batcher.close()
        self.readers.shutdown(wait=True)

    # Reading

    async def _read(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.readers, function, *args)

    async def picture(self, given: str | bytes, place: str = "image") -> Image.Image:
        """The picture that a request gives as bytes, as base64 or as an address.

        Raises:
            RequestError: if it is refused or cannot be read.
        """
        if isinstance(given, str) and given.lower().startswith(("http://", "https://")):
            if not self.allow_urls:
                raise RequestError(422, f"{place}: this service opens no addresses; send the picture itself.")
            given = await fetch(given, self.limits)

        def read() -> Image.Image:
            content = from_base64(given, self.limits, place) if isinstance(given, str) else given
            return read_picture(content, self.limits, place)

        return await self._read(read)

    async def pictures(self, given: Sequence[str | bytes]) -> list[Image.Image]:
        """The pictures of a list.

        Raises:
            RequestError: for too many, or for one that cannot be read.
        """
        if len(given) > self.limits.images:
            raise RequestError(
                413, f"images: {len(given)} pictures are more than {self.limits.images}; send several requests."
            )
        return [await self.picture(one, f"images: picture {number}") for number, one in enumerate(given)]

    def _check(self, texts: list[str], processor: TCLProcessor, place: str) -> None:
        check_texts(texts, self.limits, place)
        for text in texts:
            check_readable(text, processor, place)

    async def _run(self, head: Head, record: dict[str, Any], **parameters: Any) -> Any:
        prepared: Prepared = await self._read(lambda: head.prepare(record, **parameters))
        (result,) = await self.batcher.submit(prepared.kind, [prepared], head.run)
        return result

    # Answers, one method for each path

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        """Feature vectors of texts and pictures.

        Raises:
            RequestError: if there are none, or one cannot be read.
        """
        embedder = self.heads.embedder
        if not request.texts and not request.images:
            raise RequestError(422, "There is nothing to embed; send texts, images or both.")
        self._check(request.texts, embedder.opened.processor, "texts")
        with self.batcher.arriving():
            pixels = []
            for picture in await self.pictures(request.images):
                pixels.append(await self._read(embedder.pixels, picture))
        texts, images = await asyncio.gather(
            self.batcher.submit(("texts",), request.texts, embedder.texts),
            self.batcher.submit(("images",), pixels, embedder.images),
        )
        return EmbedResponse(
            texts=[text.features.tolist() for text in texts],
            images=[features.tolist() for features in images],
            dimensions=embedder.dimensions,
            model=embedder.opened.name,
        )

    async def match(self, request: MatchRequest) -> MatchResponse:
        """How well texts match a picture."""
        head = self.heads.by_verb["match"]
        self._check(request.texts, head.opened.processor, "texts")
        with self.batcher.arriving():
            picture = await self.picture(request.image)
        results = await self._run(head, {"image": picture, "text": request.texts})
        return MatchResponse(results=results)

    async def search(self, request: SearchRequest) -> SearchResponse:
        """Pictures of the index for a text, a picture, or both.

        Raises:
            RequestError: for a query that cannot be read or answered.
        """
        if request.text is not None:
            check_texts([request.text], self.limits, "text")
        query: dict[str, Any] = request.model_dump(include={"k", "rerank", "where"}) | {"text": None, "image": None}
        with self.batcher.arriving():
            if request.image is not None:
                query["image"] = await self.picture(request.image)
        if request.text is not None:
            self._check([request.text], self.index.model.processor, "text")
            (query["text"],) = await self.batcher.submit(("texts",), [request.text], self.heads.embedder.texts)
        needs_model = query["image"] is not None or (query["rerank"] > 0 and self.index.model.can_match)
        if needs_model:
            (hits,) = await self.batcher.submit(("search",), [query], self._find)
        else:  # a look into the database alone, during which the model is free for others
            (hits,) = await self._read(self._find, [query])
        if isinstance(hits, RequestError):
            raise hits
        return SearchResponse(results=[_found(hit, request.thumbnails) for hit in hits])

    def _find(self, queries: list[dict[str, Any]]) -> list[Any]:
        """The hits of each query, or its error."""
        found: list[Any] = []
        for query in queries:
            try:
                found.append(self.index.search(**query))
            except SearchError as error:
                found.append(RequestError(422, str(error)))
        return found

    async def ground(self, request: GroundRequest) -> GroundResponse:
        """Where in a picture a text or a phrase of it is."""
        head = self.heads.by_verb["ground"]
        self._check([request.text], head.opened.processor, "text")
        with self.batcher.arriving():
            picture = await self.picture(request.image)
        record = {"image": picture, "text": request.text, "phrase": request.phrase, "boxes": request.boxes}
        result = await self._run(head, record, heat=request.heat)
        return GroundResponse(**result | {"heat_map": result["heat_map"].tolist()})

    async def answer(self, request: AnswerRequest) -> AnswerResponse:
        """Answers to a question about a picture."""
        head = self.heads.by_verb["answer"]
        self._check([request.question], head.opened.processor, "question")
        parameters: dict[str, Any] = {}
        candidates = request.candidates or head.opened.answers
        if request.candidates:
            check_texts(request.candidates, self.limits, "candidates")
        if candidates:
            parameters = {"candidates": candidates, "top_k": request.top_k}
        with self.batcher.arriving():
            picture = await self.picture(request.image)
        results = await self._run(head, {"image": picture, "question": request.question}, **parameters)
        return AnswerResponse(results=results)

    async def judge(self, request: JudgeRequest) -> JudgeResponse:
        """Whether a statement about one picture, or about two, is true.

        Raises:
            RequestError: if no model reads so many pictures.
        """
        given = [*([] if request.image is None else [request.image]), *request.images]
        verb = "judge_two" if len(given) == 2 else "judge"
        if len(given) not in (1, 2) or verb not in self.heads.by_verb:
            number = " or ".join(
                one for one, name in (("1", "judge"), ("2", "judge_two")) if name in self.heads.by_verb
            )
            raise RequestError(422, f"images: a statement here is about {number} pictures, but got {len(given)}.")
        head = self.heads.by_verb[verb]
        self._check([request.text], head.opened.processor, "text")
        with self.batcher.arriving():
            pictures = await self.pictures(given)
        results = await self._run(head, {"images": pictures, "text": request.text})
        return JudgeResponse(results=results)

    def health(self) -> Health:
        """The verbs that the service can do, and whether it takes requests."""
        return Health(
            status="stopping" if self.is_stopping else "ok",
            verbs=[verb for _, verb, *_ in ROUTES if self.has(verb)],
            models=[opened.name for opened in self.heads.opened],
            pictures=None if self.index is None else len(self.index),
            waiting=self.batcher.waiting,
        )


ROUTES: list[tuple[str, str, type[BaseModel], type[BaseModel], Callable[..., Awaitable[BaseModel]]]] = [
    ("/embed", "embed", EmbedRequest, EmbedResponse, Service.embed),
    ("/match", "match", MatchRequest, MatchResponse, Service.match),
    ("/search", "search", SearchRequest, SearchResponse, Service.search),
    ("/ground", "ground", GroundRequest, GroundResponse, Service.ground),
    ("/answer", "answer", AnswerRequest, AnswerResponse, Service.answer),
    ("/judge", "judge", JudgeRequest, JudgeResponse, Service.judge),
]


def _found(hit: Hit, thumbnails: bool) -> Found:
    thumbnail = base64.b64encode(hit.thumbnail).decode() if thumbnails and hit.thumbnail else None
    values = {name: getattr(hit, name) for name in Found.model_fields if name != "thumbnail"}
    return Found(**values, thumbnail=thumbnail)


def create_app(service: Service, token: str | None = None, hosts: list[str] | None = None) -> Guard:
    """The service as an ASGI app.

    Args:
        token, hosts: of `Guard`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPIOffline(
        redoc_url=None, title="tcl_hf", version=version("tcl_hf"), description=ABOUT, lifespan=lifespan
    )
    for path, verb, request_model, response_model, method in ROUTES:
        _add_route(app, service, path, verb, request_model, response_model, method)

    @app.get("/health", summary="What the service can do")
    async def health() -> Health:
        return service.health()

    @app.get("/metrics", summary="Counters for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=Metrics.content_type)

    _add_error_handlers(app)
    return Guard(app, service.limits, service.metrics, token, hosts)


def _add_route(
    app: FastAPI,
    service: Service,
    path: str,
    verb: str,
    request_model: type[BaseModel],
    response_model: type[BaseModel],
    method: Callable[..., Awaitable[BaseModel]],
) -> None:
    """Add the path of a verb; one that cannot be answered says why, and is not part of the OpenAPI page."""

    async def answer(request: Request) -> Any:
        return await method(service, await read_request(request, request_model))

    async def absent() -> None:
        raise RequestError(501, service.why_absent(verb))

    if service.has(verb):
        app.add_api_route(
            path,
            answer,
            methods=["POST"],
            response_model=response_model,
            responses=error_examples(),
            summary=(method.__doc__ or "").strip().splitlines()[0],
            operation_id=verb,
            openapi_extra={"requestBody": _body_schema(request_model)},
        )
    else:
        app.add_api_route(path, absent, methods=["POST"], include_in_schema=False)


def _body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The description of a request as JSON and as a form."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    file: dict[str, Any] = {"type": "string", "format": "binary"}
    parts: dict[str, Any] = {"json": {"type": "string", "description": "The request as JSON, without the pictures."}}
    if "image" in model.model_fields:
        parts["image"] = file
    if "images" in model.model_fields:
        parts["images"] = {"type": "array", "items": file}
    form = {"type": "object", "properties": parts}
    return {
        "required": True,
        "content": {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}},
    }


async def read_request(request: Request, model: type[BaseModel]) -> BaseModel:
    """The request that a body holds as JSON, or a form: JSON in its part `json`, files in `image` and `images`.

    Raises:
        RequestError: with the status 415 or 422.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    try:
        if kind == "multipart/form-data":
            return model.model_validate(await _form(request))
        if kind == "application/json":
            return model.model_validate_json(await request.body())
    except ValidationError as error:
        raise RequestError(422, _sentence(error)) from error
    raise RequestError(415, f"The content type {kind[:100]!r} is not read; send application/json or a form with files.")


async def _form(request: Request) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    try:
        form = await request.form(max_files=100, max_fields=10)
    except StarletteHTTPException as error:
        raise RequestError(422, f"The form cannot be read: {error.detail}.") from error
    for name, part in form.multi_items():
        if isinstance(part, UploadFile):
            content = await part.read()
            if name == "images":
                fields.setdefault("images", []).append(content)
            else:
                fields[name] = content
        elif name == "json":
            try:
                given = json.loads(part)
            except (ValueError, RecursionError) as error:
                raise RequestError(422, f"The part 'json' of the form is not JSON: {error}.") from error
            if not isinstance(given, dict):
                raise RequestError(422, "The part 'json' of the form is not an object; write {...}.")
            fields = given | fields
        else:
            raise RequestError(422, f"The form has a part {name[:100]!r}; send files as image, and the rest as json.")
    return fields


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong with a request, in a sentence."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("str", "bytes"))
    message = first["msg"].rstrip(".")
    given = first.get("input")
    shown = f", got {given!r:.60}" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{place or 'The request'}: {message}{shown}; /docs describes the request."


def _add_error_handlers(app: FastAPI) -> None:
    """Every error is an answer {"error": sentence}."""

    def answer(status: int, message: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> JSONResponse:
        named = {name.decode(): value.decode() for name, value in headers}
        return JSONResponse({"error": message}, status, headers=named)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return answer(error.status, str(error), extra_headers(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(422, f"The request cannot be understood: {error.errors()[0]['msg']}.")

    @app.exception_handler(HTTPException)
    @app.exception_handler(StarletteHTTPException)
    async def not_found(request: Request, error: StarletteHTTPException) -> JSONResponse:
        texts = {404: "There is nothing here", 405: f"{request.method} is not what this path takes"}
        message = texts.get(error.status_code, str(error.detail))
        return answer(error.status_code, f"{request.url.path[:100]}: {message}; /docs lists what there is.")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s failed", request.url.path, exc_info=error)
        return answer(500, "The service failed to answer; its log has the reason.")
