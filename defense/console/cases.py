"""An incident in words that help somebody who has never seen one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from defense.console.words import MISSING, VERDICTS, p_value, percent, plain, spaced
from defense.trail import Incident

FULL = 8.0
"""Standard deviations that fill a bar, where nothing on the page is larger."""
SILENT = (
    "Nothing is known of this: the request got no path, or its guard has not learnt to say why."
)
UNSCORED = {
    "invalid": "It was no input that the model could be asked about ({reason}), so it was refused "
    "unscored.",
    "failed": "The archive's own handler failed on it, so there is no answer and nothing was scored.",
    "error": "The guard itself failed on it: nobody knows whether it was an attack.",
}


@dataclass(frozen=True)
class VoteBar:
    """A vote as it is drawn: `other` where it is not for the answer."""

    site: str
    label: str
    share: float
    other: bool


@dataclass(frozen=True)
class SiteBar:
    """An unusual site as it is drawn; share in [0, 1]: length of its bar."""

    name: str
    deviation: float
    share: float
    channels: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Case:
    """An incident with the call that counts, if there is one, and what is said about it."""

    incident: Incident
    call: str | None = None

    @property
    def _reasons(self) -> Mapping[str, Any]:
        """What the trail's reader has made sure of, or nothing."""
        return self.incident.reasons or {}

    @property
    def _witness(self) -> Mapping[str, Any] | None:
        return self._reasons.get("witness")

    @property
    def predicted(self) -> str | None:
        """The class that the network answered, or would have."""
        return self._reasons.get("predicted")

    @property
    def other(self) -> str | None:
        """The class that speaks most against the answer: the witness's, or the runner-up."""
        witness = self._witness
        if witness is not None and witness["class"] != self.predicted:
            return str(witness["class"])
        return self._reasons.get("runner_up")

    @property
    def reason(self) -> str | None:
        """Why the request was invalid."""
        return None if self.incident.reason is None else spaced(self.incident.reason)

    @property
    def silent(self) -> str:
        return SILENT

    @property
    def title(self) -> str:
        if self.predicted is None:
            return self.reason or VERDICTS.get(self.incident.verdict, self.incident.verdict)
        return f"taken for {self.predicted}"

    @property
    def story(self) -> str:
        """Tell in a few sentences what is known."""
        incident, said = self.incident, []
        if incident.verdict in UNSCORED:
            reason = plain(self.reason or "without a reason")
            said.append(UNSCORED[incident.verdict].format(reason=reason))
        if incident.p_value is not None:
            said.append(
                "Its path through the network is unusual for this answer: of clean requests about 1 in "
                f"{max(1, round(1 / max(incident.p_value, 1e-12))):,} is as unusual (p-value "
                f"{p_value(incident.p_value)})."
            )
        if incident.probing:
            said.append(
                "It is one of many nearly equal pictures, as an attack by queries sends them."
            )
        return " ".join([*said, *self._disagreement()])

    def _disagreement(self) -> list[str]:
        said = []
        votes = [vote["class"] for vote in self._reasons.get("votes", ())]
        against = Counter(name for name in votes if name != self.predicted)
        if against:
            name, count = against.most_common(1)[0]
            said.append(
                f"{against.total()} of {len(votes)} places in the network read another class, most "
                f"often {plain(name)} ({count})."
            )
        if (witness := self._witness) is not None:
            what = "agrees:" if witness["class"] == self.predicted else "believes"
            name = plain(witness["class"])
            said.append(f"The witness {what} {name} ({percent(witness['share'])}).")
        return said

    @property
    def votes(self) -> list[VoteBar]:
        """What every site reads, first to last, and at the end what the witness believes."""
        found = [(vote["site"], vote) for vote in self._reasons.get("votes", ())]
        if self._witness is not None:
            found.append(("witness", self._witness))
        return [
            VoteBar(site, b["class"], min(1.0, max(0.0, b["share"])), b["class"] != self.predicted)
            for site, b in found
        ]

    @property
    def sites(self) -> list[SiteBar]:
        """The most unusual sites, most unusual first."""
        found = self._reasons.get("sites", ())
        full = max([FULL, *(site["deviation"] for site in found)])
        return [
            SiteBar(s["site"], s["deviation"], max(0.0, s["deviation"] / full), s["channels"])
            for s in found
        ]

    @property
    def near(self) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
        """The clean images with the nearest paths, of any class and of the answer, where known."""
        titles = {"nearest_clean": "of any class", "nearest_predicted": "of the answer"}
        found = [(title, self._reasons.get(key) or ()) for key, title in titles.items()]
        return [(title, near) for title, near in found if near]

    @property
    def pathway(self) -> str | None:
        """Say how the request keeps to the pathways of classes, where its guard knows any."""
        found = self._reasons.get("pathway")
        if found is None:
            return None
        best = found["best"]
        strays = ", ".join(
            f"{plain(one['site'])} ({len(one['channels'])})" for one in found["strays"]
        )
        return (
            f"It opens {percent(found['open'])} of the channels, overlaps the pathway of the answer "
            f"by {percent(found['own'])} and most that of {plain(best['class'])} "
            f"({percent(best['share'])})." + (f" Strays lie at {strays}." if strays else "")
        )

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Everything else that was written down, by name."""
        incident = self.incident
        targets = [f"{tier} {percent(rate)}" for tier, rate in incident.target_fpr.items()]
        return [
            ("time", f"{incident.time:%Y-%m-%d %H:%M:%S.%f}"[:-3]),
            ("request", incident.request),
            ("model", f"{incident.model} {incident.version}"),
            ("guard", incident.fingerprint[:16]),
            ("mode", incident.mode),
            ("p-value", p_value(incident.p_value)),
            ("score", p_value(incident.score)),
            ("targets", ", ".join(targets)),
            ("runner-up", self._reasons.get("runner_up") or MISSING),
            ("incident", incident.id),
        ]

    def fits(self, asked: Mapping[str, str]) -> bool:
        """Say whether this is one of those that a filter asks for; "" asks for any.

        call: one of CALLS, or "none". text: part of the request's id, of a class or of the own id.
        """
        incident = self.incident
        exact = {
            "model": incident.model,
            "verdict": incident.verdict,
            "call": self.call or "none",
        }
        texts = (incident.request, incident.id, self.predicted, self.other)
        wanted = asked["text"].casefold()
        return all(asked[key] in ("", value) for key, value in exact.items()) and any(
            wanted in (text or "").casefold() for text in texts
        )
