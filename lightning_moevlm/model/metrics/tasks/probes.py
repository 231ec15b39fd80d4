"""Reads classes off frozen features, as representations are commonly compared.

linear probe   logistic regression by L-BFGS, its L2 strength chosen on a fifth of the training features
               (CLIP, arXiv 2103.00020, section 3.2; there on a validation split), features scaled to unit variance
k-NN           each of the k most similar training features votes for its class with exp(cosine / temperature)
               (DINO, arXiv 2104.14294, section 4.2.1, from Wu et al., arXiv 1805.01978)
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = tuple(10.0**exponent for exponent in range(-3, 4))  # C of scikit-learn, the inverse of the L2 strength
_HELD_OUT = 5  # every fifth training feature chooses the strength
_ROWS = 1024  # of the similarity matrix at a time


def linear_probe(train_ND: Tensor, class_N: Tensor, held_MD: Tensor, num_classes: int) -> Tensor:
    """Return the log-probability of every class for held-out features, (M, C) fp64; -inf for a class without samples.

    Args:
        train_ND: features, in an order that does not depend on their classes.
        class_N: their classes, at least two different ones.
        held_MD: features to classify.
        num_classes: C.
    """
    std_D, mean_D = torch.std_mean(train_ND.double(), dim=0)
    scaled_ND, scaled_MD = ((each.double() - mean_D) / std_D.clamp(min=1e-6) for each in (train_ND, held_MD))
    chooses_N = torch.arange(len(class_N)) % _HELD_OUT == _HELD_OUT - 1
    fitted_N = ~chooses_N
    best = STRENGTHS[len(STRENGTHS) // 2]
    if chooses_N.any() and len(class_N[fitted_N].unique()) > 1:
        rights = []
        for strength in STRENGTHS:
            scores = _fit(scaled_ND[fitted_N], class_N[fitted_N], scaled_ND[chooses_N], num_classes, strength)
            rights.append(int((scores.argmax(dim=1) == class_N[chooses_N]).sum()))
        best = STRENGTHS[rights.index(max(rights))]  # the most regularised of the best
    return _fit(scaled_ND, class_N, scaled_MD, num_classes, best)


def nearest_neighbours(
    train_ND: Tensor, class_N: Tensor, held_MD: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    """Return the votes of the k nearest training features for every class, (M, C) fp64; arguments as above."""
    train_ND, held_MD = F.normalize(train_ND.double(), dim=1), F.normalize(held_MD.double(), dim=1)
    votes_MC = torch.zeros(len(held_MD), num_classes, dtype=torch.float64)
    for start in range(0, len(held_MD), _ROWS):
        similarity_RK, nearest_RK = (held_MD[start : start + _ROWS] @ train_ND.T).topk(min(k, len(train_ND)), dim=1)
        votes_MC[start : start + _ROWS].scatter_add_(1, class_N[nearest_RK], (similarity_RK / temperature).exp())
    return votes_MC


def _fit(train_ND: Tensor, class_N: Tensor, held_MD: Tensor, num_classes: int, strength: float) -> Tensor:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # separable features have no optimum without a penalty
        model.fit(train_ND.numpy(), class_N.numpy())
    scores_MC = torch.full((len(held_MD), num_classes), -torch.inf, dtype=torch.float64)
    log_p_MF = torch.from_numpy(model.predict_log_proba(held_MD.numpy()))  # of the classes that it was fitted to
    scores_MC[:, torch.from_numpy(model.classes_)] = log_p_MF
    return scores_MC
