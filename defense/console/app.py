"""The pages and their addresses; `make_app` puts them behind the token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.templating import Jinja2Templates
from starlette.types import ASGIApp

from defense.console.access import guarded
from defense.console.cases import Case
from defense.console.charts import STEPS, span, span_name
from defense.console.desk import NO_EXAMPLES, Desk
from defense.console.headline import headline, model_view
from defense.console.proposals import proposals
from defense.console.signals import gather
from defense.console.words import CALLS, VERDICTS, counted, make_environment, sentence
from defense.errors import DataError, PathGuardError
from defense.trail import Trail

PAGE = 50
"""Incidents of one page."""
NEWEST = 10
"""Incidents that the first page shows."""
FORM_BYTES = 200_000
FILTERS = ("model", "verdict", "call", "text")
NO_PICTURE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><path d="M4 4l24 24M28 4L4 28" '
    'stroke="#8b95a1" stroke-width="1.5"/></svg>'
)
Choices = Sequence[tuple[str, str]]


def make_app(desk: Desk, token: str) -> ASGIApp:
    """Return the console as an ASGI application; whoever has `token` may use it."""
    pages = _Pages(desk)
    routes = [
        Route("/", pages.overview),
        Route("/incidents", pages.incidents),
        Route("/incidents/{incident}", pages.incident),
        Route("/incidents/{incident}/picture.png", pages.picture),
        Route("/incidents/{incident}/{method}.png", pages.attribution),
        Route("/examples/{number:int}.png", pages.example),
        Route("/calls", pages.call, methods=["POST"]),
        Route("/recalibrate", pages.recalibrate),
        Route("/static/console.css", partial(_static, "console.css", "text/css")),
        Route("/static/icon.svg", partial(_static, "icon.svg", "image/svg+xml")),
    ]
    handlers: Any = {HTTPException: pages.refusal, PathGuardError: pages.mistake}
    return guarded(Starlette(routes=routes, exception_handlers=handlers), token)


def _static(name: str, media_type: str, _request: Request) -> Response:
    content = (files("defense.console") / "static" / name).read_bytes()
    return Response(content, media_type=media_type)


class _Pages:
    """One method per address. All but `call` are run in threads: reading a trail takes its time."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._templates = Jinja2Templates(env=make_environment())

    def overview(self, request: Request) -> Response:
        now = self._desk.settings.clock()
        traffic = gather(self._desk.trail.tallies, now)
        minutes = _number(request, "minutes", 0)
        minutes = minutes if minutes in STEPS else span(traffic, now)
        cases = self._desk.cases
        waiting = [case for case in cases.values() if case.call is None]
        return self._page(
            request,
            "overview.html",
            headline=headline(traffic, now),
            models=[model_view(one, now, minutes) for one in traffic],
            ranges=[(one, span_name(one)) for one in STEPS],
            chosen=minutes,
            refresh=min(3600, max(0, _number(request, "refresh", 0))),
            recent=waiting[:NEWEST],
            waiting=len(waiting),
            total=len(cases),
        )

    def incidents(self, request: Request) -> Response:
        asked, cases = _asked(request.query_params), self._desk.cases
        found = [case for case in cases.values() if case.fits(asked)]
        start = min(max(0, _number(request, "start", 0)), max(0, len(found) - 1)) // PAGE * PAGE
        rows = found[start : start + PAGE]
        kept = _number(request, "said", 0)
        return self._page(
            request,
            "incidents.html",
            asked=asked,
            selects=_selects(case.incident.model for case in cases.values()),
            rows=rows,
            upto=found[0].incident.time.isoformat() if found else "",
            found=len(found),
            total=len(cases),
            first=start + 1,
            last=start + len(rows),
            newer=_link(asked, start=start - PAGE) if start else None,
            older=_link(asked, start=start + PAGE) if start + PAGE < len(found) else None,
            said=f"{counted(kept, 'call')} kept." if kept > 0 else None,
        )

    def incident(self, request: Request) -> Response:
        cases = self._desk.cases
        case = _case(request, cases)
        ids = list(cases)
        at = ids.index(case.incident.id)
        others = (i for i, other in cases.items() if other.call is None and other != case)
        return self._page(
            request,
            "incident.html",
            here="/incidents",
            case=case,
            incident=case.incident,
            newer=ids[at - 1] if at else None,
            older=ids[at + 1] if at + 1 < len(ids) else None,
            waiting=next(others, None),
            said=request.query_params.get("said") == "1" and case.call is not None,
            by=self._desk.settings.by,
            picture=self._shown(case),
            attribution=self._attribution(case, request.query_params.get("method", "")),
            examples=self._examples(case),
            numbers=self._desk.numbers,
        )

    def picture(self, request: Request) -> Response:
        try:
            return Response(
                self._desk.picture(_case(request, self._desk.cases)), media_type="image/png"
            )
        except DataError:
            return Response(NO_PICTURE, media_type="image/svg+xml")

    def attribution(self, request: Request) -> Response:
        """Show an attribution that the page of its incident has computed."""
        lens, names = self._desk.settings.lens, request.path_params
        seen = None if lens is None else lens.kept(names["incident"], names["method"])
        if seen is None:
            raise HTTPException(
                404, "This attribution is not kept: compute it on the incident's page."
            )
        return Response(seen.png, media_type="image/png")

    def example(self, request: Request) -> Response:
        try:
            picture = self._desk.example(request.path_params["number"])
        except DataError:
            return Response(NO_PICTURE, media_type="image/svg+xml")
        return Response(picture, media_type="image/png")

    async def call(self, request: Request) -> Response:
        """Keep a call, on one incident or on many, and go back to where it was made."""
        form = await _form(request)
        fields = dict(form)
        call = fields.get("call", "")
        if call not in CALLS:
            raise HTTPException(400, f"A call is one of {', '.join(CALLS.values())}.")
        ids = [value for name, value in form if name == "incident"]
        return await run_in_threadpool(self._keep, fields, ids, call)

    def recalibrate(self, request: Request) -> Response:
        return self._page(request, "recalibrate.html", proposals=proposals(self._desk.trail))

    def refusal(self, request: Request, error: Exception) -> Response:
        """Answer an address that is not there, and what it is not meant for."""
        assert isinstance(error, HTTPException)
        text = "There is no such page." if error.detail == "Not Found" else error.detail
        return self._page(
            request, "message.html", error.status_code, title="Nothing here", text=text
        )

    def mistake(self, request: Request, error: Exception) -> Response:
        """Answer with the sentence of an error that PathGuard raises on purpose."""
        text = sentence(str(error))
        return self._page(request, "message.html", 500, title="That did not work", text=text)

    def _page(self, request: Request, name: str, status: int = 200, **values: Any) -> Response:
        settings = self._desk.settings
        shared = {
            "here": request.url.path,
            "now": settings.clock(),
            "folder": settings.folder,
            "damage": "" if name == "message.html" else _damage(self._desk.trail),
            "refresh": 0,
        }
        return self._templates.TemplateResponse(request, name, shared | values, status)

    def _shown(self, case: Case) -> dict[str, Any]:
        try:
            self._desk.picture(case)
        except DataError as error:
            return {"shown": False, "why": sentence(str(error))}
        return {"shown": True, "why": None}

    def _attribution(self, case: Case, method: str) -> dict[str, Any]:
        """Compute what was asked for, or say why there is nothing to ask for."""
        lens = self._desk.settings.lens
        found: dict[str, Any] = {"shown": None, "methods": (), "method": method, "why": None}
        found |= {"label": case.predicted or "the answer", "neurons": ()}
        if lens is None:
            return found | {"why": "For attributions start the console with --archive."}
        if case.incident.payload is None:
            return found | {"why": "There is no attribution without the picture."}
        found["methods"] = lens.methods
        if not method:
            return found
        try:
            payload = self._desk.payload(case)
            seen = lens.look(case.incident.id, payload, method, case.incident.fingerprint)
        except PathGuardError as error:
            return found | {"why": sentence(str(error))}
        shown = f"/incidents/{case.incident.id}/{method}.png"
        return found | {"shown": shown, "signed": seen.signed, "neurons": seen.neurons}

    def _examples(self, case: Case) -> dict[str, Any]:
        if self._desk.settings.examples is None:
            return {"shown": [], "why": NO_EXAMPLES}
        names = [name for name in (case.predicted, case.other) if name]
        shown = self._desk.examples(names)
        why = None if shown else "No class of the clean pictures has the name of this answer."
        return {"shown": list(shown.items()), "why": why}

    def _keep(self, fields: Mapping[str, str], ids: Sequence[str], call: str) -> Response:
        cases, asked = self._desk.cases, _asked(fields, "filter.")
        known = [i for i in ids if i in cases]
        if fields.get("which") == "all":
            # Not those that came after the list that the person saw.
            upto = fields.get("upto", "")
            known = [
                i
                for i, case in cases.items()
                if case.fits(asked) and case.incident.time.isoformat() <= upto
            ]
        if not known:
            raise HTTPException(
                400, "No incident was chosen: tick one or more, or choose all of them."
            )
        self._desk.call(known, call)
        if fields.get("back") == "incident":
            return RedirectResponse(f"/incidents/{known[0]}?said=1", 303)
        return RedirectResponse(_link(asked, said=len(known)), 303)


def _damage(trail: Trail) -> str:
    """Say what of the trail is left out of every page; nothing where it is whole."""
    lost = [(trail.damaged, "damaged line"), (trail.unreadable, "file")]
    return " and ".join(counted(number, what) for number, what in lost if number)


def _case(request: Request, cases: Mapping[str, Case]) -> Case:
    case = cases.get(request.path_params["incident"])
    if case is None:
        raise HTTPException(
            404, "There is no such incident: the trail may have been rotated since."
        )
    return case


def _asked(fields: Mapping[str, str], prefix: str = "") -> dict[str, str]:
    """Return what is filtered by, out of an address or, with a prefix, of a form."""
    return {name: fields.get(prefix + name, "") for name in FILTERS}


def _selects(models: Iterable[str]) -> list[tuple[str, str, Choices]]:
    """Return what can be chosen to filter by: names, labels, and values with their texts."""
    return [
        ("verdict", "Verdict", tuple(VERDICTS.items())),
        ("call", "Call", (("none", "no call"), *CALLS.items())),
        ("model", "Model", [(model, model) for model in sorted(set(models))]),
    ]


def _link(asked: Mapping[str, str], **more: int) -> str:
    """Return the address of the list under a filter."""
    query = {name: value for name, value in asked.items() if value}
    return f"/incidents?{urlencode(query | more)}"


def _number(request: Request, name: str, default: int) -> int:
    """Return a whole number from the address; `default` for anything else."""
    text = request.query_params.get(name, "")
    return int(text) if text.isdecimal() and text.isascii() and len(text) < 10 else default


async def _form(request: Request) -> list[tuple[str, str]]:
    """Return the fields of a form, in order; it has to be a short one."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > FORM_BYTES:
            raise HTTPException(413, "This form is too long: tick fewer incidents.")
    return parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True)
