"""A feature network that follows the policy: an exponential moving average of its weights."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtune.modules import TransformerDecoder

from components.features.networks import FrozenNetwork
from components.models import Policy, has_adapters


class MovingAverage(FrozenNetwork):
    """``average = decay * average + (1 - decay) * policy``, after every ``every`` optimizer steps.

    Every rank holds all of it in float32, cut after the deepest tap. The recipe calls :meth:`follow` and saves :meth:`tensors`.
    Its ``identity`` is that of the weights it starts from, if first asked for before it moves.

    Args:
        decoder: where the average starts; copied.
        decay: share of the average that stays, 0 (a copy of the policy) to 1 (never moves).
        every: optimizer steps between updates.

    Raises:
        ValueError: values out of range, or weights too coarse to move by small steps.
    """

    def __init__(self, decoder: TransformerDecoder, *, decay: float, every: int = 1) -> None:
        if not 0 <= decay <= 1 or every < 1:
            raise ValueError(f"decay is {decay} and every {every}; give a decay from 0 to 1, and every of at least 1")
        coarse = {parameter.dtype for parameter in decoder.parameters()} - {torch.float32}
        if coarse:
            raise ValueError(f"the average would not move in {coarse.pop()}; set the decoder's dtype to fp32")
        super().__init__(decoder)
        self.decay = decay
        self.every = every

    def tensors(self) -> dict[str, Tensor]:
        """What moves, to be saved and loaded in place."""
        return {f"feature_network.{name}": value for name, value in self.decoder.state_dict().items()}

    def check(self, policy: Policy) -> None:
        """Refuse a policy that it cannot follow.

        Raises:
            ValueError: it has adapters, or weights of other shapes.
        """
        if has_adapters(policy):
            raise ValueError(
                "feature_extractor.network averages all weights, and the model trains adapters only; use "
                "components.features.FrozenNetwork or AdapterFree"
            )
        theirs = policy.decoder.state_dict()
        for name, mine in self.decoder.state_dict().items():
            if name not in theirs or theirs[name].shape != mine.shape:
                raise ValueError(
                    f"feature_extractor.network has {name} {list(mine.shape)}, unlike the policy it is to follow; load both "
                    "from checkpoints of one architecture"
                )

    @torch.no_grad()
    def follow(self, policy: Policy, *, step: int) -> None:
        """Move towards ``policy`` after optimizer step ``step`` (1 is the first). Collective: gathers a weight at a time."""
        if step % self.every:
            return
        theirs = policy.decoder.state_dict()
        for name, mine in self.decoder.state_dict().items():
            value = theirs[name]
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            mine.lerp_(whole.to(mine.device, mine.dtype), 1 - self.decay)
