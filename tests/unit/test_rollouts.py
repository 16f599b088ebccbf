"""Drawing rollouts: cached against uncached, together against alone, and what the sampler's distribution is."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from components.blocks import CompletionAnchor, StridedAnchors
from components.data import load_tokenizer
from components.models import Policy
from components.rollouts import BlockParallelGenerator, Sampler, duplicate_share, uniforms
from components.types import Batch, Rollouts
from tests.checkpoints import write_checkpoint
from tests.tiny import VOCAB, row_by_row, tiny_batch, tiny_decoder

CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def make(**changes):
    settings = {
        "anchors": StridedAnchors(stride=3, context_len=2),
        "rollout_len": 5,
        "num_samples": 3,
        "temperature": 0.8,
    }
    return BlockParallelGenerator(**(settings | changes))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def prompt_only(batch):
    return Batch(tokens=batch.tokens, doc_ids=batch.doc_ids, target_mask=torch.zeros_like(batch.target_mask))


def uncached(decoder, batch, generator, rng):
    """Every token from a whole forward of its own row, with the same uniform numbers."""
    anchors = generator.anchors(batch, generator.rollout_len).positions
    B, K = anchors.shape
    n, G = generator.num_samples, generator.rollout_len
    uniforms = torch.rand(B, n, K, G, generator=rng)
    sampler = Sampler(temperature=generator.temperature)
    tokens, logprobs = torch.zeros(B, n, K, G, dtype=torch.long), torch.zeros(B, n, K, G)
    for b in range(B):
        for k in range(K):
            a = int(anchors[b, k])
            first = int((batch.doc_ids[b] == batch.doc_ids[b, a - 1]).nonzero()[0])
            for j in range(n):
                row = batch.tokens[b, first:a]
                for g in range(G):
                    token, logprob = sampler(decoder(row[None])[0, -1:], uniforms[b, j, k, g].view(1, 1))
                    tokens[b, j, k, g], logprobs[b, j, k, g] = token, logprob
                    row = torch.cat((row, token[0]))
    return tokens, logprobs


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@torch.no_grad()
def test_cached_rollouts_are_uncached_rollouts(family, temperature):
    decoder, batch, generator = tiny_decoder(family=family), tiny_batch(), make(temperature=temperature)
    rollouts = generator(Policy(decoder), batch, seeded())
    tokens, logprobs = uncached(decoder, batch, generator, seeded())
    assert torch.equal(rollouts.tokens, tokens)
    torch.testing.assert_close(rollouts.logprobs, logprobs, **CLOSE)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_sampling_logprobs_are_scored_logprobs(temperature):
    """The policy scores rollouts at the temperature they were drawn at."""
    policy, batch = Policy(tiny_decoder()), tiny_batch()
    rollouts = make(temperature=temperature)(policy, batch, seeded())
    scored = policy(batch, rollouts, temperature=temperature).rollout
    torch.testing.assert_close(scored, rollouts.logprobs, **CLOSE)
    torch.testing.assert_close(scored, row_by_row(policy.decoder, batch, rollouts, temperature), **CLOSE)


def test_in_bf16_too_sampling_and_scoring_agree():
    """The gap is rounding (SmolLM2-135M: .007 in the mean), the distance from float32 that of a bfloat16 model."""
    batch = tiny_batch()
    exact, rounded = (Policy(tiny_decoder(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    rollouts = make()(rounded, batch, seeded())
    gap = rounded(batch, rollouts, temperature=0.8).rollout - rollouts.logprobs
    assert gap.abs().mean() < 0.02
    assert (exact(batch, rollouts, temperature=0.8).rollout - rollouts.logprobs).abs().mean() < 0.1


def test_n_samples_at_once_are_n_single_runs():
    policy, batch, rng = Policy(tiny_decoder()), tiny_batch(B=1), seeded()
    together = make()(policy, batch, seeded())
    for j in range(3):
        alone = make(num_samples=1)(policy, batch, rng)
        assert torch.equal(alone.tokens[:, 0], together.tokens[:, j])
        torch.testing.assert_close(alone.logprobs[:, 0], together.logprobs[:, j], **CLOSE)


def test_a_batch_draws_what_its_rows_draw_one_after_the_other():
    """So that splitting a step into micro-batches does not change it."""
    policy, batch, rng = Policy(tiny_decoder()), tiny_batch(B=4), seeded()
    together = make()(policy, batch, seeded())
    for b in range(4):
        row = Batch(**{name: getattr(batch, name)[b : b + 1] for name in ("tokens", "doc_ids", "target_mask")})
        assert torch.equal(make()(policy, row, rng).tokens[0], together.tokens[b])


@given(world_size=st.sampled_from([1, 2, 3, 6, 12]), micro_batch=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_a_row_of_the_data_stream_has_its_own_uniform_numbers_however_the_rows_are_dealt(world_size, micro_batch):
    """Twelve rows on ranks that take them in turn, in micro-batches: what one rank draws in one call."""
    alone = seeded()
    whole = uniforms((12, 2, 3), alone, rank=0, world_size=1)
    share = 12 // world_size
    size = math.gcd(share, micro_batch)
    ranks = []
    for rank in range(world_size):
        rng = seeded()
        parts = [uniforms((size, 2, 3), rng, rank=rank, world_size=world_size) for _ in range(share // size)]
        ranks.append(torch.cat(parts))
        assert torch.equal(rng.get_state(), alone.get_state())
    assert torch.equal(torch.stack(ranks, dim=1).flatten(0, 1), whole)


def test_a_rollout_ends_with_its_stop_token():
    policy, batch = Policy(tiny_decoder()), tiny_batch()
    free = make()(policy, batch, seeded())
    stop = free.tokens.flatten().mode().values.item()
    stopped = make(stop_tokens=[stop])(policy, batch, seeded())
    ends = (free.tokens == stop).int()
    before_or_at = ends.cumsum(dim=-1) - ends == 0
    assert (stopped.mask != free.mask).any()
    assert torch.equal(stopped.mask, free.mask & before_or_at)
    assert torch.equal(stopped.tokens[stopped.mask], free.tokens[stopped.mask])


def test_stop_tokens_may_be_named_by_their_text(tmp_path):
    tokenizer = load_tokenizer(write_checkpoint(tmp_path))
    assert make(stop_tokens=["<eos>", "a", 7], tokenizer=tokenizer).stop_tokens == [
        tokenizer.eos_id,
        *tokenizer.encode("a"),
        7,
    ]
    with pytest.raises(ValueError, match="'zq', which is 2 tokens"):
        make(stop_tokens=["zq"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no tokenizer to look it up"):
        make(stop_tokens=["<eos>"])


def test_drawing_ends_early_when_every_block_has_stopped():
    policy, batch = Policy(tiny_decoder()), tiny_batch()
    rollouts = make(stop_tokens=list(range(VOCAB)))(policy, batch, seeded())
    assert rollouts.tokens.shape[-1] == 5
    assert torch.equal(rollouts.mask[..., 0], make()(policy, batch, seeded()).mask[..., 0])
    assert not rollouts.mask[..., 1:].any()


@torch.no_grad()
def test_a_completion_continues_the_whole_prompt():
    """K = 1 at the end of each prompt, also where the rollout runs past the row."""
    decoder, batch = tiny_decoder(), tiny_batch(documents=((24,), (9,)))
    target = batch.target_mask.clone()
    target[0, :20] = False
    target[1] = False  # a prompt without a reference: it ends where the text does
    batch = Batch(tokens=batch.tokens, doc_ids=batch.doc_ids, target_mask=target)
    generator = make(anchors=CompletionAnchor(), rollout_len=8, temperature=0.0, num_samples=1)
    rollouts = generator(Policy(decoder), batch, seeded())
    assert rollouts.anchors.tolist() == [[20], [9]]
    assert torch.equal(rollouts.tokens, uncached(decoder, batch, generator, seeded())[0])


def test_a_duplicate_is_a_rollout_that_an_earlier_sample_wrote():
    """Samples (1 2), (3 4), (1 2), (1 9): the third is a copy, and so is the last if both stop after their first token."""
    tokens = torch.tensor([[1, 2], [3, 4], [1, 2], [1, 9]])[None, :, None]  # [1, 4, 1, 2]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    stopped = mask.clone()
    stopped[:, [0, 3], :, 1] = False

    def share(mask):
        zeros = torch.zeros(tokens.shape)
        return duplicate_share(Rollouts(tokens=tokens, mask=mask, anchors=torch.ones(1, 1).long(), logprobs=zeros))

    assert share(mask) == 0.25
    assert share(stopped) == 0.25  # the third goes on where the first stopped; the last does not
    assert share(torch.zeros_like(mask)) == 0


def test_reading_past_the_model_is_refused():
    policy = Policy(tiny_decoder(max_position_embeddings=26))
    with pytest.raises(ValueError, match=r"reach position 28.*built for 26"):
        make(anchors=CompletionAnchor(), rollout_len=4)(policy, prompt_only(tiny_batch(B=1)), seeded())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"rollout_len": 0}, "rollout_len is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_frequencies_are_the_softmax_at_the_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    uniforms = torch.rand(1, 200_000, generator=seeded())
    tokens, logprobs = Sampler(temperature=0.5)(logits, uniforms)
    expected = (logits / 0.5).softmax(dim=-1)[0]
    frequencies = tokens[0].bincount(minlength=4) / tokens.numel()
    assert (frequencies - expected).abs().max() < 4 * (0.25 / tokens.numel()) ** 0.5  # four standard errors
    torch.testing.assert_close(logprobs[0].exp(), expected[tokens[0]])


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12),
    u=st.floats(0, 1, exclude_max=True, width=32),
    top_p=st.floats(0.05, 1.0),
    top_k=st.integers(0, 12),
)
@example(logits=[0.0, 0.0, 5.960464477539063e-08], u=0.0, top_p=0.25, top_k=0)
@example(logits=[0.0, 0.0, 5.960464477539063e-08], u=0.0, top_p=1.0, top_k=1)
def test_only_kept_tokens_are_drawn(logits, u, top_p, top_k):
    """Never a token of probability zero, whatever the uniform number; never one outside top-k or top-p."""
    logits = torch.tensor([logits])
    (token,), _ = Sampler(temperature=1.0, top_p=top_p, top_k=top_k)(logits, torch.tensor([[u]]))
    probs = logits.softmax(dim=-1)[0]
    more_likely = probs[probs > probs[token]]
    assert probs[token] > 0
    if top_k:
        assert len(more_likely) < top_k
    assert more_likely.sum() < top_p + 1e-5


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    draws = Sampler(temperature=1.0, top_p=0.6)(logits, torch.linspace(0, 0.999, 500)[None])[0]
    assert set(draws[0].tolist()) == {0, 1}
