"""What the Dockerfile says, so that the tests run its own commands in its own environment."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Stage:
    """One stage: its instructions in order, as (word, arguments)."""

    instructions: tuple[tuple[str, str], ...]

    def all(self, word: str) -> list[str]:
        """Return the arguments of every instruction of a kind."""
        return [text for found, text in self.instructions if found == word]

    def last(self, word: str) -> str:
        """Return the arguments of the one that counts."""
        return self.all(word)[-1]

    @property
    def environment(self) -> dict[str, str]:
        pairs = [pair for text in self.all("ENV") for pair in text.split()]
        return dict(pair.split("=", 1) for pair in pairs)

    @property
    def entry_point(self) -> list[str]:
        return _exec_form(self.last("ENTRYPOINT"))

    @property
    def health_check(self) -> list[str]:
        return _exec_form(self.last("HEALTHCHECK"))

    @property
    def user(self) -> int:
        return int(self.last("USER").split(":")[0])


def read_stages(path: Path = ROOT / "Dockerfile") -> list[Stage]:
    """Return the stages, without what comes before the first."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    instructions = [tuple(line.split(maxsplit=1)) for line in lines]
    starts = [i for i, (word, _) in enumerate(instructions) if word == "FROM"]
    ends = [*starts[1:], len(instructions)]
    return [
        Stage(tuple((word, text) for word, text in instructions[start:end]))
        for start, end in zip(starts, ends, strict=True)
    ]


def _exec_form(text: str) -> list[str]:
    command: list[str] = json.loads(text[text.index("[") :])
    return command
