"""Requests and answers of the service, as its OpenAPI page describes them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Picture = Annotated[
    str | bytes,
    Field(
        description="A picture: the bytes of its file as base64, or a part of a form with the file; with "
        "`--allow_urls` also an address on the internet."
    ),
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EmbedRequest(_Request):
    """Texts and pictures to embed; at least one of either."""

    texts: list[str] = Field([], description="Texts.", examples=[["a dog on grass"]])
    images: list[Picture] = Field([], description="Pictures.", examples=[[]])


class EmbedResponse(BaseModel):
    """Feature vectors of length 1; the scalar product of two of them is their similarity."""

    texts: list[list[float]] = Field(description="A vector for each text.")
    images: list[list[float]] = Field(description="A vector for each picture.")
    dimensions: int = Field(description="Length of a vector.")
    model: str = Field(description="The model that made them.")


class MatchRequest(_Request):
    """A picture, and texts that might describe it."""

    image: Picture
    texts: list[str] = Field(description="Texts.", min_length=1, examples=[["a dog on grass", "a cat"]])


class Match(BaseModel):
    """How well a text matches."""

    text: str
    score: float = Field(description="Probability that the text matches the picture.")
    similarity: float = Field(description="Cosine of the feature vectors.")


class MatchResponse(BaseModel):
    """The texts in their order."""

    results: list[Match]


class SearchRequest(_Request):
    """A text, a picture, or both, for which pictures of the index are looked for."""

    text: str | None = Field(None, description="What the pictures show.", examples=["a lion"])
    image: Picture | None = None
    k: int = Field(10, ge=1, le=1000, description="Number of pictures to return.")
    rerank: int = Field(32, ge=0, le=1000, description="Number of nearest pictures that are matched; 0 for none.")
    where: str | None = Field(None, description="A condition on columns, such as `width > 400`.", max_length=1000)
    thumbnails: bool = Field(False, description="Whether to return a small JPEG of each picture as base64.")


class Found(BaseModel):
    """A picture of the index."""

    path: str | None
    image_id: str
    score: float = Field(description="The value that orders the pictures.")
    similarity: float = Field(description="Cosine of the feature vectors.")
    matching: float | None = Field(description="Matching score, if the picture was re-ranked.")
    caption: str | None
    width: int
    height: int
    thumbnail: str | None = Field(description="JPEG as base64, if thumbnails were asked for.")


class SearchResponse(BaseModel):
    """Pictures, best first."""

    results: list[Found]


class GroundRequest(_Request):
    """A picture, and a text or a phrase of it to find in the picture."""

    image: Picture
    text: str = Field(description="A text about the picture.", examples=["a dog on grass"])
    phrase: str | None = Field(None, description="Words of the text to find; all of it if null.")
    boxes: list[tuple[float, float, float, float]] | None = Field(
        None, description="Candidates (x1, y1, x2, y2) in pixels, of which the best is returned.", max_length=1000
    )
    heat: Literal["matching", "similarity"] = Field("matching", description="The score that the heat map explains.")


class GroundResponse(BaseModel):
    """Where the phrase is."""

    box: tuple[float, float, float, float] = Field(description="(x1, y1, x2, y2) in pixels.")
    score: float = Field(description="Heat inside of the box over the square root of its area.")
    point: tuple[float, float] = Field(description="The hottest pixel (x, y).")
    heat_map: list[list[float]] = Field(description="Heat on the model's grid of patches, row by row.")


class AnswerRequest(_Request):
    """A picture and a question about it."""

    image: Picture
    question: str = Field(description="A question.", examples=["What colour is the dog?"])
    candidates: list[str] | None = Field(
        None, description="Answers to choose among; those of the model if null, and a generated answer if it has none."
    )
    top_k: int = Field(5, ge=1, le=100, description="Number of candidates to return.")


class Answer(BaseModel):
    """An answer."""

    answer: str
    score: float | None = Field(None, description="Probability among the candidates; null for a generated answer.")


class AnswerResponse(BaseModel):
    """Answers, best first."""

    results: list[Answer]


class JudgeRequest(_Request):
    """A statement about one picture, or about two if the model reads two."""

    image: Picture | None = None
    images: list[Picture] = Field([], description="The pictures of a statement about two.")
    text: str = Field(description="A statement.", examples=["There are two dogs."])


class Label(BaseModel):
    """A label."""

    label: str
    score: float = Field(description="Probability.")


class JudgeResponse(BaseModel):
    """Labels, best first."""

    results: list[Label]


class Health(BaseModel):
    """The verbs that the service can do, and whether it takes requests."""

    status: Literal["ok", "stopping"]
    verbs: list[str]
    models: list[str]
    pictures: int | None = Field(description="Number of pictures in the index, if there is one.")
    waiting: int = Field(description="Number of texts and pictures that wait for the model.")


class ErrorResponse(BaseModel):
    """A sentence about the thing that was wrong, its place, and the remedy."""

    error: str


def error_examples() -> dict[int | str, dict[str, Any]]:
    """The answers to refused requests, for the OpenAPI page."""
    texts = {
        401: "The bearer token is missing or wrong.",
        408: "The request did not arrive in time.",
        413: "The request, a picture or a text is larger than the limits.",
        422: "The request cannot be understood.",
        429: "Too many requests are waiting.",
        503: "The answer took too long.",
    }
    return {status: {"model": ErrorResponse, "description": text} for status, text in texts.items()}
