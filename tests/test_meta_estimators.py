"""Gradient estimates against exact gradients and a case computed by hand."""

import pytest
import torch

from hf_lopt.meta.estimators import Estimator


class Quadratic:
    """Gradient descent on x²/2 with the learning rate theta, whose meta-loss is the mean of x²/2 over a run.

    Runs have ``length`` steps in truncations of ``truncation``; x starts at 1.
    """

    def __init__(self, pairs, length, truncation):
        self.pairs, self.length, self.truncation = pairs, length, truncation
        self.x, self.step = torch.ones(2 * pairs, dtype=torch.float64), length

    def ended(self):
        return list(range(self.pairs)) if self.step >= self.length else []

    def unroll(self, vectors):
        if self.step >= self.length:
            self.x, self.step = torch.ones(2 * self.pairs, dtype=torch.float64), 0
        total = torch.zeros(2 * self.pairs, dtype=torch.float64)
        for _ in range(self.truncation):
            self.x = self.x * (1.0 - vectors[:, 0])
            total = total + self.x.square() / 2.0
        self.step += self.truncation
        return total / self.length


def exact(theta, length):
    """d/dtheta of mean_t (1 - theta)^(2t)/2, worked out."""
    return sum(-t * (1.0 - theta) ** (2 * t - 1) for t in range(1, length + 1)) / length


def estimates(method, truncation, pairs=4000, length=10, theta=0.05, std=0.005):
    """The sum over the truncations of a run, from many pairs: its mean and standard error by repeated runs."""
    values = []
    for seed in range(12):
        runs = Quadratic(pairs, length, truncation)
        estimator = Estimator(runs, 1, std, torch.Generator().manual_seed(seed), method)
        point = torch.tensor([theta], dtype=torch.float64)
        parts = [estimator.gradient(point)[0] for _ in range(length // truncation)]
        values.append(sum(part.double().item() for part in parts))
    values = torch.tensor(values)
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def test_pes_is_unbiased_and_truncated_es_is_not():
    wanted = exact(0.05, 10)
    for truncation in (1, 2, 5, 10):
        mean, error = estimates("pes", truncation)
        assert error < 0.08 * abs(wanted)
        assert abs(mean - wanted) < 3.0 * error + 0.005 * abs(wanted), (truncation, mean, wanted, error)
    mean, error = estimates("truncated_es", 10)  # the whole run: no truncation to be blind to
    assert abs(mean - wanted) < 3.0 * error + 0.005 * abs(wanted)
    mean, error = estimates("truncated_es", 2)
    assert abs(mean - wanted) > 10.0 * error and abs(mean) < 0.6 * abs(wanted), (mean, wanted, error)


class Scripted:
    """Two pairs whose runs end at given truncations, with meta-losses written down."""

    pairs = 2

    def __init__(self, losses, ends):
        self.losses, self.ends, self.seen, self.t = losses, ends, [], 0

    def ended(self):
        return self.ends[self.t]

    def unroll(self, vectors):
        self.seen.append(vectors)
        self.t += 1
        return torch.tensor(self.losses[self.t - 1])


@pytest.mark.parametrize("method", ["pes", "truncated_es"])
def test_bookkeeping_by_hand(method):
    """Pair 1 begins anew in the third truncation: its perturbations of the first two are forgotten."""
    std, theta = 0.5, torch.tensor([1.0, -1.0])
    losses = [[1.0, 2.0, 0.5, 1.0], [3.0, 1.0, 1.0, 2.0], [0.0, 5.0, 1.0, 1.0]]
    runs = Scripted(losses, [[0, 1], [], [1]])
    estimator = Estimator(runs, 2, std, torch.Generator().manual_seed(7), method)
    found = [estimator.gradient(theta)[0] for _ in losses]
    noise = [vectors[:2] - theta for vectors in runs.seen]
    for vectors, e in zip(runs.seen, noise, strict=True):
        assert torch.equal(vectors[2:], theta - e) or torch.allclose(vectors[2:], theta - e)
    if method == "pes":
        sums = [noise[0], noise[0] + noise[1], torch.stack([noise[0][0] + noise[1][0] + noise[2][0], noise[2][1]])]
    else:
        sums = noise
    differences = [(0.5, 1.0), (2.0, -1.0), (-1.0, 4.0)]
    for gradient, x, (a, b) in zip(found, sums, differences, strict=True):
        torch.testing.assert_close(gradient, (a * x[0] + b * x[1]) / (2 * 0.25 * 2))
    assert torch.allclose(estimator.accumulated, sums[-1])


def test_differences_are_clipped_and_mistakes_named():
    runs = Scripted([[5.0, 0.0, 0.0, 0.1]], [[0, 1]])
    estimator = Estimator(runs, 2, 0.1, torch.Generator().manual_seed(0), clip=0.5)
    gradient, losses = estimator.gradient(torch.zeros(2))
    noise = runs.seen[0][:2]
    torch.testing.assert_close(gradient, (0.5 * noise[0] - 0.1 * noise[1]) / (2 * 0.01 * 2))
    assert losses.tolist() == pytest.approx([5.0, 0.0, 0.0, 0.1])
    with pytest.raises(ValueError, match="pes, truncated_es"):
        Estimator(runs, 2, 0.1, torch.Generator(), "reinforce")
    with pytest.raises(ValueError, match="std"):
        Estimator(runs, 2, 0.0, torch.Generator())
