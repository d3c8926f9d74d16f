"""Send requests to a running TorchServe and read the guard's verdicts from the answers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from handlers.torchserve import VERDICT_HEADER
from handlers.torchserve_server import TorchServe

CONCURRENCY = 16


@dataclass(frozen=True)
class Answer:
    """One answer: status, verdict header ("" where there is none), body and its content type."""

    status: int
    verdict: str
    body: str
    content_type: str


def send(server: TorchServe, model: str, payloads: Sequence[bytes]) -> list[Answer]:
    """Send every payload as one request, up to 16 at a time; answers in the payloads' order."""
    url = f"{server.inference_url}/predictions/{model}"
    with (
        httpx.Client(headers=server.token_header(), timeout=60) as client,
        ThreadPoolExecutor(CONCURRENCY) as pool,
    ):

        def one(payload: bytes) -> Answer:
            response = client.post(url, content=payload)
            return Answer(
                response.status_code,
                response.headers.get(VERDICT_HEADER, ""),
                response.text,
                response.headers.get("content-type", ""),
            )

        return list(pool.map(one, payloads))
