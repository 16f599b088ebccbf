"""The swappable parts of a step, as a config names them. What a run does not use gets no weights and is not done: supervised
fine-tuning draws no rollouts, and for a reward that reads no features none are made."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from components.advantages import Reinforce
from components.features import NoFeatures
from components.models import Policy, deferred_weights
from components.rewards import NoReward
from components.rollouts import NoRollouts
from components.training.instantiate import accepts, instantiate
from components.training.messages import say, timed
from components.training.placement import place
from components.types import Advantage, BlockGenerator, FeatureExtractor, Generator, Loss, Reference, Reward

_KINDS = {
    "generator": BlockGenerator,
    "reward": Reward,
    "advantage": Advantage,
    "feature_extractor": FeatureExtractor,
}


class Measuring(NamedTuple):
    """What draws rollouts and judges them."""

    generator: Generator
    feature_extractor: FeatureExtractor
    reward: Reward


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What one step is made of besides policy and loss.

    Attributes:
        training: does nothing if the loss uses no rollouts.
        validation: what ``validation`` names itself, and otherwise the same parts; it draws rollouts whatever the loss uses.
        advantage: of training.
        network: the feature network, or None.
        reference: of the loss' KL term, or None.
    """

    training: Measuring
    validation: Measuring
    advantage: Advantage
    network: Any
    reference: Reference | None


def build_parts(cfg: DictConfig, *, loss: Loss, policy: Policy, tokenizer: Any, device: torch.device) -> Parts:
    """Build the parts that a config names; networks get their weights, on ``device``. Collective.

    Args:
        cfg: of ``recipes/ebft.py``, checked by ``check_recipe``.
        loss: says what it uses.
        policy: given to parts that have an argument of that name.
        tokenizer: likewise.
        device: of the policy.

    Raises:
        ValueError: a part that loss, reward or validation needs is missing, or what a part refuses.
    """
    offered = {"policy": policy, "tokenizer": tokenizer}

    @functools.cache
    def build(path: str, stop_tokens: tuple[int, ...] = ()) -> Any:
        """The part at ``path``; one that validation does not name itself is that of training. None if neither is there.

        A reward that reads text needs to know at which tokens the rollouts it is given end.
        """
        node = OmegaConf.select(cfg, path)
        if node is None:
            return build(path.removeprefix("validation."), stop_tokens) if path.startswith("validation.") else None
        if stop_tokens and not accepts(node, "stop_tokens"):
            return build(path)
        known = {"stop_tokens": stop_tokens} if stop_tokens else {}
        with deferred_weights():
            kind = _KINDS[path.removeprefix("validation.")]
            return instantiate(node, path=path, kind=kind, offered=offered, **known)

    trains = getattr(loss, "uses_rollouts", True)
    if missing := [key for key in ("generator", "reward", "advantage") if trains and key not in cfg]:
        raise ValueError(
            f"{missing[0]}: this key is missing; add it, or set loss.rl_coef to 0 to train without rollouts"
        )
    shared = [key for key in ("generator", "reward") if "validation" in cfg and key not in cfg.validation]
    unused = [key for key in ("generator", "reward", "advantage") if key in cfg and not trains and key not in shared]
    if unused:
        say(f"not used, since loss uses no rollouts: {', '.join(unused)}")
    drawn = []
    for used, place_of in ((trains, ""), ("validation" in cfg, "validation.")):
        generator = build(place_of + "generator")
        reward = build(place_of + "reward", tuple(getattr(generator, "stop_tokens", ())))
        drawn.append((generator, reward) if used and generator is not None and reward is not None else None)
    advantage = build("advantage")
    read = any(pair is not None and getattr(pair[1], "uses_features", True) for pair in drawn)
    if read and "feature_extractor" not in cfg:
        raise ValueError("feature_extractor: this key is missing, and the reward reads features; add it")
    lends_network = "reference" in cfg and accepts(cfg.reference, "extractor")
    if lends_network and "feature_extractor" not in cfg:
        raise ValueError("feature_extractor: this key is missing, and reference uses its network; add it")
    extractor: Any = build("feature_extractor")
    if read or lends_network:
        with timed("feature network"):
            for part in vars(extractor).values():
                if isinstance(part, nn.Module):
                    place(part, device, data_parallel_replicate=cfg.get("data_parallel_replicate", 1))
    elif extractor is not None:
        say("not used, since neither training nor validation reads features: feature_extractor")
        extractor = None
    training, validation = (
        Measuring(NoRollouts(), NoFeatures(), NoReward())
        if pair is None
        else Measuring(pair[0], extractor if getattr(pair[1], "uses_features", True) else NoFeatures(), pair[1])
        for pair in drawn
    )

    reference = None
    if "reference" in cfg:
        known = {"extractor": extractor} if lends_network else {}
        with deferred_weights():
            reference = instantiate(cfg.reference, path="reference", kind=Reference, **known)
        if isinstance(reference, nn.Module):
            place(reference, device)
    return Parts(
        training=training,
        validation=validation,
        advantage=advantage if trains else Reinforce(),
        network=getattr(extractor, "network", None),
        reference=reference,
    )
