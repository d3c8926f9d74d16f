"""Sites are found by rule on networks of every family, and by name where the operator says so."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer

from defense.errors import SiteError
from defense.fingerprint import fingerprint
from defense.sites import discover_sites, first_tensor, trace
from defense.types import Site
from tests.served import SmallNet, hook_count, seeded_net

IMAGE = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def names(sites: Sequence[Site]) -> list[str]:
    return [site.name for site in sites]


class Functional(nn.Module):
    """A plain network whose activations are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        logits: Tensor = self.fc2(F.relu(self.fc1(x.mean((2, 3)))))
        return logits


class Squeeze(nn.Module):
    """Squeeze-and-excitation with linear layers: scales the channels of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, 2), nn.Linear(2, channels)
        self.act, self.gate = nn.ReLU(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.gate(self.up(self.act(self.down(x.mean((2, 3))))))
        return x * weight[:, :, None, None]


class TextNet(nn.Module):
    """A transformer over token numbers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.embed = nn.Embedding(20, 8)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embed(tokens)).mean(1))
        return logits


def test_a_residual_network_is_observed_at_its_activations_and_blocks_in_order_of_execution() -> (
    None
):
    sites = discover_sites(seeded_net(), torch.zeros(2, 1, 8, 8))
    assert sites == (
        Site("act", 0, 12, 1),
        Site("block.relu", 0, 12, 1),
        Site("block", 0, 12, 1),
    )


def test_a_network_with_functional_activations_is_observed_at_its_weighted_layers() -> None:
    sites = discover_sites(Functional(), IMAGE)
    assert sites == (
        Site("conv1", 0, 4, 1),
        Site("conv2", 0, 6, 1),
        Site("fc1", 0, 8, -1),
    )


def test_resnet18_is_observed_at_every_block_and_at_the_first_call_of_every_shared_relu() -> None:
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    expected = ["relu#0"] + [f"{b}{part}#0" for b in blocks for part in (".relu", "")]
    sites = discover_sites(models.resnet18(num_classes=7).eval(), IMAGE)
    assert names(sites) == expected
    assert [site.channels for site in sites[-2:]] == [512, 512]
    assert {site.axis for site in sites} == {1}


def test_a_dropout_behind_an_activation_does_not_hide_it() -> None:
    sites = discover_sites(models.vgg11_bn(num_classes=7).eval(), IMAGE)
    assert names(sites)[-2:] == ["classifier.1#0", "classifier.4#0"]
    assert sum(name.startswith("features.") for name in names(sites)) == 8
    assert [site.axis for site in sites] == [1] * 8 + [-1] * 2


def test_mobilenet_v3_is_observed_at_its_blocks_with_their_own_channel_counts() -> None:
    sites = discover_sites(models.mobilenet_v3_small(num_classes=7).eval(), IMAGE)
    by_name = {site.module: site for site in sites}
    assert by_name["features.1"].channels == 16
    assert by_name["features.11"].channels == 96
    assert by_name["features.1.block.1.scale_activation"].axis == 1
    assert len(by_name) == len(sites)


def test_a_vision_transformer_is_observed_on_its_channels_and_not_on_its_tokens() -> None:
    vit = VisionTransformer(32, 8, 2, 2, 12, 20, num_classes=7).eval()
    sites = discover_sites(vit, IMAGE)
    layers = [f"encoder.layers.encoder_layer_{i}" for i in (0, 1)]
    expected = [f"{x}{part}#0" for x in layers for part in (".self_attention", ".mlp.1", "")]
    assert names(sites) == [*expected, "encoder#0"]
    assert [site.channels for site in sites] == [12, 20, 12, 12, 20, 12, 12]
    assert {site.axis for site in sites} == {-1}


def test_a_transformer_over_token_numbers_is_observed_at_its_attention_and_its_layers() -> None:
    sites = discover_sites(TextNet().eval(), torch.randint(0, 20, (2, 6)))
    assert names(sites) == [
        "encoder.layers.0.self_attn#0",
        "encoder.layers.0#0",
        "encoder.layers.1.self_attn#0",
        "encoder#0",
    ]
    assert {(site.channels, site.axis) for site in sites} == {(8, -1)}


def test_a_squeeze_and_excitation_block_is_observed_on_the_channels_that_it_scales() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), Squeeze(6), nn.Flatten(), nn.Linear(6 * 30 * 30, 4))
    assert discover_sites(net, IMAGE) == (
        Site("1.act", 0, 2, -1),
        Site("1.gate", 0, 6, -1),
        Site("1", 0, 6, 1),
    )


def test_a_module_used_twice_is_two_sites() -> None:
    relu = nn.ReLU()
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 6, 3), relu, nn.Flatten(), nn.LazyLinear(2)
    )
    sites = discover_sites(net.eval(), IMAGE)
    assert sites == (Site("1", 0, 4, 1), Site("1", 1, 6, 1))


def test_channels_last_feature_maps_are_observed_on_their_last_axis() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Flatten(), nn.LazyLinear(2))
    sites = discover_sites(net, IMAGE.permute(0, 2, 3, 1))
    assert sites == (Site("1", 0, 6, -1),)


def test_the_logits_are_no_site_even_where_the_last_layer_is_an_activation() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2), nn.Sigmoid())
    assert names(discover_sites(net, torch.zeros(2, 3))) == ["1#0"]


class Prompted(nn.Module):
    """Adds a vector that is the same for every request."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(1, 4))
        self.squash, self.act, self.head = nn.Tanh(), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.act(x + self.squash(self.prompt)))
        return logits


@pytest.mark.parametrize("rows", [1, 2])
def test_what_does_not_depend_on_the_request_is_no_site_also_with_one_example(rows: int) -> None:
    assert names(discover_sites(Prompted(), torch.zeros(rows, 4))) == ["act#0"]


def test_named_modules_are_the_only_sites() -> None:
    sites = discover_sites(seeded_net(), torch.zeros(2, 1, 8, 8), names=["stem", "block.relu"])
    assert names(sites) == ["stem#0", "block.relu#0", "block.relu#1"]


def test_a_module_can_be_named_although_its_output_is_handed_on_unchanged() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Identity(), nn.Linear(6, 2))
    assert names(discover_sites(net, torch.zeros(2, 3), names=["1"])) == ["1#0"]


def test_a_name_that_does_not_exist_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(SiteError, match=r"no site 'blok' in this backbone; did you mean 'block'\?"):
        discover_sites(seeded_net(), torch.zeros(2, 1, 8, 8), names=["blok"])


@pytest.mark.parametrize("model", [nn.Linear(4, 2), nn.Sequential(nn.Flatten(), nn.Linear(4, 2))])
def test_a_network_with_nothing_before_its_logits_is_an_error(model: nn.Module) -> None:
    with pytest.raises(SiteError, match=r"nothing to observe in (Linear|Sequential): it has no"):
        discover_sites(model, torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("layer", "kind"), [(nn.BatchNorm1d(3), "BatchNorm1d"), (nn.Dropout(0.1), "Dropout")]
)
def test_a_model_in_training_mode_is_an_error_and_is_not_run(layer: nn.Module, kind: str) -> None:
    net = nn.Sequential(layer, nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    before = fingerprint(net)
    with pytest.raises(
        SiteError, match=rf"the layer '0' \({kind}\) is in training mode, .* call eval"
    ):
        discover_sites(net, torch.ones(4, 3))
    assert fingerprint(net) == before
    assert names(discover_sites(net.eval(), torch.ones(4, 3))) == ["2#0"]


def test_training_mode_is_no_matter_where_it_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Dropout(0.0), nn.Linear(3, 2)).train()
    assert names(discover_sites(net, torch.ones(4, 3))) == ["1#0"]


def test_finding_sites_leaves_no_hook_behind() -> None:
    net = seeded_net()
    discover_sites(net, torch.zeros(2, 1, 8, 8))
    assert hook_count(net) == 0


def test_a_network_that_fails_on_the_example_is_left_without_hooks() -> None:
    net = SmallNet()
    with pytest.raises(RuntimeError, match="channels"):
        trace(net, torch.zeros(2, 3, 8, 8))
    assert hook_count(net) == 0


def test_the_first_tensor_of_an_output_is_found_in_tuples_and_behind_logits() -> None:
    class Output:
        logits = torch.ones(1)

    assert first_tensor((torch.zeros(1), 3)) is not None
    assert first_tensor(Output()) is Output.logits
    assert first_tensor([]) is None
    assert first_tensor({"x": torch.zeros(1)}) is None
