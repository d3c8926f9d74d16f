"""Training of the demo's backbone: resumable, seeded, and honest about files that do not fit."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from defense.errors import ArtifactError, ConfigError, DataError
from defense.offline.networks import Architecture, CifarResNet, Normalisation
from defense.offline.training import (
    TrainingSettings,
    batches,
    calibration_error,
    evaluate,
    hidden,
    learning_rate,
    read_split,
    reflected,
    shifted,
    train,
    whiten,
)
from tests.coloured import (
    SETTINGS,
    TINY,
    coloured_images,
    interrupt_at,
    same_tensors,
    silent,
    tiny_network,
    write_folder,
)


@pytest.mark.parametrize("call", [1, 3, 4, 8, 12])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, call: int
) -> None:
    images = coloured_images()
    whole, resumed = tiny_network(), tiny_network()
    expected = train(whole, images, SETTINGS, checkpoint=tmp_path / "a", console=silent())
    undo = interrupt_at(resumed, call)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, images, SETTINGS, checkpoint=tmp_path / "b", console=silent())
    undo()
    torch.manual_seed(77)
    restarted = CifarResNet(TINY) if (tmp_path / "b").exists() else tiny_network()
    history = train(restarted, images, SETTINGS, checkpoint=tmp_path / "b", console=silent())
    assert same_tensors(whole, restarted)
    assert [record.loss for record in history] == [record.loss for record in expected]


def test_a_finished_checkpoint_gives_its_weights_back_without_another_step(tmp_path: Path) -> None:
    images, first, second = coloured_images(), tiny_network(), CifarResNet(TINY)
    history = train(first, images, SETTINGS, checkpoint=tmp_path / "c", console=silent())
    interrupt_at(second, 1)
    assert train(second, images, SETTINGS, checkpoint=tmp_path / "c", console=silent()) == history
    assert same_tensors(first, second)


def test_training_learns_and_reports_every_epoch(tmp_path: Path) -> None:
    images, network, console = coloured_images(200), tiny_network(), silent()
    settings = replace(SETTINGS, epochs=6, average_decay=0.5, small_epochs=0)
    history = train(
        network, images, settings, checkpoint=tmp_path / "c", validation=images, console=console
    )
    assert [record.epoch for record in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1].loss < history[0].loss
    assert evaluate(network, images, images.normalisation).accuracy > 0.9
    assert isinstance(console.file, StringIO)
    assert "epoch 6: loss" in console.file.getvalue()


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    images, path = coloured_images(), tmp_path / "c"
    train(tiny_network(), images, SETTINGS, checkpoint=path, console=silent())
    other = tiny_network(replace(TINY, widths=(6, 10)))
    message = r"belongs to another run: its shape of head\.weight is \[3, 8\], here it is \[3, 10\]"
    with pytest.raises(ArtifactError, match=message):
        train(other, images, SETTINGS, checkpoint=path, console=silent())


def test_a_checkpoint_of_other_settings_or_images_is_refused(tmp_path: Path) -> None:
    images, path = coloured_images(), tmp_path / "c"
    train(tiny_network(), images, SETTINGS, checkpoint=path, console=silent())
    with pytest.raises(ArtifactError, match="its seed is 3, here it is 4; remove the file"):
        train(tiny_network(), images, replace(SETTINGS, seed=4), checkpoint=path)
    with pytest.raises(ArtifactError, match="its number of images is 50, here it is 51"):
        train(tiny_network(), coloured_images(51), SETTINGS, checkpoint=path)


def test_a_checkpoint_in_which_other_weights_were_frozen_is_refused(tmp_path: Path) -> None:
    images, frozen, path = coloured_images(), tiny_network(), tmp_path / "c"
    whiten(frozen, images)
    train(frozen, images, SETTINGS, checkpoint=path, console=silent())
    with pytest.raises(ArtifactError, match="other weights were frozen"):
        train(tiny_network(), images, SETTINGS, checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="is no readable training checkpoint"):
        train(tiny_network(), coloured_images(), SETTINGS, checkpoint=path)


def test_a_diverging_run_ends_with_a_sentence_and_no_checkpoint(tmp_path: Path) -> None:
    settings = replace(SETTINGS, learning_rate=1e30)
    with pytest.raises(ConfigError, match=r"diverged in epoch \d .*learning_rate below 1e\+30"):
        train(tiny_network(), coloured_images(), settings, checkpoint=tmp_path / "c")


def test_fewer_images_than_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one batch of 16 images, got 5"):
        train(tiny_network(), coloured_images(5), SETTINGS, checkpoint=tmp_path / "c")


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": -1}, {"warmup": 1.0}])
def test_settings_that_no_run_can_follow_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(SETTINGS, **wrong)  # type: ignore[arg-type]


def test_architectures_that_describe_no_network_are_refused() -> None:
    with pytest.raises(ValueError, match="one depth and one width per stage"):
        Architecture(depths=(1, 2), widths=(8,))
    with pytest.raises(ValueError, match="at least 1"):
        Architecture(depths=(1, 0), widths=(8, 8))


def test_the_output_for_an_image_does_not_depend_on_the_batch() -> None:
    network, images = tiny_network(), coloured_images()
    x = images.normalisation(images.pixels)
    network.train()(x)
    network.eval()
    with torch.no_grad():
        together = network(x)
        alone = torch.cat([network(x[row : row + 1]) for row in range(len(x))])
        reversed_order = network(x.flip(0)).flip(0)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reversed_order, together, rtol=1e-5, atol=1e-5)


def test_hooks_see_every_block_and_every_activation() -> None:
    network, seen = tiny_network().eval(), dict[str, tuple[int, ...]]()
    for name, module in network.named_modules():
        if isinstance(module, nn.ReLU) or name.count(".") == 2:
            module.register_forward_hook(
                lambda _module, _args, output, name=name: seen.update({name: tuple(output.shape)})
            )
    network(torch.zeros(1, 3, 12, 12))
    assert seen["stem.2"] == (1, 4, 12, 12)
    assert seen["stages.0.0"] == seen["stages.0.0.relu2"] == (1, 6, 6, 6)
    assert seen["stages.1.1"] == seen["stages.1.1.relu1"] == (1, 8, 3, 3)


def test_every_epoch_mirrors_the_images_that_the_one_before_did_not() -> None:
    images = coloured_images(16)
    still = replace(SETTINGS, crop=0, cutout=0, small_epochs=0)

    def epoch(number: int) -> set[bytes]:
        return {x.numpy().tobytes() for x in next(batches(images, still, number))[0].contiguous()}

    plain = images.normalisation(images.pixels)
    mirrored = images.normalisation(images.pixels.flip(3))
    both = {x.numpy().tobytes() for x in torch.cat([plain, mirrored]).contiguous()}
    assert epoch(0) | epoch(1) == both
    assert epoch(0) == epoch(2)


def test_a_square_of_every_image_shows_the_mean_colour() -> None:
    x = torch.ones(3, 2, 8, 6)
    cut = hidden(x, torch.tensor([[0.5, 0.0, 0.99], [0.5, 0.0, 0.99]]), 4)
    expected = torch.ones(3, 8, 6)
    expected[0, 2:6, 1:5] = 0
    expected[1, :2, :2] = 0  # centred on a corner, most of it lies outside
    expected[2, 5:, 3:] = 0
    assert torch.equal(cut, expected[:, None].expand(3, 2, 8, 6))
    assert torch.equal(hidden(x, torch.zeros(2, 3), 0), x)


def test_shifting_mirrors_the_border_like_numpy_does() -> None:
    images = coloured_images(4)
    shifts = torch.tensor([[0, 2, -2, 1], [0, -1, 2, 0]])
    mirrored = torch.tensor([False, True, False, True])
    moved = shifted(images.pixels, torch.tensor([3, 1, 0, 2]), shifts, mirrored)
    for row, source in enumerate((3, 1, 0, 2)):
        padded = np.pad(images.pixels[source].numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
        down, right = 2 + int(shifts[0, row]), 2 + int(shifts[1, row])
        window = padded[:, down : down + 12, right : right + 12]
        expected = window[:, :, ::-1] if mirrored[row] else window
        assert np.array_equal(moved[row].numpy(), expected)
    assert reflected(torch.arange(-2, 6), 4).tolist() == [2, 1, 0, 1, 2, 3, 2, 1]


def test_the_first_epochs_see_small_images() -> None:
    images = coloured_images()
    assert next(batches(images, SETTINGS, 0))[0].shape == (16, 3, 8, 8)
    assert next(batches(images, SETTINGS, 1))[0].shape == (16, 3, 12, 12)


def test_the_learning_rate_is_a_triangle() -> None:
    settings = TrainingSettings(learning_rate=0.4, warmup=0.25)
    rates = [learning_rate(progress, settings) for progress in (0.0, 0.125, 0.25, 0.625, 1.0)]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.2, 0.0])


def test_the_normalisation_is_that_of_numpy() -> None:
    images = coloured_images()
    scaled = images.pixels.numpy() / 255
    assert images.normalisation.mean == pytest.approx(scaled.mean((0, 2, 3)), abs=1e-4)
    assert images.normalisation.std == pytest.approx(scaled.std((0, 2, 3)), abs=1e-4)


def test_a_whitened_stem_answers_patches_with_uncorrelated_channels() -> None:
    network, images = tiny_network(), coloured_images(400)
    whiten(network, images)
    stem = network.stem[0]
    assert isinstance(stem, nn.Conv2d)
    assert not stem.weight.requires_grad
    answers = stem(images.normalisation(images.pixels))[:, :2, 1:-1:4, 1:-1:4]
    correlation = torch.corrcoef(answers.transpose(0, 1).flatten(1))
    assert abs(correlation[0, 1].item()) < 0.05
    assert torch.equal(stem.weight[:2], -stem.weight[2:])


def test_the_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    hits = torch.tensor([1, 1, 1, 0, 1, 0], dtype=torch.float64)
    expected = (4 * abs(0.95 - 0.75) + 2 * abs(0.55 - 0.5)) / 6
    assert calibration_error(confidence, hits) == pytest.approx(expected)


class Always(nn.Module):
    """Answer class 1 with logit 2 for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 2.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), 3)


def test_an_evaluation_counts_hits_per_class() -> None:
    images = coloured_images(30)
    result = evaluate(Always(), images, images.normalisation)
    assert result.accuracy == pytest.approx(1 / 3)
    assert result.per_class == {"red": 0.0, "green": 1.0, "blue": 0.0}
    confidence = float(torch.tensor([0.0, 2.0, 0.0]).softmax(0)[1])
    assert result.calibration_error == pytest.approx(confidence - 1 / 3, abs=1e-6)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_images_come_from_a_folder_or_a_zip(tmp_path: Path, kind: str) -> None:
    images, root = coloured_images(9), tmp_path / "data"
    write_folder(root, "train", images)
    (root / "train" / "index.txt").write_text("neither a class")
    (root / "train" / "red" / ".DS_Store").write_text("nor an image")
    source = root
    if kind == "zip":
        source = tmp_path / "data.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for file in root.rglob("*.*"):
                archive.write(file, file.relative_to(root))
    read = read_split(source, "train")
    order = [2, 5, 8, 1, 4, 7, 0, 3, 6]
    assert read.classes == ("blue", "green", "red")
    assert read.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert torch.equal(read.pixels, images.pixels[order])
    with pytest.raises(DataError, match="test"):
        read_split(source, "test")


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", coloured_images(6, side=10))
    write_folder(tmp_path, "train", coloured_images(1))
    with pytest.raises(
        DataError, match=r"must share one size, found \[\(3, 10, 10\), \(3, 12, 12\)"
    ):
        read_split(tmp_path, "train")


def test_images_without_classes_and_files_that_are_no_images_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", coloured_images(3))
    with pytest.raises(DataError, match="must lie in one folder per class"):
        read_split(tmp_path, "train/red")
    (tmp_path / "train/red/0000.png").write_text("no image")
    with pytest.raises(DataError, match=r"red/0000\.png is no readable image"):
        read_split(tmp_path, "train")


def test_normalised_images_lie_channels_last() -> None:
    normalise = Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    x = normalise(torch.full((2, 3, 4, 4), 255, dtype=torch.uint8))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, torch.full_like(x, 2.0))
