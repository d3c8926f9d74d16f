"""What an answer rests on, in picture and network: on demand, one at a time, within a budget."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Overdue
from dataclasses import dataclass

import torch
from torch import Tensor

from defense.config import Limits
from defense.console.pictures import heat_map, opening
from defense.errors import ConfigError, DataError, SiteError, nearest
from defense.fingerprint import fingerprint
from defense.influence import Influence, influential
from defense.offline.collect import Served, backbone_inputs
from defense.sites import device_of, discover_sites, first_tensor
from defense.types import PathLayout

KEPT = 64
"""Attributions that are kept for the browser to ask for."""


@dataclass(frozen=True)
class Seen:
    """An attribution as a picture, and the neurons without which the answer's logit falls most.

    signed: it says what spoke against the class as well. neurons: empty where none can be set to zero.
    """

    png: bytes
    signed: bool
    neurons: tuple[Influence, ...] = ()


class Lens:
    """Attributions of the network of an opened archive.

    budget: seconds that a page waits for one. What takes longer goes on, and is there at a later
    visit; meanwhile no other is begun, because a thread cannot be ended and two would be slower.
    """

    def __init__(self, served: Served, limits: Limits, *, budget: float) -> None:
        self._served = served
        self._limits = limits
        self._budget = budget
        self._busy = threading.Lock()
        self._kept: dict[tuple[str, str], Seen] = {}
        self._fingerprint = fingerprint(served.backbone)

    @property
    def methods(self) -> tuple[str, ...]:
        from defense.attributions import METHODS

        return tuple(METHODS)

    def kept(self, incident: str, method: str) -> Seen | None:
        """Return the attribution of an incident's payload, where it is done."""
        return self._kept.get((incident, method))

    def look(self, incident: str, payload: bytes, method: str, network: str) -> Seen:
        """Attribute the answer to an incident's payload by `method`.

        network: fingerprint of the network that answered, or its beginning. ConfigError for an
        unknown method, DataError says why there is no attribution.
        """
        if method not in self.methods:
            raise ConfigError(f"no attribution method '{method}'{nearest(method, self.methods)}")
        if not network or not self._fingerprint.startswith(network):
            raise DataError(
                f"another network ({network[:16]}) answered this request than --archive holds "
                f"({self._fingerprint[:16]}); start the console with the archive that was served then"
            )
        if (found := self.kept(incident, method)) is not None:
            return found
        if not self._busy.acquire(blocking=False):
            raise DataError(
                "another attribution is being computed; load this page again in a moment"
            )
        done = self._begin(lambda: self._keep(incident, method, self._compute(payload, method)))
        try:
            return done.result(self._budget)
        except Overdue:
            raise DataError(
                f"the attribution takes longer than {self._budget:g} s and goes on; load this page "
                "again later, or choose a quicker method"
            ) from None

    def _begin(self, work: Callable[[], Seen]) -> Future[Seen]:
        """Run `work` in a thread that is left behind at the end; it holds `_busy` until it is done."""
        done: Future[Seen] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)
            finally:
                self._busy.release()

        threading.Thread(target=run, daemon=True, name="attribution").start()
        return done

    def _keep(self, incident: str, method: str, seen: Seen) -> Seen:
        self._kept[incident, method] = seen
        while len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        return seen

    def _compute(self, payload: bytes, method: str) -> Seen:
        from defense.attributions import attribute, heatmap

        model = self._served.backbone
        with opening(payload, self._limits):
            try:
                inputs = backbone_inputs(self._served, [payload])[:1].to(device_of(model))
            except Exception as error:
                raise DataError("the archive's handler cannot read this payload") from error
        with torch.inference_mode():
            logits = first_tensor(model(inputs))
        if inputs.dim() != 4 or logits is None:
            raise DataError("the network in this archive takes no images, so nothing can be drawn")
        values = heatmap(attribute(method, model, inputs, logits.argmax(1)))[0].cpu()
        picture = heat_map(values, inputs[0].cpu())
        return Seen(picture, bool((values < 0).any()), self._neurons(inputs, int(logits.argmax())))

    def _neurons(self, inputs: Tensor, label: int) -> tuple[Influence, ...]:
        model = self._served.backbone
        try:
            layout = PathLayout(discover_sites(model, inputs), ("mean",))
            return influential(model, layout, inputs, label)
        except SiteError:  # parts of a graph cannot be set to zero
            return ()
