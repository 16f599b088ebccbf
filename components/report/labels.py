"""What metrics are called where people read them."""

TITLES = {
    "reward": "reward",
    "alignment": "alignment",
    "diversity": "diversity (similarity to other samples)",
    "feature_matching_loss": "feature-matching loss",
    "feature_matching_loss_whitened": "feature-matching loss, whitened",
    "cross_entropy": "cross-entropy (nats per token)",
    "duplicate_rollouts": "duplicate rollouts (share)",
    "grad_norm": "gradient norm",
    "advantage_std": "advantage, standard deviation",
    "lr": "learning rate",
    "kl": "KL to the reference (nats per token)",
    "tokens_per_second": "rollout tokens per second",
    "peak_memory_gib": "peak memory (GiB)",
}


def title(metric: str) -> str:
    """The title of a metric; its name in words if it is none of ours."""
    return TITLES.get(metric, metric.replace("_", " "))
