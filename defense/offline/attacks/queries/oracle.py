"""What an attacker without the weights has: answers and refusals, and a count of the questions.

For testing one's own models: an oracle asks a server, or a network in this process that answers as
the server would.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import httpx
import torch
from torch import Tensor, nn

from defense.errors import ServerError
from defense.guard import AttachedGuard
from defense.offline.pixels import LEVELS, PixelSpace
from defense.sites import device_of
from defense.types import Verdict

Images = Tensor | Sequence[Tensor]
"""(N, C, H, W), or N times (C, H, W); in [0, 1]."""


@dataclass(frozen=True)
class Answers:
    """N answers. refused: (N,) bool. labels: (N,) class index, -1 where refused.

    probabilities: (N, K), NaN where refused; None where the model names a class and no more.
    """

    refused: Tensor
    labels: Tensor
    probabilities: Tensor | None

    def split(self, sizes: Sequence[int]) -> Iterator[Answers]:
        """Yield the first answers, the next ones, and so on."""
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            rows = None if self.probabilities is None else self.probabilities[part]
            yield Answers(self.refused[part], self.labels[part], rows)
            start += size


class Oracle(Protocol):
    """Something that answers or refuses images; `asked` counts the images it was shown."""

    asked: int

    def ask(self, images: Images) -> Answers:
        """Show images, which arrive rounded to 8 bits; one answer each, in their order."""
        ...


class ModelOracle:
    """A network in this process, guarded or not; a guard's rejection is a refusal."""

    batch = 256

    def __init__(self, model: nn.Module | AttachedGuard, space: PixelSpace | None = None) -> None:
        """model: of backbone inputs. space: from pixels to those; None where they are the same."""
        self.asked = 0
        self._model, self._space = model, space
        network = model.backbone.model if isinstance(model, AttachedGuard) else model
        self._device = device_of(network)

    def ask(self, images: Images) -> Answers:
        pixels = images if isinstance(images, Tensor) else torch.stack(list(images))
        self.asked += len(pixels)
        parts = [self._answer(part) for part in pixels.split(self.batch)]
        refused = torch.cat([part[0] for part in parts])
        rows = torch.cat([part[1] for part in parts])
        labels = rows.argmax(1).masked_fill(refused, -1)
        return Answers(refused, labels, rows.masked_fill(refused[:, None], math.nan))

    @torch.inference_mode()
    def _answer(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is refused (N,) and the probabilities (N, K) of all."""
        inputs = ((pixels * LEVELS).round() / LEVELS).to(self._device)
        if self._space is not None:
            inputs = self._space.to_input(inputs)
        if not isinstance(self._model, AttachedGuard):
            logits = self._model(inputs)
            return torch.zeros(len(pixels), dtype=torch.bool), logits.softmax(1).cpu()
        guarded = self._model(inputs)
        refused = torch.tensor([verdict is Verdict.REJECT for verdict in guarded.verdicts])
        return refused, guarded.logits.softmax(1).cpu()


class HttpOracle:
    """A served model, asked over HTTP with 8-bit PNGs, some at a time; end it by `with` or `close`.

    Answers it reads: a class index or name, `{name: probability, ...}` of all or of the likeliest
    classes, and `{"class": index or name, "probabilities": [...]}`.
    """

    def __init__(
        self,
        url: str,
        model_name: str,
        class_names: Sequence[str],
        *,
        headers: Callable[[], Mapping[str, str]] = dict,
        refusals: Sequence[int] = (403,),
        concurrency: int = 32,
    ) -> None:
        """url: of the server, such as http://127.0.0.1:8080. headers: called once per `ask`."""
        self.asked = 0
        self._name, self._url = model_name, f"{url}/predictions/{model_name}"
        self._class_names, self._refusals = tuple(class_names), tuple(refusals)
        self._headers = headers
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._client = httpx.Client(timeout=60, limits=limits)
        self._pool = ThreadPoolExecutor(concurrency)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def ask(self, images: Images) -> Answers:
        """Post every image. Raises ServerError for whatever is neither an answer nor a refusal."""
        self.asked += len(images)
        headers = dict(self._headers())
        bodies = list(self._pool.map(lambda image: self._post(image, headers), images))
        read = [None if body is None else self._read(body) for body in bodies]
        refused = torch.tensor([one is None for one in read], dtype=torch.bool)
        labels = torch.tensor([-1 if one is None else one[0] for one in read])
        if any(one is not None and one[1] is None for one in read):
            return Answers(refused, labels, None)
        unknown = [math.nan] * len(self._class_names)
        rows = [unknown if one is None or one[1] is None else one[1] for one in read]
        return Answers(refused, labels, torch.tensor(rows, dtype=torch.float64))

    def _post(self, image: Tensor, headers: Mapping[str, str]) -> bytes | None:
        """Return the body of the answer to one image, None for a refusal."""
        mode = "L" if image.shape[0] == 1 else "RGB"
        payload = PixelSpace(torch.ones(1), torch.zeros(1), mode).png(image.cpu())
        try:
            answer = self._client.post(self._url, content=payload, headers=dict(headers))
        except httpx.HTTPError as error:
            raise ServerError(
                f"model '{self._name}' at {self._url} gave no answer "
                f"({type(error).__name__}: {error}); see that its server runs"
            ) from error
        if answer.status_code in self._refusals:
            return None
        if answer.status_code != 200:
            refusals = ", ".join(map(str, self._refusals))
            raise ServerError(
                f"model '{self._name}' at {self._url} answered an image with status "
                f"{answer.status_code}, where 200 or a refusal ({refusals}) was expected; "
                "look into the server's log"
            )
        return answer.content

    def _read(self, body: bytes) -> tuple[int, list[float] | None]:
        try:
            return read_answer(json.loads(body), self._class_names)
        except (ValueError, TypeError) as error:
            raise ServerError(
                f"the answer of model '{self._name}', {body[:80]!r}, names none of the "
                f"{len(self._class_names)} classes that were expected; give the names that it "
                "answers with"
            ) from error


def read_answer(answer: object, class_names: Sequence[str]) -> tuple[int, list[float] | None]:
    """Return an answer's class index and, where it has them, the probabilities of all classes.

    Classes that an answer of the likeliest leaves out share what is left. Raises ValueError or
    TypeError for an answer of another shape.
    """
    if not isinstance(answer, dict):
        return _index(answer, class_names), None
    if "class" in answer:
        rows = answer.get("probabilities")
        label = _index(answer["class"], class_names)
        return label, None if rows is None else _checked(rows, class_names)
    given = {_index(name, class_names): float(value) for name, value in answer.items()}
    missing = len(class_names) - len(given)
    rest = max(0.0, 1 - sum(given.values())) / max(1, missing)
    row = _checked([given.get(k, rest) for k in range(len(class_names))], class_names)
    return max(given, key=lambda k: given[k]), row


def _index(name: object, class_names: Sequence[str]) -> int:
    if type(name) is int and 0 <= name < len(class_names):
        return name
    if not isinstance(name, str):
        raise TypeError  # the caller says it in a sentence
    return class_names.index(name)


def _checked(row: Sequence[float], class_names: Sequence[str]) -> list[float]:
    numbers = [float(value) for value in row]
    if len(numbers) != len(class_names) or not all(map(math.isfinite, numbers)):
        raise ServerError(
            f"a model answered with the probabilities {numbers}, where {len(class_names)} finite "
            "ones were expected; give the classes that it answers with"
        )
    return numbers
