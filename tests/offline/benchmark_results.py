"""Made-up results of a benchmark, shaped like those of `pathguard benchmark`, for tests of its pages."""

from __future__ import annotations

import random
from typing import Any

ATTACKS = {
    # name: family, norm, eps in 1/255, how hard it is to see
    "fgsm_8": ("fgsm", "linf", 8, 0.02),
    "bim_8": ("pgd", "linf", 8, 0.01),
    "pgd_2": ("pgd", "linf", 2, 0.11),
    "pgd_4": ("pgd", "linf", 4, 0.05),
    "pgd_8": ("pgd", "linf", 8, 0.01),
    "pgd_l2": ("pgd", "l2", None, 0.08),
    "apgd_8": ("apgd", "linf", 8, 0.01),
    "autoattack_8": ("apgd", "linf", 8, 0.01),
    "cw_0": ("cw", "l2", None, 0.09),
    "cw_10": ("cw", "l2", None, 0.05),
    "deepfool": ("deepfool", "l2", None, 0.07),
    "square_8": ("square", "linf", 8, 0.03),
    "ghost_8": ("ghost", "linf", 8, 0.04),
}
CONTESTANTS = {
    # name: kind, fit, how much it lacks
    "pathguard": ("ours", "attacks", 0.25),
    "pathguard_clean": ("ours", "clean", 0.45),
    "mahalanobis": ("peer", "clean", 1.6),
    "knn": ("peer", "clean", 1.4),
    "lid": ("peer", "attacks", 1.2),
    "squeezing": ("peer", "clean", 1.1),
    "energy": ("baseline", "clean", 2.0),
    "max_softmax": ("baseline", "clean", 1.9),
    "shuffled_path": ("control", "attacks", 4.4),
    "pooled_activations": ("control", "attacks", 0.9),
}
SHIFTS = ("noise", "blur", "jpeg", "brightness", "contrast")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer")
ROC_GRID = [10 ** (-3 + 3 * step / 59) for step in range(60)]


def make_results(seed: int = 0) -> dict[str, Any]:
    """Return results in which ours wins most rows, loses one attack, and misses some marks."""
    draw = random.Random(seed)  # noqa: S311
    contestants = {name: _contestant(name, draw) for name in CONTESTANTS}
    contestants["max_softmax"]["seen"]["cw_0"]["auroc"] = _spread(0.991)
    sealed = ("pathguard", "pathguard_clean", "squeezing", "lid")
    return {
        "command": "pathguard benchmark --data data/cifar10.zip --backbone model_store/cifar10.json",
        "seeds": [0, 1, 2],
        "versions": {"python": "3.11.7", "pathguard": "0.1.0", "torch": "2.15.0"},
        "fingerprint": "5e" * 32,
        "artefacts": {"backbone": "ab" * 32, "witness": "cd" * 32},
        "data": {
            "images": 4000,
            "attacked": 1500,
            "sealed": 1000,
            "accuracy": 0.9054,
            "discarded": 0.0946,
        },
        "attacks": {
            name: {
                "family": family,
                "norm": norm,
                "eps": eps,
                "n": 1200 + draw.randrange(200),
                "success_rate": 0.7 + 0.3 * draw.random(),
                "mean_linf": (eps or 6) / 255,
                "mean_l2": 0.2 + draw.random(),
            }
            for name, (family, norm, eps, _) in ATTACKS.items()
        },
        "contestants": contestants,
        "sealed": {name: _sealed(contestants[name], draw) for name in sealed},
        "adaptive": _adaptive(),
        "queries": {
            "attack": {
                "square": _asked(0.96, 0.55, {"stock": 112.0, "guarded": 640.0}),
                "boundary": _asked(1.0, 0.72, {"stock": 410.0, "guarded": None}),
            }
        },
        "sanity": {
            "null": {"passed": True, "says": "Clean against clean gives an AUROC of 0.503."},
            "grid": {"passed": False, "says": "Clean images saved as PNG: 2.10 % hit at 1 %."},
        },
        "roc": {
            name: {attack: _roc(name, attack) for attack in ("all", *ATTACKS)}
            for name in CONTESTANTS
            if name != "shuffled_path"
        },
    }


def _contestant(name: str, draw: random.Random) -> dict[str, Any]:
    kind, fit, lacks = CONTESTANTS[name]
    seen = {attack: _cell(name, attack, draw) for attack in ATTACKS}
    unseen = None
    if fit == "attacks":
        unseen = {attack: _cell(name, attack, draw, harder=1.5) for attack in ATTACKS}
    low, high = 0.004 * lacks, 0.013 * lacks
    return {
        "kind": kind,
        "fit": fit,
        "about": f"What {name.replace('_', ' ')} looks at, in one sentence.",
        "seen": seen,
        "unseen": unseen,
        "clean": {
            "realised_fpr": {
                "0.05": _spread(0.051),
                "0.01": _spread(0.0104),
                "0.001": _spread(0.0012),
            },
            "per_class_fpr": {cls: 0.004 + 0.014 * draw.random() for cls in CLASSES},
        },
        "shifts": {
            shift: {
                str(level): min(1.0, 0.008 + (low + high * draw.random()) * level**1.6)
                for level in range(1, 6)
            }
            for shift in SHIFTS
        },
        "noise": {f"noise of {attack}": 0.008 + high * draw.random() for attack in ATTACKS},
        "failed": {attack: 0.02 + 0.2 * draw.random() for attack in ATTACKS},
        "summary": {
            "seen": _summary(seen),
            "unseen": None if unseen is None else _summary(unseen),
            "realised_fpr_1": _spread(0.0104),
            "shift_fpr": 0.008 + high * 2,
            "noise_fpr": 0.008 + high,
            "extra_passes": 0.21 if kind == "ours" else 3.0 if name == "squeezing" else 0.0,
        },
    }


def _auroc(name: str, attack: str, harder: float = 1.0) -> float:
    return 1.0 - min(0.55, ATTACKS[attack][3] * CONTESTANTS[name][2] * harder + 0.004)


def _cell(name: str, attack: str, draw: random.Random, harder: float = 1.0) -> dict[str, Any]:
    auroc = _auroc(name, attack, harder) - 0.003 * draw.random()
    caught = max(0.01, 1 - 6 * (1 - auroc))
    return {
        "n": 1300,
        "auroc": _spread(auroc),
        "aupr": auroc - 0.01,
        "aupr_1": max(0.01, caught - 0.1),
        "tpr": {
            "0.05": _spread(min(1.0, caught + 0.1)),
            "0.01": _spread(caught),
            "0.001": _spread(caught / 2),
        },
        "fpr95": 1 - auroc,
        "guarded_success": 0.9 * (1 - caught),
        "robust_accuracy": 1 - 0.9 * (1 - caught),
    }


def _spread(mean: float) -> dict[str, float]:
    return {"mean": mean, "sd": mean / 200, "low": 0.99 * mean, "high": min(1.0, 1.01 * mean)}


def _summary(cells: dict[str, Any]) -> dict[str, Any]:
    found = {attack: cell["auroc"]["mean"] for attack, cell in cells.items()}
    worst = min(found, key=lambda attack: found[attack])
    return {
        "mean": _spread(sum(found.values()) / len(found)),
        "worst": _spread(found[worst]),
        "worst_attack": worst,
        "tpr_1": _spread(sum(c["tpr"]["0.01"]["mean"] for c in cells.values()) / len(cells)),
    }


def _sealed(row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    seen = {
        attack: {**cell, "auroc": _spread(cell["auroc"]["mean"] - 0.01 * draw.random())}
        for attack, cell in row["seen"].items()
    }
    summary = {**row["summary"], "seen": _summary(seen), "unseen": None, "shift_fpr": None}
    return {"seen": seen, "clean": row["clean"], "summary": summary}


def _asked(stock: float, guarded: float, median: dict[str, float | None]) -> dict[str, Any]:
    return {
        "n": 50,
        "budget": 1000,
        "stock_success": stock,
        "guarded_success": guarded,
        "ratio": guarded / stock,
        "median_queries": median,
    }


def _adaptive() -> dict[str, Any]:
    def row(fooled: float, through: float) -> dict[str, dict[str, float]]:
        return {
            str(eps): {
                "fooled": min(1.0, fooled * (0.4 + eps / 8)),
                "through": min(1.0, through * (0.2 + eps / 8)),
                "through_1": min(1.0, 1.2 * through * (0.2 + eps / 8)),
                "mean_l2": eps * 0.17,
            }
            for eps in (2, 4, 8)
        }

    rows = {"joint loss": row(0.9, 0.4), "orthogonal PGD": row(0.95, 0.5), "mimic": row(0.7, 0.6)}
    bare = {
        str(eps): {"fooled": min(1.0, 0.5 + eps / 8), "mean_l2": eps * 0.11} for eps in (2, 4, 8)
    }
    worst = row(1.0, 0.65)
    return {"eps_255": [2, 4, 8], "n": 200, "fpr": 0.05, "rows": rows, "worst": worst, "bare": bare}


def _roc(name: str, attack: str) -> list[list[float]]:
    auroc = 0.93 if attack == "all" else _auroc(name, attack)
    auroc = auroc if attack != "all" else 1 - 0.05 * CONTESTANTS[name][2]
    power = max(0.01, (1 - auroc) / auroc)
    return [[fpr, fpr**power] for fpr in ROC_GRID]
