"""Requests in TorchServe's service envelopes (`service_envelope` in config.properties).

An envelope, such as KServe's v1 and v2, stands around a worker's handler: it unpacks one HTTP request
into instances, and packs their answers. So the handler meets N instances of one request, which has
one status; and what cannot be unpacked never reaches the handler: its client would get a 503.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from ts.context import Context, RequestProcessor
from ts.torch_handler.request_envelope.base import BaseEnvelope

from defense.errors import ArchiveError

_REQUESTS = ("input_names", "input_request_id")
"""What KServe's v2 envelope leaves on the context until it packs the answer."""


class Unreadable(list[object]):
    """Stands for the instances of a request that cannot be unpacked, and says why."""

    def __init__(self, error: Exception) -> None:
        super().__init__([None])
        self.error = error


class Refused(list[object]):
    """The answer to a refused request: it is sent as it is."""


def open_envelope(context: Context, base: type = BaseEnvelope) -> bool:
    """Say whether an envelope stands around this worker's handler, and let refusals through it.

    TorchServe has loaded that one class of `base` and no other; a worker serves one model.
    ArchiveError where batches are to be made of requests of many instances: nobody could tell whose
    an instance is.
    """
    found: list[Any] = base.__subclasses__()
    for envelope in found:
        size = context.system_properties.get("batch_size") or 1
        if size > 1:
            raise ArchiveError(
                f"TorchServe puts {size} requests into a batch, and the service envelope "
                f"'{envelope.__name__}' is guarded with one alone: set batchSize to 1"
            )
        if not hasattr(envelope, "passes_refusals"):
            _let_refusals_through(envelope)
    return bool(found)


def _let_refusals_through(envelope: Any) -> None:
    parse_input, format_output = envelope.parse_input, envelope.format_output

    @functools.wraps(parse_input)
    def parse(self: Any, data: Any) -> Any:
        try:
            instances = parse_input(self, data)
            if not isinstance(instances, list) or not instances:
                raise ValueError("the request holds no list of instances")
        except Exception as error:
            return Unreadable(error)
        return instances

    @functools.wraps(format_output)
    def format_(self: Any, results: Any) -> Any:
        if not isinstance(results, Refused):
            return format_output(self, results)
        for name in _REQUESTS:  # or the next request would be answered with this one's
            vars(self.context).pop(name, None)
        return results

    envelope.parse_input, envelope.format_output = parse, format_
    envelope.passes_refusals = True


def per_instance(context: Context, count: int) -> Context:
    """Return a context in which each instance of the one request is a request of its own."""
    part = copy.copy(context)
    request = context.request_processor[0]
    part.request_ids = dict.fromkeys(range(count), context.get_request_id(0))
    headers = request.get_request_properties()
    part.request_processor = [RequestProcessor(dict(headers)) for _ in range(count)]
    return part


def join_instances(
    answers: list[object], part: Context, context: Context, verdicts: tuple[str, ...], header: str
) -> list[object]:
    """Make one answer to the request of what its instances got: the worst of them is its status.

    verdicts: the values of `header`, from the mildest to the worst. One refused instance refuses the
    request, without the answers of the others.
    """
    ranks = [
        verdicts.index(found) if (found := one.get_response_header(header)) in verdicts else -1
        for one in part.request_processor
    ]
    worst = ranks.index(max(ranks))
    chosen, request = part.request_processor[worst], context.request_processor[0]
    refused = chosen.get_response_status_code() >= 400
    for one in [chosen] if refused else [*part.request_processor, chosen]:
        request.get_response_headers().update(one.get_response_headers())
    status = chosen if refused else part.request_processor[0]
    if status.get_response_status_code() != 200:
        request.report_status(
            status.get_response_status_code(), status.get_response_status_phrase()
        )
    return Refused([answers[worst]]) if refused else answers
