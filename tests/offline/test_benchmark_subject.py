"""What a study keeps of its attacks and runs, and which networks and images it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from defense.errors import DataError
from defense.offline.attacks import Attack
from defense.offline.benchmark import subject as subjects
from defense.offline.data import ImageSet
from tests.offline.studied import InProcess, rows_run, serve, spread, studied

ROWS = torch.tensor([7, 400, 3, 90, 211])


class Counting:
    """An attack's function that inverts images; it is interrupted at its n-th call."""

    def __init__(self, stop: int = 0) -> None:
        self.calls, self.stop = 0, stop

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return 1 - images


def inverting(counting: Counting) -> Attack:
    return spread("invert", counting)


def test_what_was_attacked_and_run_is_read_again(
    weak_card: Path, weak_set: ImageSet, tmp_path: Path
) -> None:
    served, counting = serve(weak_card), Counting()
    with rows_run(served.backbone) as opened, studied(served, weak_set, tmp_path) as first:
        before = sum(opened)
        pixels = first.attacked(inverting(counting), ROWS)
        sample = first.runs("inverted", pixels)
        assert sum(opened) > before
    with rows_run(served.backbone) as again, studied(served, weak_set, tmp_path) as second:
        start = sum(again)
        kept = second.attacked(inverting(counting), ROWS)
        found = second.runs("inverted", kept)
        assert sum(again) == start
    assert counting.calls == 1
    # Opened again, the paths of all images are read as well.
    assert before - start == len(weak_set)
    assert torch.equal(kept, pixels)
    assert torch.equal(found.pixels, sample.pixels)
    assert torch.equal(found.routed.path, sample.routed.path)
    assert torch.equal(second.predicted, first.predicted)


def test_a_killed_study_goes_on_after_the_last_whole_chunk(
    weak_card: Path, weak_set: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subjects, "CHUNK", 2)
    served, killed, going_on = serve(weak_card), Counting(stop=3), Counting()
    with studied(served, weak_set, tmp_path) as subject:
        with pytest.raises(KeyboardInterrupt):
            subject.attacked(inverting(killed), ROWS)
        pixels = subject.attacked(inverting(going_on), ROWS)
    assert going_on.calls == 1
    assert torch.equal(pixels, 255 - subject.pixels[ROWS])


def test_runs_without_a_witness_are_not_taken_for_runs_with_one(
    weak_card: Path, weak_set: ImageSet, tmp_path: Path
) -> None:
    served, counting = serve(weak_card), Counting()
    looks = []
    for witness in (None, weak_card):
        with studied(served, weak_set, tmp_path, witness) as subject:
            pixels = subject.attacked(inverting(counting), ROWS)
            looks.append(subject.runs("inverted", pixels).routed.look)
    assert looks == ["path+echoes", "path+witness+echoes"]
    assert counting.calls == 1


def test_runs_are_those_of_the_pixels_whatever_they_are_called(
    weak_card: Path, weak_set: ImageSet, tmp_path: Path
) -> None:
    with studied(serve(weak_card), weak_set, tmp_path) as subject:
        own = subject.runs("these", subject.pixels[ROWS]).routed
        other = subject.runs("these", subject.pixels[ROWS + 1]).routed
        assert not torch.equal(own.path, other.path)
        assert torch.equal(own.predicted, subject.predicted[ROWS])
        logits = subject.model(subject.pixels[ROWS].float() / 255)
    torch.testing.assert_close(own.logits, logits, atol=1e-4, rtol=1e-4)


def test_images_and_labels_are_in_one_order(
    weak_card: Path, weak_set: ImageSet, tmp_path: Path
) -> None:
    with studied(serve(weak_card), weak_set, tmp_path) as subject:
        brightest = subject.pixels.float().mean((2, 3)).argmax(1)
        known = [subject.labelling.names[label] for label in subject.labels.tolist()]
        assert known == [Path(name).parent.name for name in weak_set.names]
        assert (brightest == subject.labels).float().mean() > 0.95
        assert 0.85 < subject.right.float().mean() < 1


def resized(image: Image.Image) -> Image.Image:
    return image.resize((16, 16)).crop((2, 2, 14, 14))


def test_a_network_behind_an_archive_that_resizes_is_refused(
    weak_card: Path, weak_set: ImageSet, tmp_path: Path
) -> None:
    served: InProcess = serve(weak_card, prepare=resized)
    said = "images sent as PNGs do not reach this archive's backbone as they are"
    with pytest.raises(DataError, match=said), studied(served, weak_set, tmp_path):
        pass


def test_images_without_labels_are_refused(
    weak_card: Path, weak_set: ImageSet, tmp_path: Path
) -> None:
    unlabelled = replace(weak_set, labels=None, class_names=())
    said = "a study needs labels and these images have none"
    with pytest.raises(DataError, match=said), studied(serve(weak_card), unlabelled, tmp_path):
        pass


def test_classes_that_the_network_does_not_know_are_refused(
    weak_card: Path, weak_set: ImageSet, tmp_path: Path
) -> None:
    assert weak_set.labels is not None
    finer = tuple(label + row % 2 * (label == 2) for row, label in enumerate(weak_set.labels))
    unknown = replace(weak_set, labels=finer, class_names=("blue", "green", "crimson", "scarlet"))
    said = "the network does not know their classes"
    with pytest.raises(DataError, match=said), studied(serve(weak_card), unknown, tmp_path):
        pass
