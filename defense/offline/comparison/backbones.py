"""Trained networks as a comparison takes them: with images that they get right, and those attacked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from defense.offline.attacks import Attack, make_attack
from defense.offline.cards import load_network
from defense.offline.networks import Network, Normalisation
from defense.offline.progress import Progress
from defense.offline.training import LabelledImages, write_tensors

FIT_IMAGES = 5000


@dataclass(frozen=True)
class Assault:
    """An attack under the name that the table gives it."""

    label: str
    attack: Attack


def assaults() -> tuple[Assault, ...]:
    """Return the attacks of the comparison."""
    return (
        Assault("FGSM 8/255", make_attack("fgsm", eps=8 / 255)),
        Assault("PGD 8/255", make_attack("pgd", eps=8 / 255)),
        Assault("PGD 2/255", make_attack("pgd", eps=2 / 255)),
        Assault("CW", make_attack("cw", eps=8 / 255)),
        Assault("CDRP", make_attack("cdrp", eps=8 / 255)),
    )


class OnPixels(nn.Module):
    """A network that takes pixels in [0, 1], as attacks need it."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, normalise: Normalisation) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(normalise.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(normalise.std).view(1, -1, 1, 1))
        self.eval()

    def inputs(self, pixels: Tensor) -> Tensor:
        """Return what the network itself takes, where the pixels are."""
        return (pixels - self.mean.to(pixels.device)) / self.std.to(pixels.device)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (N, K) of pixels (N, C, H, W)."""
        return self.network(self.inputs(pixels))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def answers(self, pixels: Tensor) -> Tensor:
        """Return the logits (N, K) of any number of pixels, on the CPU."""
        device = self.mean.device
        return torch.cat([self(x.to(device)).cpu() for x in pixels.split(256)])


def open_network(card: Path) -> OnPixels:
    """Load a frozen network, on the GPU where there is one."""
    network, normalise = load_network(card)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return OnPixels(network.requires_grad_(False), normalise).to(device)


@dataclass(frozen=True)
class Backbone:
    """A trained network of the comparison, and the images that it is judged with.

    pixels: (N, C, H, W) in [0, 1], all answered rightly; labels: (N,). attacked: by label, the
    same images attacked. fit: (M, C, H, W) network inputs made of other images, for what learns from
    clean data; fit_labels: (M,). digest: names the weights and all these images.
    """

    name: str
    digest: str
    network: Network
    on_pixels: OnPixels
    pixels: Tensor
    labels: Tensor
    attacked: dict[str, Tensor]
    fit: Tensor
    fit_labels: Tensor

    @property
    def inputs(self) -> Tensor:
        """(N, C, H, W) what the network itself takes for the clean images."""
        return self.on_pixels.inputs(self.pixels)


@dataclass(frozen=True)
class Cache:
    """What earlier runs have measured, by a name that says all that decides it."""

    folder: Path

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors kept as `name`, or make and keep them."""
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"
        if not path.exists():
            kept = {key: value.contiguous() for key, value in make().items()}
            write_tensors(path, kept, {"name": name})
        return load_file(path)


def open_backbone(
    name: str,
    card: Path,
    train: LabelledImages,
    test: LabelledImages,
    *,
    count: int,
    cache: Cache,
    progress: Progress,
) -> Backbone:
    """Load a network, pick `count` test images that it gets right, and attack them."""
    on_pixels = open_network(card)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    pixels, labels = test.pixels[order].float() / 255, test.labels[order]
    chosen = (on_pixels.answers(pixels).argmax(1) == labels).nonzero().flatten()[:count]
    pixels, labels = pixels[chosen], labels[chosen]
    few = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:FIT_IMAGES]
    fit = on_pixels.inputs(train.pixels[few].float() / 255)
    digest = digest_of(card, pixels, labels, fit)
    attacked = {}
    for assault in assaults():
        attacked[assault.label] = cache.tensors(
            f"{digest} {assault.label} seed 0",
            lambda a=assault: {"x": a.attack.run(on_pixels, pixels, labels, seed=0)},  # type: ignore[misc]
        )["x"]
        progress.advance()
    return Backbone(
        name, digest, on_pixels.network, on_pixels, pixels, labels, attacked, fit, train.labels[few]
    )


def digest_of(card: Path, *images: Tensor) -> str:
    """Return a name for a network's weights and the images that it is studied with."""
    found = hashlib.sha256(json.loads(card.read_text())["sha256"].encode())
    for tensor in images:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
