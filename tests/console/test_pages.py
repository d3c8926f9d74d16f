"""The pages, asked over HTTP as a browser asks: what they show, and what a person may say."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from PIL import Image

from defense.config import Limits
from defense.console.lens import Lens
from defense.errors import DataError
from defense.fingerprint import fingerprint
from defense.offline.data import read_images
from defense.trail import CALLS_FILE, Incident, read_trail
from tests.conftest import Digits
from tests.console.trails import (
    NEAR,
    NOW,
    REASONS,
    Running,
    desk,
    incident,
    keep_payload,
    name_of,
    picture,
    running,
    tally,
    write_trail,
)
from tests.served import PngHandler, SmallNet, png

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "trail"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def page(running: Running, path: str) -> str:
    answer = running.client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.text


def test_an_empty_trail_is_a_page_that_says_what_to_check(folder: Path, stack: ExitStack) -> None:
    console = stack.enter_context(running(desk(folder)))

    first = page(console, "/")

    assert "Nothing recorded" in first
    assert "audit: {folder: …}" in first
    assert "No incidents" in page(console, "/incidents")
    assert "Nothing to judge by yet" in page(console, "/recalibrate")


def test_the_first_page_says_that_there_is_an_attack_and_leads_to_its_incidents(
    folder: Path, stack: ExitStack
) -> None:
    burst = [tally(minute, accept=50, reject=25) for minute in range(4)]
    write_trail(folder, [*burst, *(incident(number) for number in range(12))])
    console = stack.enter_context(running(desk(folder)))

    first = page(console, "/?minutes=360&refresh=30")

    assert "Attack likely: burn rate 333× since 03:04" in first  # noqa: RUF001
    assert '<meta http-equiv="refresh" content="30">' in first
    assert "All 12 without a call" in first
    assert first.count("/picture.png") == 0
    assert "refresh" not in page(console, "/?minutes=0x&refresh=-1").split("</head>")[0]


def test_an_incident_shows_everything_that_was_written_down(folder: Path, stack: ExitStack) -> None:
    write_trail(folder, [incident(1, payload=keep_payload(folder, 1, picture()))])
    console = stack.enter_context(running(desk(folder)))

    shown = page(console, f"/incidents/{name_of(1)}")

    assert "taken for cat" in shown
    assert "about 1 in 5,000 is as unusual (p-value 0.0002)" in shown
    assert "1 of 2 places in the network read another class, most often dog (1)." in shown
    assert "The witness believes dog (84%)." in shown
    assert 'class="level other" aria-hidden="true"><rect width="61.0%"' in shown
    assert '<span class="mono">3</span> \N{MINUS SIGN}4.2' in shown  # a channel
    image = console.client.get(f"/incidents/{name_of(1)}/picture.png")
    assert image.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(image.content)).size == (8, 8)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"verdict": "error", "p_value": None, "reasons": None}, "The guard itself failed on it"),
        ({"verdict": "failed", "p_value": None, "reasons": None}, "own handler failed on it"),
        (
            {"verdict": "invalid", "reason": "not_an_image", "p_value": None, "reasons": None},
            "no input that the model could be asked about (not an image)",
        ),
        ({"probing": True}, "one of many nearly equal pictures"),
        ({"reasons": None}, "the request got no path, or its guard has not learnt to say why"),
        ({"p_value": 0.0}, "about 1 in 1,000,000,000,000"),
        ({"reasons": REASONS | {"witness": {"class": "cat", "share": 1}}}, "agrees: cat (100%)"),
    ],
)
def test_every_kind_of_incident_has_its_words(
    folder: Path, stack: ExitStack, changes: dict[str, object], says: str
) -> None:
    write_trail(folder, [incident(1, **changes)])
    console = stack.enter_context(running(desk(folder)))

    assert says in page(console, f"/incidents/{name_of(1)}")


def test_a_hostile_string_is_text_wherever_it_is_shown(folder: Path, stack: ExitStack) -> None:
    reasons = json.loads(json.dumps(REASONS).replace("cat", "HOSTILE").replace("dog", "HOSTILE"))
    text = json.dumps(reasons).replace("HOSTILE", json.dumps(HOSTILE)[1:-1])
    hostile = incident(
        1, request=HOSTILE, model=HOSTILE, version=HOSTILE, mode=HOSTILE, reasons=json.loads(text)
    )
    write_trail(folder, [hostile, tally(0, HOSTILE, reject=50)])
    console = stack.enter_context(running(desk(folder)))

    for path in ("/", "/incidents", f"/incidents/{name_of(1)}", "/recalibrate"):
        shown = page(console, path)
        assert "<script" not in shown
        assert "<img src=x" not in shown
        assert "&lt;script&gt;alert(1)" in shown


def test_a_filter_and_a_wrong_address_are_text_as_well(folder: Path, stack: ExitStack) -> None:
    write_trail(folder, [incident(1)])
    console = stack.enter_context(running(desk(folder)))

    shown = console.client.get("/incidents", params={"text": HOSTILE, "verdict": HOSTILE}).text
    assert "<script" not in shown
    assert "None of the 1 incidents fits this filter." in shown
    lost = console.client.get(f"/incidents/{HOSTILE}")
    assert (lost.status_code, "<script" in lost.text) == (404, False)


def test_what_turns_a_line_around_is_written_out(folder: Path, stack: ExitStack) -> None:
    line = incident(1).line().replace(b"request-1", b"abc\\u202egnp.exe")
    write_trail(folder, [])
    (folder / "trail-2.jsonl").write_bytes(line)
    console = stack.enter_context(running(desk(folder)))

    assert "\u202e" not in page(console, f"/incidents/{name_of(1)}")


def test_damaged_lines_are_counted_at_the_top_and_the_rest_is_shown(
    folder: Path, stack: ExitStack
) -> None:
    write_trail(folder, [incident(1)], junk=b'{"v": 1, "kind": "inc\n\x00\xff\n[]\n')
    console = stack.enter_context(running(desk(folder)))

    for path in ("/", "/incidents", f"/incidents/{name_of(1)}", "/recalibrate"):
        assert "3 damaged lines of the audit trail could not be read" in page(console, path)


def test_new_lines_are_shown_without_a_restart(folder: Path, stack: ExitStack) -> None:
    write_trail(folder, [incident(1)])
    console = stack.enter_context(running(desk(folder)))
    assert page(console, "/incidents").count("/incidents/0") == 1

    write_trail(folder, [incident(1), incident(2)])

    assert page(console, "/incidents").count("/incidents/0") == 2


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (
            None,
            "The picture was not kept; &#39;audit: {payloads: {max_mib: 256}}&#39; in guard.yaml",
        ),
        (b"junk", "The payload cannot be shown: not an image."),
        (..., "The picture is no longer kept"),
    ],
)
def test_a_picture_that_cannot_be_shown_says_why(
    folder: Path, stack: ExitStack, payload: object, why: str
) -> None:
    name = None if payload is None else f"{name_of(1)}.bin"
    write_trail(folder, [incident(1, payload=name)])
    if isinstance(payload, bytes):
        keep_payload(folder, 1, payload)
    console = stack.enter_context(running(desk(folder)))

    assert why in page(console, f"/incidents/{name_of(1)}")
    image = console.client.get(f"/incidents/{name_of(1)}/picture.png")
    assert image.headers["content-type"] == "image/svg+xml"


FILTERED: list[Incident] = [
    incident(1),
    incident(2, verdict="flag", model="other"),
    incident(3, verdict="invalid", reasons=None, request="needle"),
]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", [1, 2, 3]),
        ("verdict=flag", [2]),
        ("model=other&verdict=reject", []),
        ("call=attack", [1]),
        ("call=none", [2, 3]),
        ("text=NEEDLE", [3]),
        ("text=DOG", [1, 2]),
        (f"text={name_of(2)}", [2]),
    ],
)
def test_incidents_are_found_by_what_is_asked_for(
    folder: Path, stack: ExitStack, query: str, expected: list[int]
) -> None:
    write_trail(folder, FILTERED)
    over = desk(folder)
    over.call([name_of(1)], "attack")
    console = stack.enter_context(running(over))

    shown = page(console, f"/incidents?{query}")

    assert [n for n in (1, 2, 3) if f"/incidents/{name_of(n)}" in shown] == expected


def test_many_incidents_come_in_pages_that_keep_the_filter(folder: Path, stack: ExitStack) -> None:
    write_trail(folder, [incident(number) for number in range(120)])
    console = stack.enter_context(running(desk(folder)))

    first = page(console, "/incidents?verdict=reject")
    last = page(console, "/incidents?verdict=reject&start=100")

    assert "1 to 50 of 120, newest first." in first
    assert 'href="/incidents?verdict=reject&amp;start=50"' in first
    assert "101 to 120 of 120" in last
    assert "101 to 120 of 120" in page(console, "/incidents?start=999999999")


def test_a_call_is_kept_and_shown_and_the_last_one_counts(folder: Path, stack: ExitStack) -> None:
    write_trail(folder, [incident(1), incident(2)])
    console = stack.enter_context(running(desk(folder)))
    form = {"incident": name_of(1), "back": "incident"}

    for call in ("unsure", "attack"):
        answer = console.client.post("/calls", data=form | {"call": call})
        assert (answer.status_code, answer.headers["location"]) == (
            303,
            f"/incidents/{name_of(1)}?said=1",
        )

    shown = page(console, f"/incidents/{name_of(1)}?said=1")
    assert 'value="attack" aria-pressed="true"' in shown
    assert f'<a href="/incidents/{name_of(2)}">Go on with the next one</a>' in shown
    said = read_trail(folder).calls[name_of(1)]
    assert (said.call, said.by) == ("attack", "ada")
    assert len((folder / CALLS_FILE).read_text().splitlines()) == 2


def test_many_incidents_are_called_at_once_and_none_that_came_later(
    folder: Path, stack: ExitStack
) -> None:
    write_trail(folder, [incident(number) for number in (1, 2, 3)])
    console = stack.enter_context(running(desk(folder)))
    seen = {"upto": incident(1).time.isoformat(), "which": "all", "call": "attack"}
    write_trail(folder, [incident(number) for number in (0, 1, 2, 3)])

    answer = console.client.post(
        "/calls", data=seen | {"filter.verdict": "reject", "filter.call": "none"}
    )

    assert answer.headers["location"] == "/incidents?verdict=reject&call=none&said=3"
    assert set(read_trail(folder).calls) == {name_of(number) for number in (1, 2, 3)}
    assert "3 calls kept." in page(console, answer.headers["location"])


def test_ticked_incidents_are_called_and_no_other(folder: Path, stack: ExitStack) -> None:
    write_trail(folder, [incident(number) for number in (1, 2, 3)])
    console = stack.enter_context(running(desk(folder)))

    ticked = {"incident": [name_of(1), name_of(3), "../etc"], "call": "false_alarm"}
    console.client.post("/calls", data=ticked | {"which": "ticked"})

    assert set(read_trail(folder).calls) == {name_of(1), name_of(3)}


@pytest.mark.parametrize(
    ("form", "status", "says"),
    [
        ({"incident": name_of(1), "call": "maybe"}, 400, "A call is one of attack, false alarm"),
        ({"incident": name_of(1)}, 400, "A call is one of"),
        ({"call": "attack"}, 400, "No incident was chosen"),
        ({"incident": name_of(9), "call": "attack"}, 400, "No incident was chosen"),
        ({"incident": "x" * 300_000, "call": "attack"}, 413, "This form is too long"),
    ],
)
def test_a_call_that_says_nothing_keeps_nothing(
    folder: Path, stack: ExitStack, form: dict[str, str], status: int, says: str
) -> None:
    write_trail(folder, [incident(1)])
    console = stack.enter_context(running(desk(folder)))

    answer = console.client.post("/calls", data=form)

    assert answer.status_code == status
    assert says in answer.text
    assert not (folder / CALLS_FILE).exists()


def test_a_call_that_cannot_be_written_says_so_and_is_not_shown_as_kept(
    folder: Path, stack: ExitStack
) -> None:
    write_trail(folder, [incident(1)])
    (folder / CALLS_FILE).mkdir()
    console = stack.enter_context(running(desk(folder)))

    answer = console.client.post("/calls", data={"incident": name_of(1), "call": "attack"})

    assert answer.status_code == 500
    assert "Cannot write to" in answer.text


def test_an_address_that_is_not_there_says_so(folder: Path, stack: ExitStack) -> None:
    write_trail(folder, [incident(1)])
    console = stack.enter_context(running(desk(folder)))

    for path in (
        f"/incidents/{name_of(2)}",
        f"/incidents/{name_of(2)}/picture.png",
        f"/incidents/{name_of(1)}/saliency.png",
        "/openapi.json",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
    ):
        assert console.client.get(path).status_code == 404
    assert console.client.get("/calls").status_code == 405
    assert console.client.get("/examples/0.png").headers["content-type"] == "image/svg+xml"


def test_clean_pictures_of_the_answer_and_of_what_speaks_against_it_are_shown(
    folder: Path, stack: ExitStack, tmp_path: Path
) -> None:
    for name in ("cat", "dog", "frog"):
        for number in range(8):
            target = tmp_path / "images" / name / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(picture(number))
    write_trail(folder, [incident(1), incident(2, reasons=None)])
    over = desk(folder, examples=read_images(tmp_path / "images"))
    console = stack.enter_context(running(over))

    shown = page(console, f"/incidents/{name_of(1)}")

    assert shown.count('alt="A clean picture of cat"') == 6
    assert shown.count('alt="A clean picture of dog"') == 6
    assert "A clean picture of frog" not in shown
    assert console.client.get("/examples/3.png").headers["content-type"] == "image/png"
    assert console.client.get("/examples/99.png").headers["content-type"] == "image/svg+xml"
    assert "No class of the clean pictures" in page(console, f"/incidents/{name_of(2)}")


def test_the_clean_pictures_with_the_nearest_paths_are_shown_or_named(
    folder: Path, stack: ExitStack, tmp_path: Path
) -> None:
    for name in ("cat/0.png", "dog/3.png"):
        target = tmp_path / "images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(picture())
    write_trail(folder, [incident(1, reasons=REASONS | NEAR), incident(2)])
    over = desk(folder, examples=read_images(tmp_path / "images"))
    console = stack.enter_context(running(over))

    shown = page(console, f"/incidents/{name_of(1)}")
    near = shown.partition("Clean pictures with the nearest paths")[2].partition("</section>")[0]

    assert near.count("<img") == 2
    assert '<figcaption class="text">dog 0.91</figcaption>' in near
    assert "elsewhere/9.png: dog 1.10" in near
    assert "overlaps the pathway of the answer by 22% and most that of dog (77%)." in shown
    assert "Strays lie at layer2.0.relu (2)." in shown
    assert "nearest paths" not in page(console, f"/incidents/{name_of(2)}")


def test_what_the_desk_has_not_got_it_says(folder: Path) -> None:
    over = desk(write_trail(folder, [incident(1), incident(2, payload=f"{name_of(2)}.bin")]))

    with pytest.raises(DataError, match="there is no example 3; open one from the page of an inci"):
        over.example(3)
    with pytest.raises(DataError, match="the picture was not kept; 'audit: "):
        over.payload(over.cases[name_of(1)])
    with pytest.raises(DataError, match=r"the picture is no longer kept; raise audit\.payloads"):
        over.payload(over.cases[name_of(2)])


def test_an_attribution_is_computed_when_it_is_asked_for(
    folder: Path, stack: ExitStack, trained: SmallNet, digits: Digits
) -> None:
    network = fingerprint(trained)
    sent = keep_payload(folder, 1, png(digits.images[0]))
    write_trail(
        folder,
        [incident(1, payload=sent, fingerprint=network), incident(2, payload=sent), incident(3)],
    )
    over = desk(folder, lens=Lens(PngHandler(trained), Limits(), budget=60))
    console = stack.enter_context(running(over))
    path = f"/incidents/{name_of(1)}"

    assert "integrated gradients" in page(console, path)
    assert console.client.get(f"{path}/saliency.png").status_code == 404
    shown = page(console, f"{path}?method=saliency")
    assert f'src="{path}/saliency.png"' in shown
    assert "orange\nmattered for" in shown
    neurons = shown.partition("What the answer rests on")[2].partition("</table>")[0]
    assert neurons.count('<th scope="row"') == 5
    assert "What the answer rests on" not in page(console, path)
    assert console.client.get(f"{path}/saliency.png").content.startswith(b"\x89PNG")
    assert "No attribution method &#39;salency&#39;" in page(console, f"{path}?method=salency")
    assert "Another network" in page(console, f"/incidents/{name_of(2)}?method=saliency")
    assert "no attribution without the picture" in page(console, f"/incidents/{name_of(3)}")


def test_the_recalibration_page_shows_the_proposal_and_changes_nothing(
    folder: Path, stack: ExitStack
) -> None:
    """Flagged requests that were called attacks would be refused at a larger reject rate."""
    flagged = [incident(number, verdict="flag", p_value=0.002) for number in range(30)]
    histogram = {0.001: 0, 0.003: 30, 0.01: 0, 0.1: 90, 1.0: 880}
    counted = tally(0, accept=970, flag=30).model_copy(update={"p_values": histogram})
    write_trail(folder, [*flagged, counted])
    over = desk(folder)
    over.call([name_of(number) for number in range(30)], "attack")
    console = stack.enter_context(running(over))
    before = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}

    shown = page(console, "/recalibrate")

    assert "30 attacks and 0 false alarms called" in shown
    assert "A proposal, and the same traffic under both" in shown
    row = '<th scope="row">called attacks rejected</th><td class="number">0</td><td class="number">'
    assert f"{row}<b>30</b></td>" in shown
    assert "Nothing is changed here." in shown
    assert f"pathguard recalibrate --trail {folder} --config guard.yaml --write" in shown
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == before


def test_times_are_told_with_their_day_only_where_it_is_another(
    folder: Path, stack: ExitStack
) -> None:
    write_trail(folder, [incident(1), incident(2, time=NOW - timedelta(days=2))])
    console = stack.enter_context(running(desk(folder)))

    shown = page(console, "/incidents")

    assert ">03:06:30</a>" in shown
    assert ">2026-03-02 03:07:30</a>" in shown
