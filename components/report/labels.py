"""What metrics are called where people read them."""

TITLES = {
    "cross_entropy": "cross-entropy (nats/token)",
    "feature_matching_loss": "feature-matching loss",
    "feature_matching_loss_whitened": "feature-matching loss, whitened",
    "alignment": "alignment",
    "diversity": "diversity (similarity of samples)",
    "reward": "reward",
    "duplicate_rollouts": "duplicate rollouts (share)",
    "grad_norm": "gradient norm",
    "advantage_std": "advantage, standard deviation",
    "lr": "learning rate",
    "kl": "KL to the reference (nats/token)",
    "tokens_per_second": "rollout tokens per second",
    "peak_memory_gib": "peak memory (GiB)",
}


def title(metric: str) -> str:
    """The title of a metric; its name in words if it is none of ours."""
    return TITLES.get(metric, metric.replace("_", " "))
