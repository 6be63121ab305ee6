"""What the recipes are judged by, as arguments of `common.Task`."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def perplexity(metrics: Mapping[str, float]) -> dict[str, float]:
    """Perplexity of the held-out text: exp of the mean loss per token, in nats."""
    loss = metrics["eval_loss"]
    # A diverged model: exp would overflow, and NaN stays NaN.
    return {"eval_perplexity": math.inf if loss > 700 else math.exp(loss)}


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of examples whose predicted class (N,) is the right one."""
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}


PERPLEXITY: dict[str, Any] = {
    "metric": "eval_perplexity",
    "metric_name": "perplexity",
    "metric_scale": "log",
    "derive": perplexity,
}
ACCURACY: dict[str, Any] = {
    "metric": "eval_accuracy",
    "metric_name": "accuracy",
    "compute_metrics": accuracy,
    # Classes instead of logits: that much less to gather and to keep.
    "preprocess_logits": lambda logits, labels: logits.argmax(dim=-1),
}
