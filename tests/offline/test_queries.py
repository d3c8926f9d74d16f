"""Attacks by queries against a small network and its guard, and an oracle over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from threading import Thread

import pytest
import torch
from PIL import Image
from torch import Tensor

from defense.config import ModelSettings
from defense.errors import ConfigError, DataError, ServerError
from defense.guard import Guard
from defense.offline.attacks.queries import compare
from defense.offline.attacks.queries.boundary import HopSkipJump
from defense.offline.attacks.queries.lockstep import QueryAttack
from defense.offline.attacks.queries.oracle import (
    Answers,
    HttpOracle,
    Images,
    ModelOracle,
    read_answer,
)
from defense.offline.attacks.queries.scattered import Scattered
from defense.offline.attacks.queries.square import Square
from defense.offline.pixels import LEVELS, PixelSpace
from tests.conftest import Digits
from tests.served import SmallNet

EPS = 32 / 255
COUNT = 12
SQUARE, BOUNDARY = Square(EPS, budget=200), HopSkipJump(EPS, budget=200, probes=20)
STRICT = ModelSettings.model_validate(
    {"flag": {"target_fpr": 0.2}, "reject": {"target_fpr": 0.2}, "mode": "enforce"}
)


class Recorded:
    """An oracle that notes what it was asked, and refuses what `refuse` says."""

    def __init__(
        self,
        model: SmallNet,
        refuse: Callable[[Tensor], Tensor] | None = None,
        *,
        bare: bool = False,
    ) -> None:
        self.asked = 0
        self.rounds: list[Tensor] = []
        self._oracle, self._refuse, self._bare = ModelOracle(model), refuse, bare

    def ask(self, images: Images) -> Answers:
        assert isinstance(images, Tensor)
        self.asked += len(images)
        self.rounds.append(images)
        answers = self._oracle.ask(images)
        refused = answers.refused if self._refuse is None else self._refuse(images)
        return Answers(refused, answers.labels, None if self._bare else answers.probabilities)


def whole_levels(pixels: Tensor) -> bool:
    return torch.equal((pixels * LEVELS).round() / LEVELS, pixels)


def linf(pixels: Tensor, images: Tensor) -> Tensor:
    return (pixels - images).abs().flatten(1).amax(1)


@pytest.fixture(scope="module")
def right(trained: SmallNet, digits: Digits) -> tuple[Tensor, Tensor]:
    """Images that the network reads, and their labels."""
    images, labels = digits.images[400:500], digits.labels[400:500]
    read = ModelOracle(trained).ask(images).labels == labels
    return images[read][:COUNT], labels[read][:COUNT]


@pytest.mark.parametrize("attack", [SQUARE, BOUNDARY], ids=["square", "boundary"])
def test_an_attack_fools_most_and_reports_what_the_network_says(
    attack: QueryAttack, trained: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right
    oracle = Recorded(trained)
    found = attack.run(oracle, images, labels, seed=0)
    wrong = ModelOracle(trained).ask(found.pixels).labels != labels
    assert found.success.double().mean() > 0.7
    assert bool(wrong[found.success].all())
    assert whole_levels(found.pixels)
    assert all(whole_levels(asked) for asked in oracle.rounds)
    assert bool((linf(found.pixels, images)[found.success] <= EPS + 1e-6).all())
    torch.testing.assert_close(
        found.distance[found.success], linf(found.pixels, images)[found.success]
    )


def test_the_square_attack_never_leaves_the_ball_and_asks_once_per_image_and_round(
    trained: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right
    oracle = Recorded(trained)
    found = replace(SQUARE, budget=30).run(oracle, images, labels, seed=0)
    assert bool((linf(oracle.rounds[0], images) <= EPS + 1e-6).all())
    assert bool((linf(found.pixels, images) <= EPS + 1e-6).all())
    assert 0 < int(found.success.sum()) < COUNT
    assert found.queries[~found.success].unique().tolist() == [30]
    still = [int((found.queries > number).sum()) for number in range(30)]
    assert [len(asked) for asked in oracle.rounds] == still
    assert oracle.asked == int(found.queries.sum())
    assert bool(found.distance[~found.success].isinf().all())


def test_an_attack_by_halves_of_the_area_follows_the_published_schedule() -> None:
    attack = Square(budget=10_000, p_init=0.8)
    numbers = [0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2001, 4001, 6001, 8001, 9999]
    halved = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9, 9]
    assert [attack.share(n) for n in numbers] == [0.8 / 2**times for times in halved]
    assert Square(budget=1000).share(6) == Square(budget=10_000).share(60)


@pytest.mark.parametrize("attack", [SQUARE, BOUNDARY], ids=["square", "boundary"])
def test_an_attack_is_deterministic_and_does_not_depend_on_the_images_beside(
    attack: QueryAttack, trained: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right
    first, again, other = (
        attack.run(ModelOracle(trained), images, labels, seed=s) for s in (3, 3, 4)
    )
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.curve, again.curve)
    assert not torch.equal(first.pixels, other.pixels)
    if attack is SQUARE:
        alone = attack.run(ModelOracle(trained), images[:1], labels[:1], seed=3)
        assert torch.equal(alone.pixels[0], first.pixels[0])


@pytest.mark.parametrize("attack", [SQUARE, BOUNDARY], ids=["square", "boundary"])
def test_what_is_refused_is_no_success_and_costs_a_query(
    attack: QueryAttack, trained: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right

    def everything(asked: Tensor) -> Tensor:
        return torch.ones(len(asked), dtype=torch.bool)

    oracle = Recorded(trained, everything)
    found = attack.run(oracle, images, labels, seed=0)
    assert not bool(found.success.any())
    assert oracle.asked == int(found.queries.sum())
    assert torch.equal(found.pixels, images)
    assert bool(found.distance.isinf().all())
    assert bool(found.curve.isinf().all())
    expected = {SQUARE: 200, BOUNDARY: 10}[attack]  # no start is answered
    assert found.queries.unique().tolist() == [expected]


@pytest.mark.parametrize("attack", [SQUARE, BOUNDARY], ids=["square", "boundary"])
def test_an_attack_goes_round_what_is_refused(
    attack: QueryAttack, trained: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right

    def dark(asked: Tensor) -> Tensor:
        return asked[:, 0, 0, 0] > 0.05

    clear = ~dark(images)
    images, labels = images[clear], labels[clear]
    found = attack.run(Recorded(trained, dark), images, labels, seed=0)
    assert int(found.success.sum()) > 1
    assert not bool(dark(found.pixels[found.success]).any())


def test_after_refused_stripes_squares_start_from_the_image_itself(
    trained: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right
    calls = []

    def first_only(asked: Tensor) -> Tensor:
        calls.append(len(asked))
        return torch.full((len(asked),), len(calls) == 1)

    oracle = Recorded(trained, first_only)
    replace(SQUARE, budget=2, p_init=0.1).run(oracle, images, labels, seed=0)
    changed = (oracle.rounds[1] != images).flatten(1).sum(1)
    assert int(changed.min()) >= 1
    assert int(changed.max()) <= 9


def test_the_scattered_attack_asks_about_new_stripes_of_full_size_every_time(
    trained: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right
    oracle = Recorded(trained)
    found = Scattered(EPS, budget=6).run(oracle, images, labels, seed=0)
    assert 0 < int(found.success.sum()) < COUNT
    never = ~found.success
    levels = (images[never] * 255).round()
    bound = int(EPS * 255 + 1e-4)
    free = (levels >= bound) & (levels <= 255 - bound)
    asked = [part[never[found.queries > n]] for n, part in enumerate(oracle.rounds)]
    changes = [(part * 255).round() - levels for part in asked]
    assert all(change[free].abs().unique().tolist() == [bound] for change in changes)
    assert not torch.equal(changes[0], changes[1])


def test_the_distance_to_the_boundary_only_shrinks_and_ends_far_below_the_start(
    trained: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right
    attack = HopSkipJump(1 / 255, budget=300, probes=30, keep_going=True)
    found = attack.run(ModelOracle(trained), images, labels, seed=0)
    distances = found.curve[:, :, 0]
    assert bool((distances[1:] <= distances[:-1]).all())
    assert float(distances[-1].median()) < 0.7 * float(distances[0].median())
    assert torch.equal(found.distance, distances[-1])
    torch.testing.assert_close(found.distance, linf(found.pixels, images))
    torch.testing.assert_close(
        found.curve[-1, :, 1], (found.pixels - images).flatten(1).norm(dim=1)
    )
    assert found.queries.unique().tolist() == [300]


def test_an_attack_that_goes_on_reports_when_it_first_succeeded(
    trained: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right
    stopped = BOUNDARY.run(ModelOracle(trained), images, labels, seed=0)
    going = replace(BOUNDARY, keep_going=True).run(ModelOracle(trained), images, labels, seed=0)
    assert torch.equal(stopped.queries, going.queries)
    assert torch.equal(stopped.success, going.success)
    assert float(going.distance.mean()) < float(stopped.distance.mean())


def test_mistaken_uses_are_named(trained: SmallNet, right: tuple[Tensor, Tensor]) -> None:
    images, labels = right
    oracle = ModelOracle(trained)
    with pytest.raises(ConfigError, match=r"eps 0\.001 and a budget of 5; give an eps of at"):
        Square(0.001, budget=5).run(oracle, images, labels, seed=0)
    with pytest.raises(ConfigError, match="a budget of 0"):
        Square(budget=0).run(oracle, images, labels, seed=0)
    with pytest.raises(DataError, match="was given 12 images and 11 labels"):
        Square().run(oracle, images, labels[1:], seed=0)
    with pytest.raises(DataError, match="HopSkipJump starts from an image of another class"):
        HopSkipJump().run(oracle, images[:1], labels[:1], seed=0)
    with pytest.raises(ConfigError, match="climbs on probabilities and the model answers with a"):
        Square().run(Recorded(trained, bare=True), images, labels, seed=0)
    with pytest.raises(DataError, match="the stock model gets all 12 images wrong"):
        compare(SQUARE, oracle, oracle, images, (labels + 1) % 10, seed=0)


def test_a_model_in_this_process_answers_and_refuses_as_its_guard_does(
    trained: SmallNet, guard: Guard, digits: Digits
) -> None:
    images = digits.images[:60]
    with guard.attach(trained, STRICT) as attached:
        direct = attached(images)
        oracle = ModelOracle(attached)
        answers = oracle.ask(list(images))
    assert oracle.asked == 60
    refused = torch.tensor([verdict == "reject" for verdict in direct.verdicts])
    assert 0 < int(refused.sum()) < 60
    assert torch.equal(answers.refused, refused)
    assert torch.equal(answers.labels[~refused], direct.logits.argmax(1)[~refused])
    assert answers.labels[refused].unique().tolist() == [-1]
    assert answers.probabilities is not None
    assert bool(answers.probabilities[refused].isnan().all())
    torch.testing.assert_close(
        answers.probabilities[~refused], direct.logits.softmax(1)[~refused].detach()
    )


def test_pixels_reach_a_model_on_eight_bits_and_in_its_own_space(trained: SmallNet) -> None:
    pixels = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    space = PixelSpace(torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), -1.0), "L")
    answers = ModelOracle(trained, space).ask(pixels)
    rounded = (pixels * LEVELS).round() / LEVELS
    with torch.no_grad():
        expected = trained(rounded * 2 - 1).softmax(1)
    torch.testing.assert_close(answers.probabilities, expected)


def test_a_comparison_has_the_figures_of_both_models(
    trained: SmallNet, guard: Guard, digits: Digits
) -> None:
    images, labels = digits.images[400:420], digits.labels[400:420]
    attack = replace(SQUARE, budget=60)
    with guard.attach(trained, STRICT) as attached:
        oracles = ModelOracle(trained), ModelOracle(attached)
        figures = compare(attack, *oracles, images, labels, seed=0)
    read = int((ModelOracle(trained).ask(images).labels == labels).sum())
    assert figures["n"] == read < 20
    assert figures["budget"] == 60
    assert 0 < figures["guarded_success"] < figures["stock_success"]
    assert figures["ratio"] == figures["guarded_success"] / figures["stock_success"]
    assert 1 <= figures["median_queries"]["stock"] <= 60
    assert figures["curve"]["stock"][-1][0] == 60
    json.dumps(figures, allow_nan=False)


def test_a_comparison_without_any_success_has_no_ratio_and_no_median(
    trained: SmallNet, right: tuple[Tensor, Tensor]
) -> None:
    images, labels = right
    oracle = ModelOracle(trained)
    figures = compare(Square(1 / 255, budget=2), oracle, oracle, images, labels, seed=0)
    assert figures["stock_success"] == 0
    assert figures["ratio"] is None
    assert figures["median_queries"] == {"stock": None, "guarded": None}
    assert figures["curve"]["stock"][-1] == [2.0, None, None]


NAMES = ("cat", "dog", "eel", "fox")


@pytest.mark.parametrize(
    ("answer", "label", "row"),
    [
        (2, 2, None),
        ("dog", 1, None),
        ({"class": 3}, 3, None),
        ({"class": "eel", "probabilities": [0.1, 0.2, 0.6, 0.1]}, 2, [0.1, 0.2, 0.6, 0.1]),
        ({"fox": 0.7, "cat": 0.2}, 3, [0.2, 0.05, 0.05, 0.7]),
        ({"fox": 0.4, "cat": 0.1, "dog": 0.2, "eel": 0.3}, 3, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_the_answers_of_common_handlers_are_read(
    answer: object, label: int, row: list[float] | None
) -> None:
    found, probabilities = read_answer(answer, NAMES)
    assert found == label
    assert probabilities == (None if row is None else pytest.approx(row))


@contextmanager
def replying(reply: Callable[[bytes, str], tuple[int, bytes]]) -> Iterator[str]:
    """Serve `reply` of body and token on a local port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/predictions/pets"
            status, answer = reply(body, self.headers.get("authorization", ""))
            self.send_response(status)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def test_a_server_is_asked_with_pngs_and_its_answers_come_back_in_order() -> None:
    tokens = iter(["first", "second"])
    seen = []

    def reply(body: bytes, token: str) -> tuple[int, bytes]:
        seen.append(token)
        with Image.open(BytesIO(body)) as image:
            level = image.getpixel((1, 0))
            assert image.format == "PNG"
        first = level[0] if isinstance(level, tuple) else level
        if first == 200:
            return 403, b"{}"
        return 200, json.dumps({NAMES[int(first or 0)]: 0.7}).encode()

    images = torch.zeros(40, 3, 4, 4)
    images[:, 0, 0, 1] = torch.tensor([0, 3, 200, 1] * 10) / LEVELS
    with (
        replying(reply) as url,
        HttpOracle(url, "pets", NAMES, headers=lambda: {"authorization": next(tokens)}) as oracle,
    ):
        answers = oracle.ask(images)
        grey = oracle.ask([images[0, :1], images[1, :1]])
    assert oracle.asked == 42
    assert answers.labels.tolist() == [0, 3, -1, 1] * 10
    assert answers.refused.tolist() == [False, False, True, False] * 10
    assert answers.probabilities is not None
    assert answers.probabilities[1].tolist() == pytest.approx([0.1, 0.1, 0.1, 0.7])
    assert bool(answers.probabilities[2].isnan().all())
    assert grey.labels.tolist() == [0, 3]
    assert (seen.count("first"), seen.count("second")) == (40, 2)


def test_other_statuses_may_be_refusals_and_answers_may_lack_probabilities() -> None:
    with (
        replying(lambda body, token: (429, b"") if len(body) > 100 else (200, b"1")) as url,
        HttpOracle(url, "pets", NAMES, refusals=(403, 429)) as oracle,
    ):
        noise = torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(0))
        answers = oracle.ask([noise, torch.zeros(1, 4, 4)])
    assert answers.refused.tolist() == [True, False]
    assert answers.labels.tolist() == [-1, 1]
    assert answers.probabilities is None


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (503, b"", r"with status 503, where 200 or a refusal \(403\) was expected"),
        (200, b'{"wolf": 1.0}', "names none of the 4 classes"),
        (200, b"[1]", "names none of the 4 classes"),
        (200, b"{}", "names none of the 4 classes"),
        (200, b"9", "names none of the 4 classes"),
        (200, b"not JSON", "names none of the 4 classes"),
        (200, b'{"class": 1, "probabilities": [1.0]}', "where 4 finite ones were expected"),
        (200, b'{"cat": NaN}', "where 4 finite ones were expected"),
    ],
)
def test_whatever_is_neither_an_answer_nor_a_refusal_is_an_error(
    status: int, body: bytes, said: str
) -> None:
    with (
        replying(lambda _body, _token: (status, body)) as url,
        HttpOracle(url, "pets", NAMES) as oracle,
        pytest.raises(ServerError, match=said),
    ):
        oracle.ask(torch.zeros(1, 1, 4, 4))


def test_a_server_that_is_not_there_is_named() -> None:
    with (
        HttpOracle("http://127.0.0.1:9", "pets", NAMES) as oracle,
        pytest.raises(
            ServerError, match=r"model 'pets' at .* gave no answer .*see that its server"
        ),
    ):
        oracle.ask(torch.zeros(1, 1, 4, 4))
