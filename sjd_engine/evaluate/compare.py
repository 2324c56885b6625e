"""Does one run draw what another draws? Tests of two runs of the same prompts, none of which needs the hub.

    FD-EffNet, KID-EffNet   distances of EfficientNet-Lite0 features. Both depend on the number of images, FD in its
                            expectation, too, so the measure is the same distance between two runs of one method with
                            different seeds: the calibration.
    TOST                    two one-sided tests that the mean log-probability of a token, under one-token-a-pass
                            sampling, differs by less than `MARGIN`. Passing is evidence for equivalence; a difference
                            that is not significant would be none.
    C2ST                    accuracy of a classifier that tells the runs' token grids apart, on prompts it has not
                            seen; 0.5 where their laws are one.

Sources: Heusel et al., arXiv 1706.08500 (FD); Binkowski et al., arXiv 1801.01401 (KID); Schuirmann, "A comparison of
the two one-sided tests procedure", 1987 (TOST); Lopez-Paz and Oquab, arXiv 1610.06545 (C2ST).
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sjd_engine.errors import require
from sjd_engine.evaluate.features import NUM_FEATURES

MARGIN = 0.05  # nats a token, fixed before anything was drawn
CONFIDENCE = 0.90  # of the interval that lies inside the margin where TOST passes at 5 %
SUBSETS, SUBSET_SIZE = 100, 100  # of KID
FOLDS, COMPONENTS, REGULARISATION = 5, 48, 0.1  # of the classifier: parts of the prompts, components of a grid


class Given(nn.Module):
    """Features that torchmetrics is given in the place of images."""

    num_features = NUM_FEATURES

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(mine: Tensor, reference: Tensor) -> float:
    """Between normal laws with the means and covariances of features [N, 1280] and [M, 1280]."""
    require("eval", "torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(Given())
    metric.update(reference, real=True)
    metric.update(mine, real=False)
    return float(metric.compute())


def kernel_distance(mine: Tensor, reference: Tensor) -> tuple[float, float]:
    """(mean, standard deviation over subsets) of KID, whose expectation is 0 where the laws are one."""
    require("eval", "torchmetrics")
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():  # that it keeps the features
        warnings.simplefilter("ignore")
        metric = KernelInceptionDistance(Given(), SUBSETS, min(SUBSET_SIZE, len(mine), len(reference)))
    metric.update(reference, real=True)
    metric.update(mine, real=False)
    with torch.random.fork_rng(devices=[]):  # it draws the subsets
        torch.manual_seed(0)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


@dataclass(frozen=True)
class Equivalence:
    """TOST of paired means: difference, its interval of 90 %, and the p-value of "they differ by `margin` or more"."""

    difference: float
    low: float
    high: float
    margin: float
    p: float

    @property
    def shown(self) -> bool:
        """At 5 %."""
        return self.p < (1 - CONFIDENCE) / 2


def equivalence(mine: np.ndarray, reference: np.ndarray, margin: float = MARGIN) -> Equivalence:
    """TOST of pairs: entry i of both is the mean log-probability of a token of an image of the same prompt.

    Raises: ValueError for fewer than two pairs.
    """
    from scipy.stats import t

    if len(mine) != len(reference) or len(mine) < 2:
        raise ValueError(f"equivalence: expected two or more pairs, got {len(mine)} and {len(reference)} values")
    differences = np.asarray(mine, dtype=np.float64) - reference
    freedom = len(differences) - 1
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(len(differences))
    half = float(t.isf((1 - CONFIDENCE) / 2, freedom)) * error
    # Pairs that are all equal have no error, and lie inside any margin.
    p = float(t.sf((margin - abs(mean)) / error, freedom)) if error else float(abs(mean) >= margin)
    return Equivalence(mean, mean - half, mean + half, margin, p)


def two_sample_accuracy(mine: Tensor, reference: Tensor, prompts: list[str]) -> tuple[float, float]:
    """C2ST: (accuracy, chance of as much or more where the classifier guesses).

    A logistic regression on principal components of the codes' vectors, and on how often a token repeats its neighbour;
    tested on prompts that it has not seen. Answers about images of one prompt are not quite independent, so take the
    chance as a guide, and the calibration as the measure.

    Args:
        mine, reference: [N, rows, cols, E] vectors of the codes.
        prompts: of the images of each.
    """
    require("eval", "sklearn")
    from scipy.stats import binom
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.preprocessing import StandardScaler

    grids = torch.cat((mine, reference)).float()
    labels = np.repeat((1, 0), (len(mine), len(reference)))
    components = PCA(min(COMPONENTS, len(labels) // 2), random_state=0).fit_transform(grids.flatten(1).numpy())
    features = StandardScaler().fit_transform(np.hstack((repeats(grids).numpy(), components)))
    folds = GroupKFold(min(FOLDS, len(set(prompts))))
    classifier = LogisticRegression(C=REGULARISATION, max_iter=1000)
    guesses = cross_val_predict(classifier, features, labels, groups=prompts * 2, cv=folds)
    right = int((guesses == labels).sum())
    return right / len(labels), float(binom.sf(right - 1, len(labels), 0.5))


def repeats(grids: Tensor) -> Tensor:
    """[N, 2]: how often a token is that to its left, and that above."""
    left = (grids[:, :, 1:] == grids[:, :, :-1]).all(-1).float().mean((1, 2))
    above = (grids[:, 1:] == grids[:, :-1]).all(-1).float().mean((1, 2))
    return torch.stack((left, above), 1)
