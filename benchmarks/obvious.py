"""The step as it is usually written: what ours is measured against, and must equal.

The prompt is repeated for every sample; each token is drawn by running the whole growing sequence again; attention takes a
dense mask of the sequence length squared; the feature network runs all its layers and keeps all hidden states; logits are
float32 for every position. The parts have the interfaces of ``components.types``, so that reward, advantage and loss are the
same code for both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from components.blocks import Anchors, PackedLayout
from components.rollouts import Sampler
from components.types import Batch, Logprobs, Rollouts


class _Rows:
    """Sequences ``[prompt | blocks]`` with one sample each, ``B * n`` of them, for blocks of any length so far."""

    def __init__(self, batch: Batch, anchors: Tensor, blocks: Tensor) -> None:
        """``blocks`` is ``[B, n, K, g]``, ``g`` may be 0."""
        B, n, K, g = blocks.shape
        self.shape = (B, n, K, g)
        self.prompt_len = batch.tokens.shape[1]
        layout = PackedLayout(doc_ids=batch.doc_ids, anchors=anchors, num_samples=1, block_len=g)
        repeated = (x.repeat_interleave(n, dim=0) for x in (batch.tokens, layout.positions(), layout.visibility()))
        prompt, self.positions, self.mask = repeated
        self.tokens = torch.cat((prompt, blocks.flatten(0, 1).flatten(1)), dim=1)
        self.anchors = anchors.repeat_interleave(n, dim=0)  # [B*n, K]

    def blocks(self, x: Tensor) -> Tensor:
        """Per-position values ``[B*n, S, ...]`` of the block tokens, ``[B, n, K, g, ...]``."""
        B, n, K, g = self.shape
        return x[:, self.prompt_len :].reshape(B, n, K, g, *x.shape[2:])

    def predictors(self, x: Tensor) -> Tensor:
        """``x`` ``[B*n, S, V]`` where each block's next token is predicted, ``[B, n, K, V]``."""
        B, n, K, g = self.shape
        if g:
            return self.blocks(x)[..., -1, :]
        return x.gather(1, (self.anchors - 1)[..., None].expand(-1, -1, x.shape[-1])).view(B, n, K, -1)


class ObviousPolicy(nn.Module):
    """Log-probs from whole rows and float32 logits everywhere."""

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def logits(self, rows: _Rows) -> Tensor:
        """``[B*n, S, V]`` float32."""
        return self.decoder(rows.tokens, mask=rows.mask, input_pos=rows.positions).float()

    def forward(self, batch: Batch, rollouts: Rollouts, temperature: float, with_target: bool = False) -> Logprobs:
        rows = _Rows(batch, rollouts.anchors, rollouts.tokens)
        B, n, K, G = rows.shape
        logits = self.logits(rows)
        first = logits.gather(1, (rows.anchors - 1)[..., None].expand(-1, -1, logits.shape[-1])).view(B, n, K, 1, -1)
        predicting = torch.cat((first, rows.blocks(logits)[..., :-1, :]), dim=-2)
        logprobs = F.log_softmax(predicting / temperature, dim=-1).gather(-1, rollouts.tokens[..., None])[..., 0]
        target = None
        if with_target:
            prompt = F.log_softmax(logits[::n, : rows.prompt_len - 1], dim=-1)
            target = prompt.gather(-1, batch.tokens[:, 1:, None])[..., 0]
        return Logprobs(rollout=logprobs, target=target)


class ObviousGenerator:
    """Draws every token from a forward of everything before it."""

    def __init__(self, *, anchors: Anchors, rollout_len: int, num_samples: int, temperature: float) -> None:
        self.anchors = anchors
        self.rollout_len = rollout_len
        self.num_samples = num_samples
        self.temperature = temperature
        self._sampler = Sampler(temperature=temperature)

    @torch.no_grad()
    def __call__(self, policy: ObviousPolicy, batch: Batch, rng: torch.Generator) -> Rollouts:
        anchors = self.anchors(batch, self.rollout_len)
        B, K = anchors.positions.shape
        shape = (B, self.num_samples, K, self.rollout_len)
        uniforms = torch.rand(shape, generator=rng)
        tokens, logprobs = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        for step in range(self.rollout_len):
            rows = _Rows(batch, anchors.positions, tokens[..., :step])
            logits = rows.predictors(policy.logits(rows))
            drawn, scores = self._sampler(logits.flatten(0, 2), uniforms[..., step].reshape(-1, 1))
            tokens[..., step], logprobs[..., step] = drawn.view(shape[:-1]), scores.view(shape[:-1])
        mask = anchors.mask[:, None, :, None].expand(shape)
        return Rollouts(tokens=tokens, mask=mask, anchors=anchors.positions, logprobs=logprobs)


class ObviousNetwork(nn.Module):
    """A feature network that runs to its end, head included, and keeps the hidden states of all layers."""

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.decoder = decoder.requires_grad_(False)
        self.num_layers = len(decoder.layers)
        self.decoder.output_hidden_states = list(range(self.num_layers))

    def keep_layers(self, depth: int) -> None:
        """Nothing is cut."""

    @torch.no_grad()
    def forward(self, batch: Batch, rollouts: Rollouts, taps: tuple[int, ...]) -> tuple[PackedLayout, list[Tensor]]:
        rows = _Rows(batch, rollouts.anchors, rollouts.tokens)
        _, n, _, G = rows.shape
        states = self.decoder(rows.tokens, mask=rows.mask, input_pos=rows.positions)
        layout = PackedLayout(doc_ids=batch.doc_ids, anchors=rollouts.anchors, num_samples=n, block_len=G)
        packed = []
        for tap in taps:  # the input of layer i is what layer i (counted from 1) gave
            h = states[tap]
            blocks = rows.blocks(h).transpose(1, 2).flatten(1, 3)
            packed.append(torch.cat((h[::n, : rows.prompt_len], blocks), dim=1))
        return layout, packed
