"""Agreement with the authors' code, number by number (float32, atol 1e-5), on the tensors ``extract.py`` copied.

The reference repeats the prompt for each sample and stands step-major: position ``L + step * K + block`` of row ``b * n + j``.
Its document masking is off in all of these, which here is said by one document id per row.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.advantages import RLOO
from components.blocks import PackedLayout, StridedAnchors
from components.features import FrozenNetwork, HiddenStateFeatures
from components.losses import PolicyGradientLoss
from components.models import Policy, from_hf, load_decoder, read_config
from components.rewards import FeatureMatchingReward
from components.rollouts import BlockParallelGenerator
from components.types import Batch, Features, Logprobs, Rewards, Rollouts

DATA = Path(__file__).parent / "data"
ATOL = 1e-5
RUNS = ("e2e_A", "e2e_B")


def cases(name, key=None):
    entries = json.loads((DATA / f"{name}.json").read_text())
    return entries[key] if key else entries


def one_document(tokens):
    return Batch(
        tokens=tokens,
        doc_ids=torch.zeros_like(tokens),
        target_mask=torch.ones_like(tokens, dtype=torch.bool),
    )


def no_rollouts(B, n, K, G=1):
    zeros = torch.zeros(B, n, K, G)
    return Rollouts(
        tokens=torch.arange(B * n * K * G).view(B, n, K, G),
        mask=torch.ones_like(zeros, dtype=torch.bool),
        anchors=torch.ones(B, K, dtype=torch.long),
        logprobs=zeros,
    )


# ---------------------------------------------------------------------------------------------------- rewards


@pytest.fixture(scope="module")
def reward_tensors():
    return load_file(DATA / "rewards.safetensors")


@pytest.mark.parametrize("case", cases("rewards"), ids=lambda case: case["name"])
def test_rewards_baselines_and_advantages(case, reward_tensors):
    golden = {key.split(".")[1]: value for key, value in reward_tensors.items() if key.startswith(case["name"] + ".")}
    gen, gt = golden["gen"], golden["gt"]
    features = Features(rollout=gen, target=gt, mask=torch.ones(gt.shape[:2], dtype=torch.bool))
    reward = FeatureMatchingReward(
        alignment_coef=case["alignment_coef"],
        diversity_coef=case["diversity_coef"],
        whitening="sample_space" if case["whitening"] else "none",
    )
    rewards = reward(None, no_rollouts(*gen.shape[:3]), features)

    sound = torch.ones_like(golden["alignment"], dtype=torch.bool)  # [B, n, K]
    if case["whitening"]:
        # The sign of a sum of a row of (XX^T)^(-1/2) is all that whitening does to the target; near 0 it is noise.
        row_sums = golden["row_operator_sum"]  # [B, K, 1, layers, n]
        sound = (row_sums.abs() >= 1e-3).all(dim=3)[:, :, 0].transpose(1, 2)
    everywhere = sound.all(dim=1, keepdim=True).expand_as(sound)  # a baseline reads all samples of its block

    def close(ours, theirs, where):
        torch.testing.assert_close(ours[where], theirs[where], atol=ATOL, rtol=0)

    a, d = case["alignment_coef"], case["diversity_coef"]
    close(rewards.pointwise, a * golden["alignment"], sound)
    close(rewards.pairwise, -d * golden["diversity"], torch.ones_like(sound))
    close(rewards.total, golden["reward"], sound)
    advantages = RLOO()(rewards)
    close(rewards.total - advantages, golden["baseline"], everywhere)
    close(advantages, golden["advantage"], everywhere)


def test_ill_conditioned_entries_are_few(reward_tensors):
    """What the test above leaves out is bounded: 'skip' must not come to mean 'everything'."""
    sums = [value.abs() for key, value in reward_tensors.items() if key.endswith("row_operator_sum")]
    skipped = sum((s < 1e-3).sum().item() for s in sums) / sum(s.numel() for s in sums)
    assert skipped < 0.25


# ------------------------------------------------------------------------------------------------- visibility


@pytest.mark.parametrize("case", cases("masks"), ids=lambda case: case["name"])
def test_every_packed_token_sees_what_the_reference_sees(case):
    tensors = load_file(DATA / "masks.safetensors")
    allowed = tensors[f"{case['name']}.allowed"].bool()
    B, L, K, G = len(allowed), case["prompt_length"], case["num_blocks"], case["generation_step"]
    tokens = torch.zeros(B, L, dtype=torch.long)
    anchors = StridedAnchors(stride=case["stride"], context_len=case["context_length"])
    positions = anchors(one_document(tokens), case["gen_len"]).positions
    assert positions.shape == (B, K)
    layout = PackedLayout(doc_ids=tokens, anchors=positions, num_samples=1, block_len=G)

    order = layout.pack(
        torch.arange(L).expand(B, L), step_major_index(B, 1, K, G, L)
    )  # [B, S] their index of our token
    theirs = allowed.gather(1, order[:, :, None].expand(-1, -1, allowed.shape[2]))
    theirs = theirs.gather(2, order[:, None, :].expand(-1, theirs.shape[1], -1))
    assert torch.equal(layout.visibility(), theirs)
    assert torch.equal(layout.positions(), tensors[f"{case['name']}.position_ids"].gather(1, order))


def step_major_index(B, n, K, G, L):
    """``[B, n, K, G]``: where the reference keeps token ``g`` of block ``k``."""
    return (L + torch.arange(G)[None, :] * K + torch.arange(K)[:, None]).expand(B, n, K, G)


# ------------------------------------------------------------------------------------------------- end to end


class Run:
    """One reference run: its settings, tensors, and our objects for the same model and data."""

    def __init__(self, name):
        self.settings = cases(name)
        for key in ("B", "n", "L", "G", "stride", "context"):
            setattr(self, key, self.settings[key])
        self.K = self.settings["num_blocks"]
        self.rollout = load_file(DATA / f"{name}_rollout.safetensors")
        self.features = load_file(DATA / f"{name}_features.safetensors")
        self.policy = load_file(DATA / f"{name}_policy.safetensors")
        self.batch = one_document(self.rollout["tokens"])
        self.anchors = StridedAnchors(stride=self.stride, context_len=self.context)
        tokens = self.blocks(self.rollout["fixed.full_sequences"])
        self.rollouts = Rollouts(
            tokens=tokens,
            mask=torch.ones_like(tokens, dtype=torch.bool),
            anchors=self.anchors(self.batch, self.G).positions,
            logprobs=torch.zeros(tokens.shape),
        )

    def blocks(self, full):
        """Per-position values ``[B * n, S, ...]`` of the reference as blocks ``[B, n, K, G, ...]``."""
        n = full.shape[0] // self.B
        steps = full[:, self.L :].unflatten(1, (self.G, self.K)).transpose(1, 2)
        return steps.unflatten(0, (self.B, n))

    def row(self, b, logprobs, advantages, learned):
        """What the loss takes, for one sequence; ``learned`` ``[B * n, S]`` are the tokens that count (None: all)."""
        here = slice(b, b + 1)
        if learned is None:
            learned = torch.ones_like(self.rollout["fixed.full_sequences"], dtype=torch.bool)
        batch, rollouts = self.batch, self.rollouts
        return (
            Logprobs(rollout=logprobs.rollout[here], target=logprobs.target[here]),
            advantages[here],
            Batch(
                tokens=batch.tokens[here],
                doc_ids=batch.doc_ids[here],
                target_mask=learned[b * self.n : b * self.n + 1, : self.L],
            ),
            Rollouts(
                tokens=rollouts.tokens[here],
                mask=self.blocks(learned)[here],
                anchors=rollouts.anchors[here],
                logprobs=rollouts.logprobs[here],
            ),
        )


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    return Run(request.param)


@pytest.fixture
def decoder():
    return load_decoder(DATA / "tiny_llama")


def test_greedy_rollouts(run, decoder):
    generator = BlockParallelGenerator(anchors=run.anchors, rollout_len=run.G, num_samples=1, temperature=0)
    rollouts = generator(Policy(decoder), run.batch, torch.Generator())
    assert torch.equal(rollouts.tokens, run.blocks(run.rollout["greedy.docmask0.full_sequences"]))
    chosen = run.rollout["greedy.docmask0.block_logits"].log_softmax(dim=-1).amax(dim=-1)  # [B, G, K]
    torch.testing.assert_close(rollouts.logprobs[:, 0], chosen.transpose(1, 2), atol=ATOL, rtol=0)


@pytest.mark.parametrize("combine", ["concat", "stack"])
def test_normalised_hidden_states(run, decoder, combine):
    extractor = HiddenStateFeatures(network=FrozenNetwork(decoder), combine=combine, pooling="concat")
    features = extractor(run.batch, run.rollouts)
    hidden = run.features[f"hidden.{combine}.docmask0"]  # [B*n, S, layers, D]
    blocks = run.blocks(hidden)  # [B, n, K, G, layers, D]
    window = run.rollouts.anchors[0][:, None] + torch.arange(run.G)
    target = hidden.unflatten(0, (run.B, run.n))[:, 0][:, window]  # [B, K, G, layers, D]
    for ours, theirs in ((features.rollout, blocks), (features.target, target)):
        theirs = theirs.transpose(-3, -2).flatten(-2)  # our concat pooling: [..., layers, G * D]
        ours = ours if combine == "stack" else ours[..., None, :]
        torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)


@pytest.mark.parametrize("index", range(len(cases("e2e_A", "features"))))
def test_rewards_and_advantages_from_hidden_states(run, decoder, index):
    case = run.settings["features"][index]
    layers = [2, 3] if case["hidden_state_method"] == "middle" else [0.25, 0.5, 0.75]
    combine = {"middle": "mean", "stack": "stack", "concat": "concat"}[case["hidden_state_method"]]
    pooling = {"last_token": "last_token", "mean_pooling": "mean", "concat": "concat"}[case["embed_method"]]
    extractor = HiddenStateFeatures(network=FrozenNetwork(decoder), layers=layers, combine=combine, pooling=pooling)
    reward = FeatureMatchingReward(whitening="sample_space" if case["use_whitening"] else "none")
    rewards = reward(run.batch, run.rollouts, extractor(run.batch, run.rollouts))
    golden = {tensor: run.features[f"{case['name']}.{tensor}"] for tensor in ("alignment", "diversity", "advantage")}
    torch.testing.assert_close(rewards.pointwise, golden["alignment"], atol=ATOL, rtol=0)
    torch.testing.assert_close(rewards.pairwise, -golden["diversity"], atol=ATOL, rtol=0)
    torch.testing.assert_close(RLOO()(rewards), golden["advantage"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["p00", "p01", "p02", "p06"])
def test_logprobs_losses_and_gradients(run, decoder, name):
    case = next(case for case in run.settings["policy"] if case["name"] == name)
    golden = {key[4:]: value for key, value in run.policy.items() if key.startswith(name)}

    def shifted(values):
        """The reference's ``[B*n, S-1]`` at a token's predecessor, as ``[B*n, S]`` at the token."""
        return torch.nn.functional.pad(values, (1, 0))

    policy = Policy(decoder)
    logprobs = policy(run.batch, run.rollouts, temperature=case["temperature"], with_target=True)
    theirs = run.blocks(shifted(golden["log_probs"]))
    torch.testing.assert_close(logprobs.rollout, theirs, atol=ATOL, rtol=0)
    prompt = golden["log_probs"][:: run.n, : run.L - 1]
    torch.testing.assert_close(logprobs.target, prompt, atol=ATOL, rtol=0)

    advantages = run.blocks(shifted(golden["advantages"]))
    assert torch.equal(advantages, advantages[..., :1].expand_as(advantages))  # one advantage per block
    questions = run.rollout["fixed.qa_masks_full"].bool() if case["qa_masking"] else None
    for mode, coefs in case["modes"].items():
        loss = PolicyGradientLoss(rl_coef=coefs["rl_coef"], ce_coef=coefs["ce_coef"])
        # The reference takes the mean of each sequence's mean, ours is over all tokens: so sequence by sequence.
        rows = [loss(*run.row(b, logprobs, advantages[..., 0], questions)).loss for b in range(run.B)]
        mean = torch.stack(rows).mean()
        torch.testing.assert_close(mean, golden[f"{mode}.loss"], atol=ATOL, rtol=0)
        policy.zero_grad()
        mean.backward(retain_graph=True)
        check_gradients(run, decoder, golden, mode)


def check_gradients(run, decoder, golden, mode):
    ours = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    config = read_config(DATA / "tiny_llama")
    padded_rows = run.settings["L"] == 36  # set B: their embedding has a padding_idx, ours trains every row
    for name, index in ((name, i) for i, name in enumerate(run.settings["grad_param_names"])):
        (ours_name,) = from_hf({name: torch.zeros(shape_of(name, decoder, config))}, config)
        norm = ours[ours_name].norm()
        if not (padded_rows and "embed" in name):
            torch.testing.assert_close(norm, golden[f"{mode}.grad_norms"][index], atol=ATOL, rtol=1e-5)
        full = golden.get(f"{mode}.grad.{name}")
        if full is not None:
            expected, got = from_hf({name: full}, config)[ours_name], ours[ours_name]
            if padded_rows and "embed" in name:
                expected, got = expected[1:], got[1:]  # the pad token is 0
            torch.testing.assert_close(got, expected, atol=ATOL, rtol=1e-5)


def shape_of(name, decoder, config):
    """Shape of a Hugging Face weight: only what the name translation needs to run."""
    width = config["hidden_size"]
    kv = config["num_key_value_heads"] * width // config["num_attention_heads"]
    return {"q_proj": (width, width), "k_proj": (kv, width)}.get(name.split(".")[-2], (1,))


def test_advantage_of_a_block_reaches_every_token_of_it_and_no_other(run):
    """A token-level map of the authors' step-major tiling: ours, packed and read back, is the same."""
    advantages = torch.randn(run.B, run.n, run.K)
    step_major = advantages.repeat(1, 1, run.G)  # [B, n, G * K]
    full = torch.cat((torch.zeros(run.B * run.n, run.L), step_major.flatten(0, 1)), dim=1)
    assert torch.equal(run.blocks(full), advantages[..., None].expand(-1, -1, -1, run.G))
    rewards = Rewards(
        pointwise=advantages,
        pairwise=torch.zeros_like(advantages),
        mask=torch.ones(run.B, run.K, dtype=torch.bool),
    )
    assert torch.equal(rewards.total, advantages)
