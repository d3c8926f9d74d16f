"""PathGuard inside a TorchServe worker: the only file that knows TorchServe's request protocol.

A guarded archive names `pathguard_handler.py` as its handler, which holds one empty subclass of
`TorchServeGuard` (TorchServe wants exactly one class in that file).
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from ts.context import Context

from defense.archive import FOLDER
from defense.artifact import load_guard
from defense.config import Settings, parse_settings, read_settings
from defense.errors import PathGuardError
from defense.exporter import Exporter, open_metrics_directory
from defense.gate import Gate, Outcome
from defense.live import ConfigWatcher
from defense.metrics import PASSED, ModelMetrics, make_instruments
from defense.payload import InvalidReason
from defense.types import Verdict
from defense.wrap import WrapFacts, read_wrap_facts
from handlers.torchserve_inner import load_inner

logger = logging.getLogger(__name__)

CONFIG_VARIABLE = "PATHGUARD_CONFIG"
VERDICT_HEADER = "X-PathGuard-Verdict"
P_VALUE_HEADER = "X-PathGuard-P-Value"
PROBLEM = "application/problem+json"

HANDLER_SOURCE = '''\
"""Written by `pathguard wrap`: guards the handler that this archive had before."""

try:
    from handlers.torchserve import TorchServeGuard
except ImportError as error:
    # TorchServe would take an ImportError for the name of a built-in handler.
    raise RuntimeError(
        f"this archive is guarded by PathGuard, which cannot be imported here ({error}): "
        "install pathguard into the Python that runs the workers"
    ) from error


class PathGuardHandler(TorchServeGuard):
    pass
'''

INVALID_STATUS = {
    InvalidReason.TOO_MANY_BYTES: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    InvalidReason.TOO_MANY_PIXELS: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    InvalidReason.WRONG_SHAPE: HTTPStatus.UNPROCESSABLE_ENTITY,
    InvalidReason.NOT_FINITE: HTTPStatus.UNPROCESSABLE_ENTITY,
}
TITLES = {
    InvalidReason.EMPTY: "The request has no body.",
    InvalidReason.TOO_MANY_BYTES: "The request is larger than this model takes.",
    InvalidReason.TOO_MANY_PIXELS: "The image has more pixels than this model takes.",
    InvalidReason.NOT_AN_IMAGE: "The body is no image in a known format.",
    InvalidReason.TRUNCATED_IMAGE: "The image is damaged or cut short.",
    InvalidReason.WRONG_SHAPE: "The input has another shape than this model takes.",
    InvalidReason.NOT_FINITE: "The input holds NaN or infinite values.",
    InvalidReason.UNREADABLE: "The input cannot be read by this model.",
}


class TorchServeGuard:
    """The handler of a guarded archive: TorchServe calls `initialize` once, `handle` per batch."""

    def __init__(self) -> None:
        self._release = ExitStack()

    def initialize(self, context: Context) -> None:
        """Load the archive's own handler and its guard, and refuse to start where they do not fit."""
        try:
            self._initialize(context)
        except PathGuardError as error:
            logger.error("PathGuard did not start: %s", error)
            raise

    def _initialize(self, context: Context) -> None:
        folder = Path(context.system_properties["model_dir"])
        facts = read_wrap_facts(folder)
        metrics_folder = open_metrics_directory()
        self._inner = load_inner(facts.inner_handler, facts.manifest, context)
        guard = load_guard(folder / FOLDER)
        name, version = context.model_name, _version_of(facts)
        instruments = make_instruments(CollectorRegistry())
        self._metrics = metrics = ModelMetrics(instruments, model=name, version=version)
        config = os.environ.get(CONFIG_VARIABLE)
        watcher = config and ConfigWatcher(
            Path(config),
            lambda edited: self._gate.apply(edited.for_model(name)),
            lambda result: instruments.reloads.labels(result).inc(),
        )
        settings = _first_settings(config, folder)
        own = settings.for_model(name)
        self._gate = Gate(guard.attach(self._inner.backbone, own), own, metrics)
        metrics.describe(
            router=guard.router.name, detector=guard.detector.name, fingerprint=guard.fingerprint
        )
        exporter = Exporter(metrics_folder, settings.metrics, lambda: metrics.error("exporter"))
        exporter.start()
        self._release.callback(exporter.stop)
        if watcher:
            watcher.start()
            self._release.callback(watcher.stop)

    def close(self) -> None:
        """Stop what runs beside the handler. TorchServe ends its workers instead."""
        self._release.close()

    def handle(self, data: list[dict[str, Any]], context: Context) -> list[object]:
        """Answer a batch: every request gets its own status, headers and body."""
        answers: list[object] = [None] * len(data)
        guarded: list[int] = []
        for row in range(len(data)):
            kind = _unscored(context, row)
            if kind is None:
                guarded.append(row)
            else:
                answers[row] = self._run(data, context, [row])[0]
                self._metrics.passed(kind)
        if guarded:
            outcomes = self._gate.pass_batch(
                [_payload(data[row]) for row in guarded],
                lambda rows: self._run(data, context, [guarded[i] for i in rows]),
            )
            for row, outcome in zip(guarded, outcomes, strict=True):
                answers[row] = self._respond(context, row, outcome)
        return answers

    def _run(
        self, data: list[dict[str, Any]], context: Context, rows: Sequence[int]
    ) -> list[object]:
        """Run the archive's handler on some rows, or on the batch as TorchServe gave it."""
        if len(rows) == len(data):
            return self._inner.handle(data, context)  # type: ignore[no-any-return]
        part = copy.copy(context)
        part.request_ids = {i: context.request_ids[row] for i, row in enumerate(rows)}
        part.request_processor = [context.request_processor[row] for row in rows]
        return self._inner.handle([data[row] for row in rows], part)  # type: ignore[no-any-return]

    def _respond(self, context: Context, row: int, outcome: Outcome) -> object:
        """Set the status and headers of one request and return its body."""
        settings = self._gate.settings
        if outcome.failure is not None:
            logger.warning("the archive's handler failed: %s", type(outcome.failure).__name__)
            return _refuse(
                context, row, HTTPStatus.SERVICE_UNAVAILABLE, "failed", "The prediction failed."
            )
        if outcome.invalid is not None:
            status = INVALID_STATUS.get(outcome.invalid, HTTPStatus.BAD_REQUEST)
            title = TITLES[outcome.invalid]
            return _refuse(context, row, status, "invalid", title, outcome.invalid.value)
        if outcome.verdict is None or settings.mode == "shadow":
            return outcome.answer
        if outcome.verdict is Verdict.REJECT:
            status = HTTPStatus(settings.reject_status)
            return _refuse(context, row, status, "reject", "The request was refused.")
        if outcome.verdict is Verdict.ERROR and settings.on_error == "closed":
            unavailable = HTTPStatus.SERVICE_UNAVAILABLE
            return _refuse(context, row, unavailable, "error", "The request could not be checked.")
        context.set_response_header(row, VERDICT_HEADER, outcome.verdict.value)
        if settings.expose_score and outcome.p_value is not None:
            context.set_response_header(row, P_VALUE_HEADER, f"{outcome.p_value:.6g}")
        return outcome.answer


def _version_of(facts: WrapFacts) -> str:
    model = facts.manifest.get("model")
    return str(model.get("modelVersion", "")) if isinstance(model, dict) else ""


def _first_settings(config: str | None, folder: Path) -> Settings:
    """Return the operator's settings, else those that were wrapped in, else the defaults."""
    if config:
        return read_settings(Path(config))
    wrapped = folder / FOLDER / "guard.yaml"
    if wrapped.is_file():
        return parse_settings(wrapped.read_bytes(), where="the guard.yaml inside the archive")
    return Settings()


def _unscored(context: Context, row: int) -> str | None:
    """Return `explain` or `describe` where TorchServe marked a request as asking for that."""
    return next((k for k in PASSED if context.get_request_header(row, k) == "True"), None)


def _payload(row: dict[str, Any]) -> object:
    """Return what a vision handler reads: `data`, else `body`, else the only part there is."""
    for name in ("data", "body"):
        if row.get(name):
            return row[name]
    return next(iter(row.values()), b"")


def _refuse(
    context: Context, row: int, status: HTTPStatus, verdict: str, title: str, reason: str = ""
) -> bytes:
    """Set a refusal and return its body. Nothing here comes from the request, or from the handler."""
    context.get_response_headers(row).clear()
    context.set_response_status(code=status.value, phrase=status.phrase, idx=row)
    context.set_response_content_type(row, PROBLEM)
    context.set_response_header(row, VERDICT_HEADER, verdict)
    guard = {"verdict": verdict, "reason": reason} if reason else {"verdict": verdict}
    body = {"title": title, "status": status.value, "guard": guard}
    return json.dumps(body).encode()
