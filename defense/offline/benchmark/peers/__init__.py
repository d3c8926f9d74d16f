"""Published detectors to stand beside ours, on the same network, paths and images.

Those that pytorch-ood has come from there; the others are written here, with their sources.
"""

from __future__ import annotations

from defense.errors import ConfigError, nearest
from defense.offline.benchmark.peers import controls, layers, outputs, routes
from defense.offline.benchmark.peers.contract import Case, Kind, Peer, Row, Sample, Score
from defense.offline.benchmark.peers.features import judged
from defense.offline.benchmark.peers.squeezing import feature_squeezing
from defense.routers.effective import EffectiveRecipe
from defense.routers.effective_backward import EffectiveBackwardRecipe

__all__ = ["PEERS", "Case", "Kind", "Peer", "Row", "Sample", "Score", "peer_named"]

PEERS: dict[str, Peer] = {
    "max_softmax": Row(
        "Largest probability (Hendrycks and Gimpel, ICLR 2017, arXiv 1610.02136)",
        outputs.of_logits("MaxSoftmax"),
        "baseline",
    ),
    "max_logit": Row(
        "Largest logit (Hendrycks et al., ICML 2022, arXiv 1911.11132)",
        outputs.of_logits("MaxLogit"),
        "baseline",
    ),
    "entropy": Row(
        "Entropy of the probabilities (as in Chan et al., ICCV 2021, arXiv 2012.06575)",
        outputs.of_logits("Entropy"),
        "baseline",
    ),
    "energy": Row(
        "Energy of the logits (Liu et al., NeurIPS 2020, arXiv 2010.03759)",
        outputs.of_logits("EnergyBased"),
        "baseline",
    ),
    "sorted_softmax": Row(
        "Control: logistic regression of the sorted probabilities",
        judged("logistic", outputs.sorted_softmax),
        "control",
        needs_attacks=True,
    ),
    "mahalanobis": Row(
        "Distance of the last features to a class (Lee et al., NeurIPS 2018, arXiv 1807.03888)",
        layers.mahalanobis,
    ),
    "mahalanobis_all": Row(
        "Distances at every layer, logistic regression (Lee et al., NeurIPS 2018, arXiv 1807.03888)",
        layers.mahalanobis_all,
        needs_attacks=True,
    ),
    "mahalanobis_sum": Row(
        "Distances at every layer, standardised and summed: the same without attacks",
        layers.mahalanobis_sum,
    ),
    "knn": Row(
        "Distance of the last features to the k-th neighbour (Sun et al., ICML 2022, arXiv 2204.06507)",
        outputs.knn,
    ),
    "vim": Row(
        "Virtual logit of the last features' residual (Wang et al., CVPR 2022, arXiv 2203.10807)",
        outputs.vim,
    ),
    "react": Row(
        "Energy after the last features are clipped (Sun et al., NeurIPS 2021, arXiv 2111.12797)",
        outputs.react,
    ),
    "deep_knn": Row(
        "Neighbours' labels at every layer, best class (Papernot and McDaniel 2018, arXiv 1803.04765)",
        layers.deep_knn,
    ),
    "deep_knn_answer": Row(
        "Neighbours' labels at every layer against the network's answer (after arXiv 1803.04765)",
        layers.deep_knn_answer,
    ),
    "lid": Row(
        "Local intrinsic dimension at every layer (Ma et al., ICLR 2018, arXiv 1801.02613)",
        layers.lid,
        needs_attacks=True,
    ),
    "feature_squeezing": Row(
        "Answers to fewer bits, medians, non-local means (Xu et al., NDSS 2018, arXiv 1704.01155)",
        feature_squeezing,
        slow=True,
    ),
    "cdrp": Row(
        "Critical data routing path per image, random forest (Wang et al., CVPR 2018)",
        routes.cdrp,
        needs_attacks=True,
        slow=True,
    ),
    "effective_path": Row(
        "Overlap of backward paths with class paths, random forest (Qiu et al., CVPR 2019, "
        "arXiv 1904.08089)",
        routes.effective_path(EffectiveBackwardRecipe(), images_per_class=20),
        needs_attacks=True,
        slow=True,
    ),
    "effective_path_forward": Row(
        "The same with forward paths (Ptolemy's FwAB, Gan et al., MICRO 2020, arXiv 2008.09954)",
        routes.effective_path(EffectiveRecipe(), images_per_class=50),
        needs_attacks=True,
    ),
    "pooled_activations": Row(
        "Control: logistic regression of the pooled activations",
        judged("logistic", controls.activations),
        "control",
        needs_attacks=True,
    ),
    "pooled_activations_forest": Row(
        "Control: random forest of the pooled activations",
        judged("forest", controls.activations),
        "control",
        needs_attacks=True,
    ),
    "shuffled_path": Row(
        "Control: logistic regression of the pooled activations, columns permuted in every row",
        judged("logistic", controls.shuffled_path),
        "control",
        needs_attacks=True,
    ),
    "shuffled_path_forest": Row(
        "Control: random forest of the pooled activations, columns permuted in every row",
        judged("forest", controls.shuffled_path),
        "control",
        needs_attacks=True,
    ),
    "pixel_statistics": Row(
        "Control: logistic regression of pixel statistics, without any network",
        judged("logistic", controls.pixel_statistics),
        "control",
        needs_attacks=True,
    ),
}


def peer_named(name: str) -> Peer:
    """Return the table's row `name`; ConfigError names the nearest one otherwise."""
    if name not in PEERS:
        raise ConfigError(f"no peer '{name}'{nearest(name, PEERS)}")
    return PEERS[name]
