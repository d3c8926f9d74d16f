"""Send requests so that they arrive in order and share a batch, and read counters back."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
from prometheus_client.parser import text_string_to_metric_families

from handlers.torchserve_server import TorchServe

STAGGER_SECONDS = 0.01


def post(
    server: TorchServe,
    model: str,
    payloads: Sequence[bytes | list[object]],
    *,
    headers: dict[str, str] | None = None,
    door: str = "predictions",
) -> list[httpx.Response]:
    """Post payloads one shortly after the other, each on a connection of its own; lists as JSON."""
    url = f"{server.inference_url}/{door}/{model}"

    def one(numbered: tuple[int, bytes | list[object]]) -> httpx.Response:
        index, payload = numbered
        time.sleep(index * STAGGER_SECONDS)
        own = {**server.token_header(), **(headers or {})}
        if isinstance(payload, list):
            body = json.dumps(payload).encode()
            own["content-type"] = "application/json"
        else:
            body = payload
        return httpx.post(url, content=body, headers=own, timeout=60)

    with ThreadPoolExecutor(max(1, len(payloads))) as pool:
        return list(pool.map(one, enumerate(payloads)))


def scrape(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return all samples by name and labels."""
    text = httpx.get(url, timeout=10).text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(url: str, name: str, **labels: str) -> float:
    """Return the sum of the samples called `name` that carry these labels."""
    return sum(
        value
        for (sample, found), value in scrape(url).items()
        if sample == name and labels.items() <= dict(found).items()
    )
