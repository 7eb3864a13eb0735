"""How much a service accepts of one request, and the error of a request that asks for more."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of all that wait.

    Args:
        request_bytes: size of the body of a request.
        image_bytes: size of one picture as a file.
        image_pixels: width times height of one picture, which is read before anything is decoded.
        images, texts: number of them in one request.
        characters: length of one text.
        queue: number of texts and pictures that wait for the model, of all requests together.
        seconds: time in which a request has to arrive, and then to be answered.
    """

    request_bytes: int = 32 * 2**20
    image_bytes: int = 10 * 2**20
    image_pixels: int = 40_000_000
    images: int = 32
    texts: int = 256
    characters: int = 2000
    queue: int = 512
    seconds: float = 30.0


class RequestError(ValueError):
    """A request that is refused: the status of the answer, and a sentence with the value, the place and the remedy."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def check_texts(texts: list[str], limits: Limits, place: str = "texts") -> None:
    """Refuse more texts, or longer ones, than the limits permit.

    Raises:
        RequestError: with the status 413.
    """
    if len(texts) > limits.texts:
        raise RequestError(413, f"{place}: {len(texts)} texts are more than {limits.texts}; send several requests.")
    for number, text in enumerate(texts):
        if len(text) > limits.characters:
            raise RequestError(
                413, f"{place}: text {number} has {len(text)} characters, and at most {limits.characters} are read."
            )
