"""Linear classifiers on cached features, by the protocols of the two papers and by logistic regression.

All images are encoded once, so a probe takes seconds. The price, for "linear-sgd", is that the classifier sees clean
views where the authors' code augments its training images. The accuracy is that of the last epoch, never the best.
Features are taken as they are, as both papers do; only "linear-lbfgs" standardizes them, so that one grid of penalties
suits any encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.evaluation.protocols.base import (
    LabeledFeatures,
    Protocol,
    accuracies,
    best_classes,
    check_labeled,
    labeled,
)
from hf_ssl_or.evaluation.protocols.logistic import LogisticRegression
from hf_ssl_or.randomness import keyed_generator, keyed_permutation
from hf_ssl_or.structures import ViewSpec


@dataclass(frozen=True, kw_only=True)
class LinearProtocol(Protocol):
    """A linear classifier of features; subclasses say how it is fitted."""

    def fit(self, features_NF: Tensor, labels_N: Tensor, num_classes: int, seed: int) -> nn.Linear:
        """Fits the classifier on the features' device."""
        raise NotImplementedError

    def run(
        self, train: LabeledFeatures, test: LabeledFeatures, *, seed: int, device: torch.device | str
    ) -> dict[str, float]:
        """Fits and evaluates the classifier on `device`, see `linear_probe`."""
        classes = check_labeled(train, test, what=self.name)
        train = LabeledFeatures(train.features_NF.to(device).float(), train.labels_N.to(device))
        with torch.enable_grad():
            classifier = self.fit(train.features_NF, train.labels_N, classes, seed)
        if not all(bool(p.isfinite().all()) for p in classifier.parameters()):
            raise InputError(f"{self.name}: the classifier diverged, the features are too large; use linear-lbfgs")
        return {
            f"{split}top{top}": percent
            for split, side in (("", test), ("train_", train))
            for top, percent in _accuracies(classifier, side).items()
        }


@dataclass(frozen=True, kw_only=True)
class GradientProtocol(LinearProtocol):
    """Cross-entropy by minibatches.

    Attributes:
        optimizer: "sgd" (Nesterov momentum 0.9) or "adam".
        epochs: Passes over the training features.
        batch_size: Images per step.
        learning_rate: Initial learning rate.
        milestones: Epochs after which the learning rate is divided by 10.
        weight_decay: L2 penalty of weights and biases.
        label_smoothing: Share of the target spread over all classes.
    """

    optimizer: Literal["sgd", "adam"]
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    milestones: tuple[int, ...] = ()
    label_smoothing: float = 0.0

    def fit(self, features_NF: Tensor, labels_N: Tensor, num_classes: int, seed: int) -> nn.Linear:
        """Trains from a keyed initialization, in a keyed order."""
        classifier = _classifier(features_NF, num_classes, seed)
        optimizer = self._optimizer(classifier)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, self.milestones, gamma=0.1)
        for epoch in range(self.epochs):
            order_N = torch.from_numpy(keyed_permutation(len(labels_N), seed, "linear probe", epoch))
            for index_B in order_N.to(labels_N.device).split(self.batch_size):
                logits_BK = classifier(features_NF[index_B])
                loss = F.cross_entropy(logits_BK, labels_N[index_B], label_smoothing=self.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        return classifier

    def _optimizer(self, classifier: nn.Linear) -> torch.optim.Optimizer:
        rate, decay = self.learning_rate, self.weight_decay
        if self.optimizer == "adam":
            return torch.optim.Adam(classifier.parameters(), rate, weight_decay=decay, fused=True)
        return torch.optim.SGD(
            classifier.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=decay, fused=True
        )


@dataclass(frozen=True, kw_only=True)
class LogisticProtocol(LinearProtocol):
    """Logistic regression of standardized features to convergence, the L2 penalty chosen on held-out images.

    Minimizes mean cross-entropy + l2 / 2 * ||W||^2 (scikit-learn's C is 1 / (N * l2)); the bias is free.

    Attributes:
        penalties: Values of l2, from the strongest; each fit starts from the one before.
        held_out: Share of the training images that chooses among them; the last fit is on all.
        iterations: At most so many L-BFGS iterations for each fit.
    """

    penalties: tuple[float, ...] = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
    held_out: float = 0.1
    iterations: int = 200

    def fit(self, features_NF: Tensor, labels_N: Tensor, num_classes: int, seed: int) -> nn.Linear:
        """Chooses the penalty on a keyed split, fits on all images, folds the standardization into the weights."""
        mean_F, std_F = features_NF.mean(0), features_NF.std(0)
        std_F = torch.where(std_F > 0, std_F, 1)
        x_NF = (features_NF - mean_F) / std_F
        order_N = torch.from_numpy(keyed_permutation(len(labels_N), seed, "held out")).to(labels_N.device)
        aside = max(1, round(self.held_out * len(labels_N)))
        held_out, kept = order_N[:aside], order_N[aside:]
        model = self._model(x_NF[kept], labels_N[kept], num_classes)
        scores = [self._score(model.solve(l2), x_NF[held_out], labels_N[held_out]) for l2 in self.penalties]
        best = self.penalties[scores.index(max(scores))]
        weight_KF, bias_K = self._model(x_NF, labels_N, num_classes, tolerance=1e-5).solve(best)
        classifier = nn.Linear(x_NF.shape[1], num_classes, device=x_NF.device)
        with torch.no_grad():
            classifier.weight.copy_(weight_KF / std_F)
            classifier.bias.copy_(bias_K - classifier.weight @ mean_F)
        return classifier

    def _model(self, x_NF: Tensor, labels_N: Tensor, num_classes: int, tolerance: float = 1e-4) -> LogisticRegression:
        return LogisticRegression(x_NF, labels_N, num_classes, tolerance=tolerance, iterations=self.iterations)

    @staticmethod
    def _score(solution: tuple[Tensor, Tensor], x_NF: Tensor, labels_N: Tensor) -> int:
        weight_KF, bias_K = solution
        return int((best_classes(torch.addmm(bias_K, x_NF, weight_KF.T), 1)[:, 0] == labels_N).sum())


# Augmentations of the multi-view paper's CIFAR code.
_FASTSSL_VIEW = ViewSpec(crop_scale=(0.08, 1.0), saturation=0.4, hue=0.0)

LINEAR_PROTOCOLS = (
    GradientProtocol(  # He, Du & Ma (NeurIPS 2024), appendix; its second milestone is the end
        name="linear-sgd",
        optimizer="sgd",
        epochs=100,
        batch_size=256,
        learning_rate=0.1,
        milestones=(60, 100),
        weight_decay=5e-4,
    ),
    GradientProtocol(  # Ghosh et al. (NeurIPS 2024): features averaged over 16 views, of test images too
        name="linear-averaged-views",
        num_views=16,
        views=(_FASTSSL_VIEW,),
        optimizer="adam",
        epochs=200,
        batch_size=512,
        learning_rate=1e-3,
        weight_decay=1e-6,
        label_smoothing=0.1,
    ),
    LogisticProtocol(name="linear-lbfgs"),
)


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor | None,
    test_features: Tensor,
    test_labels: Tensor | None,
    *,
    protocol: str | LinearProtocol = "linear-sgd",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Trains a linear classifier on training features and evaluates it on test features.

    Args:
        train_features: (N, F); averaged over 16 views by the caller, where the protocol says so.
        train_labels: (N,) int64.
        test_features: (M, F).
        test_labels: (M,) int64.
        protocol: A protocol or its name.
        seed: Key of the initialization, the order and the held-out split.
        device: Where the classifier is trained; the training features are moved there.

    Returns:
        `top1`, `top5`, `train_top1` and `train_top5` in percent.

    Raises:
        InputError: The protocol is unknown, the classifier diverged, or what `check_labeled` refuses.
    """
    if isinstance(protocol, str):
        known = {each.name: each for each in LINEAR_PROTOCOLS}
        if protocol not in known:
            raise unknown("linear protocol", protocol, known)
        protocol = known[protocol]
    train = labeled(train_features, train_labels, what=protocol.name)
    test = labeled(test_features, test_labels, what=protocol.name)
    return protocol.run(train, test, seed=seed, device=device)


def _classifier(features_NF: Tensor, num_classes: int, seed: int) -> nn.Linear:
    """A linear layer with torch's initialization, sampled on the CPU so that every device starts alike."""
    classifier, bound = nn.Linear(features_NF.shape[1], num_classes), features_NF.shape[1] ** -0.5
    generator = keyed_generator(seed, "linear probe")
    for parameter in classifier.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return classifier.to(features_NF.device)


@torch.no_grad()
def _accuracies(classifier: nn.Linear, side: LabeledFeatures) -> dict[int, float]:
    device = classifier.weight.device
    chunks = side.features_NF.split(8192)
    return accuracies(torch.cat([best_classes(classifier(x_BF.to(device).float())) for x_BF in chunks]), side.labels_N)
