"""Anchors, the packed order, and every attention path against the rule of visibility."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask, flex_attention

from components.blocks import (
    CompletionAnchor,
    PackedAttention,
    PackedLayout,
    StridedAnchors,
    flex_mask,
    target_windows,
    tiles,
)
from components.types import Batch
from tests.tiny import tiny_batch


def layout_of(batch, n=3, G=4, stride=3, context_len=2):
    anchors = StridedAnchors(stride=stride, context_len=context_len)(batch, G)
    return PackedLayout(doc_ids=batch.doc_ids, anchors=anchors.positions, num_samples=n, block_len=G)


# ---------------------------------------------------------------------------------------------------- anchors


@given(L=st.integers(3, 60), G=st.integers(1, 9), stride=st.integers(1, 9), context_len=st.integers(1, 9))
def test_anchors_stand_where_the_paper_puts_them(L, G, stride, context_len):
    """Every position context_len, + stride, ... whose window still fits, and no other."""
    batch = tiny_batch(B=1, L=L, documents=((L,),))
    anchors = StridedAnchors(stride=stride, context_len=context_len)
    expected = [a for a in range(context_len, L - G + 1) if (a - context_len) % stride == 0]
    if not expected:
        with pytest.raises(ValueError, match="no room for a block"):
            anchors(batch, G)
        return
    got = anchors(batch, G)
    assert got.positions.tolist() == [expected]
    assert got.mask.all()


def test_a_block_counts_if_prefix_and_window_lie_in_one_document():
    """Documents of 10, 8 and 6 tokens, context 2, G 4, every position an anchor; by hand: a document that begins at s and
    ends at e has anchors s + 2 ... e - 4."""
    batch = tiny_batch(B=1, documents=((10, 8, 6),))
    got = StridedAnchors(stride=1, context_len=2, document_mask=True)(batch, 4)
    counted = got.positions[0][got.mask[0]].tolist()
    assert counted == [2, 3, 4, 5, 6, 12, 13, 14, 20]
    assert StridedAnchors(stride=1, context_len=2)(batch, 4).mask.all()


def test_a_block_with_padding_in_its_window_does_not_count():
    batch = tiny_batch(B=1, documents=((15,),))
    got = StridedAnchors(stride=3, context_len=2)(batch, 4)
    assert got.positions[0][got.mask[0]].tolist() == [2, 5, 8, 11]


def test_target_regions_keep_questions_out_of_the_windows():
    batch = tiny_batch(B=1, documents=((24,),))
    target = batch.target_mask.clone()
    target[:, :9] = False  # the question
    got = StridedAnchors(stride=3, context_len=2, region="target")(
        Batch(tokens=batch.tokens, doc_ids=batch.doc_ids, target_mask=target), 4
    )
    assert got.positions[0][got.mask[0]].tolist() == [11, 14, 17, 20]


def test_few_anchors_are_those_that_count_evenly_spread():
    """Windows inside the targets: eleven anchors of the first row, one of the second, which fills up with others."""
    batch = tiny_batch(documents=((24,), (24,)))
    target = batch.target_mask.clone()
    target[0, :10], target[0, 24:] = False, False
    target[1, :19], target[1, 23:] = False, False
    batch = Batch(tokens=batch.tokens, doc_ids=batch.doc_ids, target_mask=target)
    options = {"stride": 1, "context_len": 2, "region": "target"}
    every = StridedAnchors(**options)(batch, 4)
    assert [row[mask].tolist() for row, mask in zip(every.positions, every.mask, strict=True)] == [
        [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20],
        [19],
    ]
    few = StridedAnchors(**options, max_anchors=3)(batch, 4)
    assert few.positions.tolist() == [[10, 13, 17], [2, 3, 19]]
    assert few.mask.tolist() == [[True, True, True], [False, False, True]]
    with pytest.raises(ValueError, match="max_anchors is 0"):
        StridedAnchors(**options, max_anchors=0)
    many = StridedAnchors(**options, max_anchors=100)(batch, 4)
    assert torch.equal(many.positions, every.positions)
    assert torch.equal(many.mask, every.mask)


def test_a_completion_starts_at_the_first_target_or_at_the_end():
    batch = tiny_batch(documents=((24,), (9,)))
    target = batch.target_mask.clone()
    target[0, :20] = False
    target[1] = False
    got = CompletionAnchor()(Batch(tokens=batch.tokens, doc_ids=batch.doc_ids, target_mask=target), 4)
    assert got.positions.tolist() == [[20], [9]]
    assert got.mask.all()


def test_an_empty_prompt_does_not_count():
    got = CompletionAnchor()(tiny_batch(B=1), 4)
    assert got.positions.tolist() == [[1]]
    assert not got.mask.any()


# ----------------------------------------------------------------------------------------------------- layout


def test_every_packed_token_maps_back_to_its_block():
    layout = layout_of(tiny_batch())
    B, K = layout.anchors.shape
    blocks = torch.arange(B * 3 * K * 4).view(B, 3, K, 4) + 1000
    packed = layout.pack(torch.zeros(B, 24, dtype=torch.long), blocks)
    assert torch.equal(layout.unpack(packed), blocks)
    for k in range(K):
        for j in range(3):
            for g in range(4):
                assert packed[1, 24 + (k * 3 + j) * 4 + g] == blocks[1, j, k, g]  # the order the docstring states


def test_a_block_token_stands_where_the_true_continuation_does():
    layout = layout_of(tiny_batch())
    index, inside = target_windows(layout.anchors, 4, 24)
    assert torch.equal(layout.unpack(layout.positions()), index[:, None].expand(-1, 3, -1, -1))
    assert inside.all()
    late = torch.tensor([[22]])
    index, inside = target_windows(late, 4, 24)
    assert inside.tolist() == [[[True, True, False, False]]]
    assert index.tolist() == [[[22, 23, 23, 23]]]


def test_visibility_by_hand():
    """Two prompt documents of 3 and 2 tokens; one block of two tokens at anchor 2, one at anchor 4."""
    layout = PackedLayout(
        doc_ids=torch.tensor([[0, 0, 0, 1, 1]]), anchors=torch.tensor([[2, 4]]), num_samples=1, block_len=2
    )
    expected = [
        "1........",
        "11.......",
        "111......",
        "...1.....",
        "...11....",
        "11...1...",
        "11...11..",
        "...1...1.",
        "...1...11",
    ]
    rows = ["".join(".1"[seen] for seen in row) for row in layout.visibility()[0].int().tolist()]
    assert rows == expected


# -------------------------------------------------------------------------------------------------- attention


def dense(q, k, v, visible):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])


def qkv(layout, seed=0, dtype=torch.float32, heads=2, head_dim=8):
    generator = torch.Generator().manual_seed(seed)
    B, S = layout.positions().shape
    shape = (3, B, heads, S, head_dim)
    return [x.clone().requires_grad_() for x in torch.randn(shape, generator=generator, dtype=dtype)]


@given(
    n=st.integers(1, 3),
    G=st.integers(0, 4),
    stride=st.integers(1, 8),
    context_len=st.integers(1, 6),
    tile=st.sampled_from([1, 7, 256]),
    seed=st.integers(0, 100),
)
@settings(max_examples=40)
def test_split_attention_is_dense_attention(n, G, stride, context_len, tile, seed):
    """Output and gradients, for any shape and any tile width (float32: sums in another order)."""
    batch = tiny_batch()
    anchors = StridedAnchors(stride=stride, context_len=context_len)(batch, max(G, 1)).positions
    layout = PackedLayout(doc_ids=batch.doc_ids, anchors=anchors, num_samples=n, block_len=G)
    q, k, v = qkv(layout, seed)
    before, tiles._TILE_QUERIES = tiles._TILE_QUERIES, tile
    try:
        out = PackedAttention(layout)(0, q, k, v)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1))
        grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    finally:
        tiles._TILE_QUERIES = before
    expected = dense(q, k, v, layout.visibility())
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    for got, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_fused_prefix_kernel_is_the_written_out_one(kv_heads):
    """What other devices run against what CPUs run: outputs and log-sum-exps, keys shared by several query heads."""
    layout = layout_of(tiny_batch())
    ((_, stop, keys, bias),) = tiles.prefix_tiles(layout, per_anchor=layout.num_samples, dtype=torch.float32)
    q, k, v = torch.randn(3, 2, 4, max(stop, keys), 8, generator=torch.Generator().manual_seed(3))
    arguments = q[:, :, :stop], k[:, :kv_heads, :keys], v[:, :kv_heads, :keys], bias
    for fused, written_out in zip(tiles._fused(*arguments), tiles._written_out(*arguments), strict=True):
        torch.testing.assert_close(fused, written_out, atol=2e-6, rtol=1e-5)


def test_split_attention_gradients_by_finite_differences():
    """Independent of any other attention: float64 gradcheck through the fused kernel and its joined log-sum-exps."""
    batch = tiny_batch(B=1, L=7, documents=((4, 3),))
    layout = layout_of(batch, n=2, G=2, stride=2, context_len=2)
    attend = PackedAttention(layout)
    inputs = qkv(layout, dtype=torch.float64, heads=1, head_dim=3)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(0, q, k, v), inputs)


def test_split_attention_in_bf16_is_close_to_float32():
    layout = layout_of(tiny_batch())
    q, k, v = qkv(layout)
    half = PackedAttention(layout)(0, *(x.bfloat16() for x in (q, k, v)))
    assert half.dtype == torch.bfloat16
    assert (half.float() - PackedAttention(layout)(0, q, k, v)).abs().max() < 0.05


def test_the_flex_mask_is_the_rule_element_by_element():
    """What a CUDA device would run: its BlockMask on a CPU, dense, against the rule."""
    layout = layout_of(tiny_batch())
    S = layout.positions().shape[1]
    mask = create_mask(flex_mask(layout).mask_mod, 2, None, S, S, device="cpu")
    assert torch.equal(mask[:, 0], layout.visibility())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_with_that_mask_is_split_attention():
    layout = layout_of(tiny_batch())
    q, k, v = qkv(layout, heads=2, head_dim=16)
    q, k, v = q.detach(), k.detach(), v.detach()  # on a CPU flex_attention has no backward
    out = flex_attention(q, k, v, block_mask=flex_mask(layout))
    torch.testing.assert_close(out, PackedAttention(layout)(0, q, k, v), atol=2e-6, rtol=1e-5)


def test_nothing_of_the_packed_length_squared_is_formed(monkeypatch):
    """The quadratic rule is for tests: neither scoring nor drawing calls it."""
    from components.models import Policy
    from components.rollouts import BlockParallelGenerator
    from tests.tiny import tiny_decoder

    def forbidden(self):
        raise AssertionError("visibility() was called")

    monkeypatch.setattr(PackedLayout, "visibility", forbidden)
    policy, batch = Policy(tiny_decoder()), tiny_batch()
    generator = BlockParallelGenerator(
        anchors=StridedAnchors(stride=3, context_len=2), rollout_len=4, num_samples=2, temperature=1.0
    )
    rollouts = generator(policy, batch, torch.Generator())
    policy(batch, rollouts, temperature=1.0).rollout.sum().backward()
