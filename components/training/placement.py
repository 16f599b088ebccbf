"""Where networks that do not train get their weights: whole on every rank, or sharded where they ask for it."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from components.features import FrozenNetwork
from components.models import materialize
from components.training.distributed import device_mesh


def place(module: nn.Module, device: torch.device, *, data_parallel_replicate: int = 1) -> None:
    """Give ``module`` its deferred weights on ``device``, in place; on the meta device it keeps them deferred.

    Every ``FrozenNetwork`` in it whose ``shard`` is true is first spread over the ranks that share one copy of the policy
    (``data_parallel_replicate`` of them, see ``components.training.shard``), each of which reads only its part. Collective.
    """
    if device.type == "meta":
        return
    if dist.get_world_size() > 1:
        mesh = None
        for network in [part for part in module.modules() if isinstance(part, FrozenNetwork) and part.shard]:
            mesh = mesh or device_mesh(device, data_parallel_replicate)
            for part in (*network.decoder.layers, network):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
    materialize(module, device)
    module.to(device)
