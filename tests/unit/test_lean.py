"""Layers with fewer passes over memory against torchtune's own."""

import copy

import pytest
import torch
from torchtune.modules import FeedForward, RotaryPositionalEmbeddings

from components.models import build_decoder, use_lean_layers
from components.models.lean import ComplexRoPE, SwiGLU
from tests.tiny import tiny_batch, tiny_config, tiny_decoder


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_logits_and_gradients_are_torchtunes(family):
    plain = tiny_decoder(family=family)
    lean = copy.deepcopy(plain)
    use_lean_layers(lean)
    tokens = tiny_batch().tokens
    got, expected = lean(tokens), plain(tokens)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    got.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    for (name, mine), theirs in zip(lean.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_swiglu_by_finite_differences():
    linears = {name: torch.nn.Linear(*shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SwiGLU(**linears), (x,))
    assert torch.equal(SwiGLU(**linears)(x), FeedForward(**linears)(x))


SHAPES = {"gate_proj": (3, 5), "up_proj": (3, 5), "down_proj": (5, 3)}


def test_a_rotation_keeps_lengths_and_turns_by_the_position():
    rope = ComplexRoPE(RotaryPositionalEmbeddings(dim=2, max_seq_len=4))
    x = torch.tensor([1.0, 0.0]).expand(1, 4, 1, 2)
    turned = rope(x, input_pos=torch.arange(4)[None])[0, :, 0]
    angles = torch.arange(4.0)  # one radian a position: base ** 0
    torch.testing.assert_close(turned, torch.stack((angles.cos(), angles.sin()), dim=-1))


def test_parameters_keep_their_names_and_identity():
    decoder = build_decoder(tiny_config())
    before = dict(decoder.named_parameters())
    use_lean_layers(decoder)
    after = dict(decoder.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert len({id(layer.attn.pos_embeddings) for layer in decoder.layers}) == 1


def test_a_second_time_changes_nothing():
    decoder = build_decoder(tiny_config())
    use_lean_layers(decoder)
    modules = list(decoder.modules())
    use_lean_layers(decoder)
    assert all(one is other for one, other in zip(modules, decoder.modules(), strict=True))
