"""Weights read tensor by tensor, at once or later, against all of them read at once."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchao.dtypes.nf4tensor import NF4Tensor

from components.features import FrozenNetwork
from components.models import deferred_weights, from_hf, load_decoder, materialize, read_config, read_weights, to_hf
from tests.checkpoints import write_model
from tests.tiny import tiny_batch, tiny_rollouts

FAMILIES = ("llama", "qwen2", "mistral")


class AllocatedBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at once, mapped files apart."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage.data_ptr() for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            if storage.data_ptr() not in given:
                self.alive[storage.data_ptr()] = storage.nbytes(), StorageWeakRef(storage)
        self.alive = {at: entry for at, entry in self.alive.items() if not entry[1].expired()}
        self.peak = max(self.peak, sum(size for size, _ in self.alive.values()))
        return result


def storages(tree):
    """Memory of the tensors in ``tree``; of a sharded one, this rank's. What a 4-bit one consists of was seen before."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
    plain = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors if not isinstance(t, NF4Tensor)]
    return [tensor.untyped_storage() for tensor in plain]


def deferred(directory, dtype="fp32"):
    with deferred_weights():
        return load_decoder(directory, dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_read_one_by_one_are_those_read_at_once(tmp_path, family, dtype):
    write_model(tmp_path, family=family)
    at_once = from_hf(read_weights(tmp_path), read_config(tmp_path))
    decoder = deferred(tmp_path, dtype)
    assert all(parameter.is_meta for parameter in decoder.parameters())
    materialize(decoder, "cpu")
    for one_by_one in (decoder.state_dict(), load_decoder(tmp_path, dtype).state_dict()):
        assert one_by_one.keys() == at_once.keys()
        assert all(torch.equal(value, at_once[name].to(value.dtype)) for name, value in one_by_one.items())
    tokens = torch.arange(40)[None]
    assert torch.equal(decoder(tokens), load_decoder(tmp_path, dtype)(tokens))  # rope too


def test_a_meta_default_device_defers_too(tmp_path):
    write_model(tmp_path)
    with torch.device("meta"):
        decoder = load_decoder(tmp_path)
    assert all(parameter.is_meta for parameter in decoder.parameters())
    materialize(decoder, "cpu")
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in decoder.parameters())


def test_a_parameter_stays_the_object_it_was(tmp_path):
    """Optimizers and FSDP keep parameters, not their names."""
    write_model(tmp_path)
    decoder = deferred(tmp_path)
    before = list(decoder.parameters())
    materialize(decoder, "cpu")
    assert all(old is new for old, new in zip(before, decoder.parameters(), strict=True))


def test_no_more_is_allocated_than_the_weights_and_one_of_them(tmp_path):
    write_model(tmp_path, num_hidden_layers=12)
    decoder = deferred(tmp_path)
    sizes = [4 * parameter.numel() for parameter in decoder.parameters()]
    rope = 3 * 4 * 256 * 8  # cos and sin of 256 positions, and what they are stacked from
    with AllocatedBytes() as allocated:
        materialize(decoder, "cpu")
    assert sum(sizes) <= allocated.peak <= sum(sizes) + max(sizes) + rope < 1.5 * sum(sizes)


def test_a_network_that_is_cut_reads_only_what_is_left(tmp_path):
    """The last layers and the norm are damaged after the headers were read: whoever reads them fails."""
    write_model(tmp_path, tie_word_embeddings=False)
    whole = load_decoder(tmp_path)
    network = FrozenNetwork(deferred(tmp_path))
    network.keep_layers(2)
    left = {name: value for name, value in load_file(tmp_path / "model.safetensors").items() if "s.3." not in name}
    for name in ("model.norm.weight", "lm_head.weight"):
        del left[name]
    save_file(left, tmp_path / "model.safetensors")
    batch = tiny_batch()
    rollouts = tiny_rollouts(batch)
    expected = FrozenNetwork(whole)(batch, rollouts, (1, 2))[1]
    materialize(network, "cpu")
    got = network(batch, rollouts, (1, 2))[1]
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_network_that_nobody_filled_fills_itself(tmp_path):
    write_model(tmp_path)
    batch = tiny_batch()
    rollouts = tiny_rollouts(batch)
    expected = FrozenNetwork(load_decoder(tmp_path))(batch, rollouts, (4,))[1]
    assert torch.equal(FrozenNetwork(deferred(tmp_path))(batch, rollouts, (4,))[1][0], expected[0])


def test_what_is_real_is_left_alone_and_what_has_no_source_is_named(tmp_path):
    write_model(tmp_path)
    with deferred_weights():
        own = nn.Linear(2, 2)
        both = nn.ModuleDict({"own": own, "decoder": load_decoder(tmp_path)})
    weight = own.weight.detach().clone()
    materialize(both, "cpu")
    both["decoder"].norm.scale.data.fill_(7)
    materialize(both, "cpu")
    assert torch.equal(own.weight, weight)
    assert (both["decoder"].norm.scale == 7).all()
    both["other"] = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match="other.weight is on the meta device"):
        materialize(both, "cpu")


def test_deferred_checkpoints_are_checked_when_they_are_named(tmp_path):
    config = write_model(tmp_path)
    weights = from_hf(load_file(tmp_path / "model.safetensors"), config)
    weights["layers.1.mlp.w1.weight"] = torch.zeros(3, 3)
    save_file(to_hf(weights, config), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="of another shape: .'layers.1.mlp.w1.weight'"):
        deferred(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read .*; download"):
        deferred(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ValueError, match=r"index.json is no index of weights"):
        deferred(tmp_path)
