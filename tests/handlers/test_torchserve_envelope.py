"""Envelopes around a guarded handler: one request of many instances has one status."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
from ts.context import Context, RequestProcessor

from defense.errors import ArchiveError
from handlers.torchserve_envelope import (
    Refused,
    Unreadable,
    join_instances,
    open_envelope,
    per_instance,
)

HEADER, VERDICTS = "X-Verdict", ("accept", "flag", "reject")


@dataclass(frozen=True)
class Loaded:
    """TorchServe's envelopes as one worker would load them: a base class and one class of it."""

    base: type
    envelope: Any


@pytest.fixture(params=["kserve", "kservev2"])
def loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """Load one envelope under another name, for other tests are of workers without any."""
    own = find_spec("ts.torch_handler.request_envelope")
    assert own is not None
    package = ModuleType("fresh_envelopes")
    package.__path__ = list(own.submodule_search_locations or ())
    for name in ("", ".base", f".{request.param}"):
        monkeypatch.setitem(sys.modules, f"fresh_envelopes{name}", package)
        if name:
            monkeypatch.delitem(sys.modules, f"fresh_envelopes{name}")
            import_module(f"fresh_envelopes{name}")
    base = sys.modules["fresh_envelopes.base"].BaseEnvelope
    [envelope] = base.__subclasses__()
    return Loaded(base, envelope)


def context(batch_size: int = 1) -> Context:
    made = Context(
        "m", "/", {"model": {"modelName": "m", "modelVersion": "1"}}, batch_size, None, "x"
    )
    made.request_ids = {0: "id-0"}
    made.request_processor = [RequestProcessor({"X-Own": "1"})]
    return made


def body(envelope: Any, count: int) -> bytes:
    if "v2" in envelope.__name__:
        inputs = [
            {"name": f"i{row}", "shape": [1], "datatype": "BYTES", "data": [f"image {row}"]}
            for row in range(count)
        ]
        return json.dumps({"id": "theirs", "inputs": inputs}).encode()
    return json.dumps({"instances": [{"data": f"image {row}"} for row in range(count)]}).encode()


def test_a_worker_without_an_envelope_is_left_alone() -> None:
    assert open_envelope(context(8)) is False


def test_batches_of_enveloped_requests_are_refused(loaded: Loaded) -> None:
    with pytest.raises(ArchiveError, match=r"puts 4 requests into a batch.* set batchSize to 1"):
        open_envelope(context(4), loaded.base)
    assert not hasattr(loaded.envelope, "passes_refusals")


def test_answers_are_packed_as_ever(loaded: Loaded) -> None:
    stock = loaded.envelope(lambda data, _: [len(row["data"]) for row in data])
    data = [{"body": body(loaded.envelope, 2)}]
    before = stock.handle(data, context())
    assert open_envelope(context(), loaded.base) is True
    assert open_envelope(context(), loaded.base) is True
    assert stock.handle([{"body": body(loaded.envelope, 2)}], context()) == before
    [packed] = before
    assert len(packed.get("predictions") or packed["outputs"]) == 2


def test_a_refusal_is_not_packed_and_leaves_nothing_behind(loaded: Loaded) -> None:
    open_envelope(context(), loaded.base)
    answers: list[Any] = [Refused([b"no"]), [1]]
    opened, worker = loaded.envelope(lambda _data, _context: answers.pop(0)), context()
    assert opened.handle([{"body": body(loaded.envelope, 2)}], worker) == [b"no"]
    assert {"input_names", "input_request_id"} & set(vars(worker)) == set()
    nameless = json.loads(body(loaded.envelope, 1))
    nameless.pop("id", None)
    [packed] = opened.handle([{"body": json.dumps(nameless).encode()}], worker)
    assert packed.get("id", "id-0") == "id-0"


@pytest.mark.parametrize(
    "content", [b"no json", b"{}", b"[]", b"7", b"", b'{"instances": 3}', b'{"inputs": []}']
)
def test_what_cannot_be_unpacked_reaches_the_handler_as_that(
    loaded: Loaded, content: bytes
) -> None:
    open_envelope(context(), loaded.base)
    seen: list[Any] = []

    def handle(data: Any, _context: Context) -> Any:
        seen.append(data)
        return Refused([b"no"])

    assert loaded.envelope(handle).handle([{"body": content}], context()) == [b"no"]
    [data] = seen
    assert isinstance(data, Unreadable)
    assert isinstance(data.error, Exception)


def test_every_instance_is_a_request_of_its_own() -> None:
    whole = context()
    part = per_instance(whole, 3)
    part.set_response_header(2, "X-A", "b")
    assert [part.get_request_header(row, "X-Own") for row in range(3)] == ["1"] * 3
    assert part.get_request_id(2) == "id-0"
    assert whole.get_response_headers(0) == {}


def joined(verdicts: list[str]) -> tuple[Context, list[object]]:
    whole = context()
    part = per_instance(whole, len(verdicts))
    for row, verdict in enumerate(verdicts):
        part.set_response_header(row, HEADER, verdict)
        part.set_response_header(row, "X-Row", str(row))
        if verdict == "reject":
            part.set_response_status(403, "Forbidden", row)
    answers: list[object] = [f"answer {row}" for row in range(len(verdicts))]
    return whole, join_instances(answers, part, whole, VERDICTS, HEADER)


def test_the_worst_instance_gives_a_request_its_verdict() -> None:
    whole, answers = joined(["accept", "flag", "accept"])
    assert answers == ["answer 0", "answer 1", "answer 2"]
    assert whole.get_response_status(0)[0] == 200
    assert whole.get_response_headers(0)[HEADER] == "flag"


def test_one_refused_instance_refuses_a_request_and_hides_the_other_answers() -> None:
    whole, answers = joined(["accept", "reject", "flag"])
    assert answers == ["answer 1"]
    assert isinstance(answers, Refused)
    assert whole.get_response_status(0) == (403, "Forbidden")
    assert whole.get_response_headers(0) == {HEADER: "reject", "X-Row": "1"}


def test_a_status_that_the_handler_itself_sets_is_kept() -> None:
    whole = context()
    part = per_instance(whole, 2)
    part.set_response_status(404, "Not Found", 0)
    assert join_instances(["a", "b"], part, whole, VERDICTS, HEADER) == ["a"]
    assert whole.get_response_status(0) == (404, "Not Found")
