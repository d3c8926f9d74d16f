"""Peers that read logits or the last features, as pytorch-ood has them (Kirchheim et al. 2022,
https://github.com/kkirchheim/pytorch-ood).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from defense.errors import ConfigError, SiteError
from defense.offline.benchmark.peers.contract import Case, Sample, Score
from defense.offline.benchmark.peers.features import penultimate

NEIGHBOURS = 50
"""Sun et al.'s k for CIFAR-10."""
IMAGES_PER_NEIGHBOUR = 20


def of_logits(name: str) -> Callable[[Case], Score]:
    """Return how to fit the detector `name` of pytorch-ood to nothing: it reads logits alone."""

    def learn(_case: Case) -> Score:
        detector = getattr(pytorch_ood(), name)
        return lambda sample: detector.score(sample.routed.logits.double().cpu())

    return learn


def sorted_softmax(_case: Case, sample: Sample) -> Tensor:
    """Return the probabilities from the largest on, (N, K)."""
    return sample.routed.logits.double().cpu().softmax(1).sort(dim=1, descending=True).values


def knn(case: Case) -> Score:
    """Distance to the k-th neighbour among normalised last features (Sun et al. 2022)."""
    k = min(NEIGHBOURS, max(1, len(case.clean) // IMAGES_PER_NEIGHBOUR))
    return _of_features(case, pytorch_ood().KNN(None, k=k))


def vim(case: Case) -> Score:
    """Virtual logit of the features off their leading half of directions (Wang et al. 2022)."""
    head = head_of(case)
    weight, bias = head.weight.detach().cpu(), head.bias.detach().cpu()
    return _of_features(
        case, pytorch_ood().ViM(None, d=max(1, head.in_features // 2), w=weight, b=bias)
    )


def react(case: Case) -> Score:
    """Energy of the logits of features clipped at their 90th percentile (Sun et al. 2021)."""
    head = head_of(case)
    weight, bias = head.weight.detach().cpu().double(), head.bias.detach().cpu().double()
    detector = pytorch_ood().ReAct(None, lambda z: nn.functional.linear(z, weight, bias))
    detector.fit_feature_maps(penultimate(case.layout, case.clean.routed), case.labels.cpu())

    def score(sample: Sample) -> Tensor:
        features = penultimate(case.layout, sample.routed)
        return detector.predict_feature_maps(features)  # type: ignore[no-any-return]

    return score


def _of_features(case: Case, detector: Any) -> Score:
    detector.fit_features(penultimate(case.layout, case.clean.routed).float(), case.labels.cpu())

    def score(sample: Sample) -> Tensor:
        features = penultimate(case.layout, sample.routed).float()
        return detector.predict_features(features)  # type: ignore[no-any-return]

    return score


def head_of(case: Case) -> nn.Linear:
    """Return the last linear layer that turns the last site's pooled channels into logits.

    SiteError where there is none.
    """
    width = case.layout.sites[-1].channels
    for module in reversed(list(case.model.modules())):
        if not isinstance(module, nn.Linear) or module.bias is None:
            continue
        if (module.in_features, module.out_features) == (width, case.classes):
            return module
    raise SiteError(
        f"no linear layer of {type(case.model).__name__} turns the {width} pooled channels of the "
        f"last site '{case.layout.sites[-1].name}' into {case.classes} logits; leave the peers "
        "'vim' and 'react' out"
    )


def pytorch_ood() -> Any:
    """Return pytorch-ood's detectors; ConfigError where it is not installed."""
    try:
        import pytorch_ood.detector as detectors  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(
            "published detectors need the extra 'report'; pip install 'pathguard[report]'"
        ) from error
    return detectors
