"""Faults of the guard's own parts, of the backbone, and of guard.yaml, in workers that go on."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import sleep

from tests.campaigns.injected import SLOW_SECONDS
from tests.campaigns.scene import Scene, wait_until

RESULTS = ("applied", "invalid")
SLOW_LINES, LINE_SECONDS = 8, 0.2
"""Slower than anything writes, and faster than a worker looks twice."""


@dataclass(frozen=True)
class Seen:
    """What a fault did; `kept` says whether that is what is promised, None where it was not caused."""

    kept: bool | None
    text: str


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, the promise for it, and the metric or alert that shows it."""

    name: str
    promise: str
    shown_by: str
    cause: Callable[[Scene], Seen]


def failing_guard(on: Scene, *, fault: str, stage: str, closed: bool) -> Seen:
    """Let a part of the guard fail for every request; then let it be well again."""
    on.configure(on_error="closed" if closed else "open")
    count = len(on.images)
    errors = on.metric("errors_total", stage=stage)
    verdicts = on.metric("requests_total", verdict="error")
    with on.injected(fault):
        found = on.ask()
    after = on.ask()
    errors = on.metric("errors_total", stage=stage) - errors
    verdicts = on.metric("requests_total", verdict="error") - verdicts
    kept = (
        found.all(503 if closed else 200, "error")
        and errors == verdicts == count
        and after.all(200, "accept")
    )
    return Seen(
        kept,
        f"{found.text}; errors of the stage +{errors:g}, `error` verdicts +{verdicts:g}; "
        f"afterwards {after.text}",
    )


def out_of_memory_in_batches(on: Scene) -> Seen:
    """Let every forward pass of more than one row run out of memory."""
    on.configure()
    with on.injected("forward out of memory in batches"):
        found = on.ask()
    return Seen(found.all(200, "accept"), found.text)


def out_of_memory(on: Scene) -> Seen:
    """Let every forward pass run out of memory."""
    on.configure()
    failed = on.metric("errors_total", stage="handler")
    before = on.guarded.workers()
    with on.injected("forward out of memory"):
        found = on.ask()
    after = on.ask()
    failed = on.metric("errors_total", stage="handler") - failed
    alive = on.guarded.workers() == before
    kept = found.all(503, "failed") and failed == len(on.images) and after.all(200, "accept")
    return Seen(
        kept and alive,
        f"{found.text}; errors of the stage +{failed:g}; "
        f"{'no worker died' if alive else 'a worker died'}; afterwards {after.text}",
    )


def no_time_for_second_looks(on: Scene) -> Seen:
    """Give second looks less time than one of them takes."""
    on.configure(second_look={"below_p": 0.9, "budget_ms": 0.001})
    doubtful = on.metric("second_looks_total")
    late = on.metric("second_looks_total", result="out_of_time")
    found = on.ask()
    doubtful = on.metric("second_looks_total") - doubtful
    late = on.metric("second_looks_total", result="out_of_time") - late
    return Seen(
        found.all(200, "accept") and late == doubtful > 0,
        f"{found.text}; {late:g} of {doubtful:g} second looks out of time",
    )


def edit_in_mid_batch(on: Scene) -> Seen:
    """Exchange rules that refuse everything for ones that only watch, while a batch is computed."""
    on.configure(reject={"score": -1e9}, second_look={"budget_ms": 0})
    with ThreadPoolExecutor(1) as pool, on.injected("slow forward"):
        asked = pool.submit(on.ask)
        sleep(SLOW_SECONDS / 3)  # the batch is in its forward pass
        on.guarded.config.write_text(on.document(mode="shadow"))
        found = asked.result()
    # Two batches of two may have been made of it, one after the other: no mixture is none of these.
    wait_until(lambda: on.ask().all(200, ""), "the edit was in force")
    return Seen(found.all(403, "reject"), f"that batch {found.text}; the next 200, as it says")


def slow_writing(on: Scene) -> Seen:
    """Write guard.yaml line by line, each a little after the other; its beginning is valid alone."""
    on.configure(mode="flag", reject={"score": -1e9})
    counts = {result: on.metric("config_reloads_total", result=result) for result in RESULTS}
    lines = on.document(mode="enforce").splitlines(keepends=True)
    with on.reloads("applied"), on.guarded.config.open("w") as file:
        for line in lines[:SLOW_LINES]:
            file.write(line)
            file.flush()
            sleep(LINE_SECONDS)
        file.writelines(lines[SLOW_LINES:])
    more = {r: on.metric("config_reloads_total", result=r) - counts[r] for r in RESULTS}
    workers = len(on.guarded.workers())
    return Seen(
        more == {"applied": workers, "invalid": 0} and on.ask().all(200, "accept"),
        f"in {workers} workers {more['applied']:g} edits applied and {more['invalid']:g} invalid",
    )


def _delete(config: Path, _text: str) -> None:
    config.unlink()


def _halve(config: Path, text: str) -> None:
    config.write_text(text[: text.index("score:") + 3])


def _empty(config: Path, _text: str) -> None:
    config.write_text("")


def _misspell(config: Path, text: str) -> None:
    config.write_text(text.replace("reject:", "rejct:"))


def _promise_too_much(config: Path, text: str) -> None:
    config.write_text("defaults: {reject: {target_fpr: 1.0e-9}}")


def _make_folder(config: Path, _text: str) -> None:
    config.unlink()
    config.mkdir()


def _make_unreadable(config: Path, _text: str) -> None:
    config.unlink()
    config.symlink_to(config)  # root may read whatever exists


EDITS: dict[str, Callable[[Path, str], None]] = {
    "deleted": _delete,
    "half-written": _halve,
    "emptied": _empty,
    "with a misspelt key": _misspell,
    "promising a rate that was never calibrated": _promise_too_much,
    "replaced by a folder": _make_folder,
    "unreadable": _make_unreadable,
}


def broken_config(on: Scene, *, edit: Callable[[Path, str], None], kill: bool = False) -> Seen:
    """Break guard.yaml, look whether the settings stay, also in a fresh worker, and mend it."""
    config = on.guarded.config
    on.configure(mode="flag", reject={"score": -1e9})
    with on.reloads("invalid"):
        edit(config, config.read_text())
    said = on.guarded.log().count("guard.yaml was not applied")
    state = on.metric("config_valid")
    if kill:
        pids = on.guarded.workers()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: bool(on.ask().statuses) and on.ready(len(pids)), "the workers are back")
    found = on.ask()
    still = on.metric("config_valid")
    if config.is_dir():
        shutil.rmtree(config)
    on.configure()
    wait_until(lambda: on.metric("config_valid") == 1, "the file is valid again")
    return Seen(
        found.all(200, "flag") and state == still == 0 and said > 0,
        f"{found.text}, as before; reloads{{invalid}} +1 per worker, config_valid {still:g}, "
        "1 when mended",
    )


def _of_guard(name: str, fault: str, stage: str) -> list[Fault]:
    shown = f'`pathguard_errors_total{{stage="{stage}"}}`, `PathGuardErrors`'
    open_, closed = "answered, verdict `error`", "refused with 503, verdict `error`"
    return [
        Fault(
            f"{name} ({kind})",
            f"{promise}; the next batch is judged",
            shown,
            partial(failing_guard, fault=fault, stage=stage, closed=kind == "closed"),
        )
        for kind, promise in (("open", open_), ("closed", closed))
    ]


_CONFIG_SHOWN = "`pathguard_config_valid` 0, `PathGuardConfigInvalid`"
FAULTS = (
    *_of_guard("detector raises", "detector raises", "score"),
    *_of_guard("detector gives NaN", "detector gives NaN", "score"),
    *_of_guard("detector hangs", "detector hangs", "timeout"),
    *_of_guard("CUDA out of memory in the detector", "detector out of memory", "score"),
    *_of_guard("witness fails", "witness fails", "witness"),
    Fault(
        "CUDA out of memory in a batch's forward pass",
        "its requests are run one by one and answered",
        "TorchServe's latency",
        out_of_memory_in_batches,
    ),
    Fault(
        "CUDA out of memory in every forward pass",
        "each request 503; the worker lives and the next batch is answered",
        '`pathguard_errors_total{stage="handler"}`, `PathGuardErrorTrickle`',
        out_of_memory,
    ),
    Fault(
        "second look out of time",
        "judged by the first look alone",
        '`pathguard_second_looks_total{result="out_of_time"}`',
        no_time_for_second_looks,
    ),
    Fault(
        "guard.yaml edited while a batch runs",
        "one set of rules for all of that batch, the new one for the next",
        "`pathguard_mode`",
        edit_in_mid_batch,
    ),
    Fault(
        "guard.yaml written line by line",
        "applied once, when it is whole",
        "`pathguard_config_reloads_total`",
        slow_writing,
    ),
    *(
        Fault(
            f"guard.yaml {name}",
            "the settings in force stay",
            _CONFIG_SHOWN,
            partial(broken_config, edit=edit),
        )
        for name, edit in EDITS.items()
    ),
    Fault(
        "guard.yaml half-written and all workers killed",
        "fresh workers go on with the settings in force",
        _CONFIG_SHOWN,
        partial(broken_config, edit=_halve, kill=True),
    ),
)
