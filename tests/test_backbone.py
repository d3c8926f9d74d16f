"""One forward pass gives logits and path; the hooks only read, and they always come off."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from defense.backbone import GatedBackbone, ReachedBackbone, Recording, Run
from defense.errors import ArtifactError, GuardFailure, SiteError
from defense.guard import inputs_of
from defense.routers import ForwardRouter
from defense.routers.activation import ActivationRouter
from defense.sites import discover_sites
from defense.types import PathLayout, Site, Views
from tests.served import counted_forwards, hook_count, images_like_noise, seeded_net


def activation_router(model: nn.Module, example: Tensor, *statistics: str) -> ActivationRouter:
    return ActivationRouter(PathLayout(discover_sites(model, example), statistics or ("mean",)))


@dataclass(frozen=True)
class BrokenRouter:
    """A router that returns too few columns, or raises."""

    name: ClassVar[str] = "broken"
    one_forward: ClassVar[bool] = True

    layout: PathLayout
    raises: bool

    def reduce(self, output: Tensor, site: Site) -> Tensor:
        if self.raises:
            raise RuntimeError("out of memory")
        return output.flatten(1)[:, :1]

    def finish(self, path: Tensor, logits: Tensor) -> Tensor:
        return path


def test_the_path_is_the_mean_of_every_channel_site_after_site() -> None:
    net, x = seeded_net(), images_like_noise(3, 1)
    with GatedBackbone(net, activation_router(net, x)) as gated:
        routed = gated.run(x)
    stem = net.act(net.stem(x))
    first = torch.relu(net.block.conv1(stem))
    second = torch.relu(net.block.conv2(first) + stem)
    expected = torch.cat([part.mean((2, 3)) for part in (stem, first, second)], dim=1)
    torch.testing.assert_close(routed.path, expected)
    assert torch.equal(routed.logits, net(x))


def test_an_in_place_activation_is_seen_at_the_moment_of_its_own_call() -> None:
    net, x = seeded_net(), images_like_noise(2, 1)
    sites = (Site("block.relu", 0, 12, 1), Site("block.relu", 1, 12, 1), Site("block", 0, 12, 1))
    with GatedBackbone(net, ActivationRouter(PathLayout(sites, ("max",)))) as gated:
        path = gated.run(x).path
    assert not torch.equal(path[:, :12], path[:, 12:24])
    assert torch.equal(path[:, 12:24], path[:, 24:])


def test_every_forward_inside_a_recording_is_kept_and_none_outside() -> None:
    net, x = seeded_net(), images_like_noise(2, 1)
    with GatedBackbone(net, activation_router(net, x)) as gated:
        net(x)
        with gated.record() as recording:
            net(x)
            net(x[:1])
        net(x)
    assert [run.logits is not None and len(run.logits) for run in recording.runs] == [2, 1]
    assert recording.runs[0].inputs is x


def test_a_probe_stops_at_the_door_and_makes_no_forward_pass() -> None:
    net, x = seeded_net(), images_like_noise(2, 1)
    with GatedBackbone(net, activation_router(net, x)) as gated, counted_forwards(net) as forwards:
        behind: list[int] = []
        with gated.probe() as recording:
            net(x)
            behind.append(1)
        assert behind == []
        assert recording.runs[0].inputs is x
        assert recording.runs[0].logits is None
        assert forwards == []
        net(x)
        assert forwards == [2]


def test_a_handler_that_catches_exceptions_does_not_catch_the_stop_of_a_probe() -> None:
    assert not issubclass(ReachedBackbone, Exception)


def test_an_exception_inside_a_probe_comes_through() -> None:
    net, x = seeded_net(), images_like_noise(2, 1)
    with (
        GatedBackbone(net, activation_router(net, x)) as gated,
        pytest.raises(ValueError, match="cannot decode"),
        gated.probe(),
    ):
        raise ValueError("cannot decode")


def test_recordings_nest_and_the_outer_one_goes_on_afterwards() -> None:
    net, x = seeded_net(), images_like_noise(2, 1)
    with GatedBackbone(net, activation_router(net, x)) as gated, gated.record() as outer:
        net(x)
        with gated.record() as inner:
            net(x)
        net(x)
    assert (len(outer.runs), len(inner.runs)) == (2, 1)


def test_two_threads_record_without_seeing_each_other() -> None:
    net, x = seeded_net(), images_like_noise(4, 1)
    barrier = threading.Barrier(2, timeout=30)
    paths: dict[int, Tensor] = {}

    with GatedBackbone(net, activation_router(net, x)) as gated:

        def work(row: int) -> None:
            with gated.record() as recording:
                barrier.wait()
                net(x[row : row + 1])
                barrier.wait()
            paths[row] = gated.routed(recording).path

        threads = [threading.Thread(target=work, args=(row,)) for row in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = gated.run(x[:2]).path
    torch.testing.assert_close(torch.cat([paths[0], paths[1]]), expected)


def test_closing_takes_every_hook_off_also_after_an_exception() -> None:
    net, x = seeded_net(), images_like_noise(2, 1)
    router = activation_router(net, x)
    with GatedBackbone(net, router):
        assert hook_count(net) > 0
    assert hook_count(net) == 0
    with pytest.raises(RuntimeError, match="channels"), GatedBackbone(net, router) as gated:
        gated.run(torch.zeros(2, 3, 8, 8))
    assert hook_count(net) == 0


def test_a_layout_for_another_network_is_refused_and_leaves_no_hook() -> None:
    net = seeded_net()
    router = ActivationRouter(PathLayout((Site("block.relo", 0, 12, 1),), ("mean",)))
    with pytest.raises(SiteError, match=r"no module 'block\.relo' in this backbone; did you mean"):
        GatedBackbone(net, router)
    assert hook_count(net) == 0


def test_a_router_that_raises_does_not_break_the_answer_and_is_a_capture_failure() -> None:
    net, x = seeded_net(), images_like_noise(2, 1)
    layout = activation_router(net, x).layout
    router: ForwardRouter = BrokenRouter(layout, raises=True)
    expected = net(x)
    with GatedBackbone(net, router) as gated:
        with gated.record() as recording:
            answer = net(x)
        assert torch.equal(answer, expected)
        with pytest.raises(GuardFailure, match="a site could not be read: out of memory") as caught:
            gated.routed(recording)
    assert caught.value.stage == "capture"


def test_a_path_that_cannot_be_finished_is_a_capture_failure() -> None:
    class Unfinished(ActivationRouter):
        def finish(self, path: Tensor, logits: Tensor) -> Tensor:
            raise ValueError("no gates for this class")

    net, x = seeded_net(), images_like_noise(2, 1)
    with (
        GatedBackbone(net, Unfinished(activation_router(net, x).layout)) as gated,
        pytest.raises(GuardFailure, match="the path could not be finished: no gates for this"),
    ):
        gated.run(x)


def test_a_path_of_another_length_is_a_capture_failure() -> None:
    net, x = seeded_net(), images_like_noise(2, 1)
    router = BrokenRouter(activation_router(net, x).layout, raises=False)
    with (
        GatedBackbone(net, router) as gated,
        pytest.raises(GuardFailure, match="the path has 3 columns; the guard expects 36"),
    ):
        gated.run(x)


def test_no_forward_pass_is_a_capture_failure() -> None:
    net, x = seeded_net(), images_like_noise(2, 1)
    with GatedBackbone(net, activation_router(net, x)) as gated:
        with gated.record() as recording:
            pass
        with pytest.raises(GuardFailure, match="ran the backbone 0 times for one batch"):
            gated.routed(recording)


VIEWS = 3


def by_request(views: Tensor) -> list[Tensor]:
    return [views.flatten(0, 1)]


def by_view(views: Tensor) -> list[Tensor]:
    return [views.transpose(0, 1).flatten(0, 1)]


def a_run_per_request(views: Tensor) -> list[Tensor]:
    return list(views)


def a_run_per_view(views: Tensor) -> list[Tensor]:
    return list(views.transpose(0, 1))


@pytest.mark.parametrize(
    ("runs", "grouped"),
    [(by_request, True), (a_run_per_request, True), (by_view, False), (a_run_per_view, False)],
)
def test_a_request_is_the_mean_of_its_views_whatever_the_runs_they_came_in(
    runs: Callable[[Tensor], list[Tensor]], grouped: bool
) -> None:
    """Three requests of three views each, so that no count alone tells whose a row is."""
    net, x = seeded_net(), images_like_noise(3 * VIEWS, 1).unflatten(0, (3, VIEWS))
    with GatedBackbone(net, activation_router(net, x[0])) as gated:
        with gated.record() as recording:
            for inputs in runs(x):
                net(inputs)
        routed = gated.routed(recording, Views(VIEWS, grouped))
        alone = [gated.run(views) for views in x]
    assert len(routed) == 3
    for row, views in enumerate(alone):
        torch.testing.assert_close(routed.path[row], views.path.mean(0))
        torch.testing.assert_close(routed.logits[row], views.logits.mean(0))
    arranged = inputs_of(recording, 3, Views(VIEWS, grouped))
    assert arranged is not None
    assert torch.equal(arranged, x)


def test_rows_that_are_no_multiple_of_the_views_are_a_failure() -> None:
    with pytest.raises(GuardFailure, match="the backbone ran 4 rows; expected 3 per request"):
        Views(3).arranged(torch.zeros(4, 2))


def test_inputs_of_several_sizes_are_not_had() -> None:
    runs = [Run(torch.zeros(2, 1, size, size)) for size in (8, 9)]
    assert inputs_of(Recording(runs), 2, Views(2)) is None


def test_a_request_without_a_view_is_an_error() -> None:
    with pytest.raises(ArtifactError, match="has 0 views, and it has 1 or more; fit it again"):
        Views(0)


def test_a_site_that_the_forward_pass_did_not_reach_is_a_capture_failure_that_names_it() -> None:
    net, x = seeded_net(), images_like_noise(2, 1)
    router = ActivationRouter(PathLayout((Site("act", 0, 12, 1), Site("act", 1, 12, 1)), ("mean",)))
    with (
        GatedBackbone(net, router) as gated,
        pytest.raises(GuardFailure, match="site 'act#1' was not reached in the forward pass"),
    ):
        gated.run(x)


@pytest.mark.parametrize("logits", [None, torch.zeros(2), torch.zeros(2, 3, 1)])
def test_an_output_that_is_no_row_of_logits_per_request_is_a_capture_failure(
    logits: Tensor | None,
) -> None:
    net, x = seeded_net(), images_like_noise(2, 1)
    with (
        GatedBackbone(net, activation_router(net, x)) as gated,
        pytest.raises(GuardFailure, match=r"did not return logits of shape \(N, K\)"),
    ):
        gated.routed(Recording([Run(x, logits)]))


def test_a_backbone_that_takes_keywords_only_is_recorded_without_its_input() -> None:
    net, x = seeded_net(), images_like_noise(2, 1)
    with GatedBackbone(net, activation_router(net, x)) as gated:
        with gated.record() as recording:
            net(x=x)
        assert recording.runs[0].inputs is None
        assert len(gated.routed(recording)) == 2
