"""Where networks that do not train get their weights: whole on every rank, or sharded where they ask for it."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from components.features import FrozenNetwork
from components.models import materialize


def place(module: nn.Module, device: torch.device) -> None:
    """Give ``module`` its deferred weights on ``device``, in place; on the meta device it keeps them deferred.

    Every ``FrozenNetwork`` in it whose ``shard`` is true is first spread over all ranks, each of which then reads only its
    part. Collective.
    """
    if device.type == "meta":
        return
    if dist.get_world_size() > 1:
        mesh = None
        for network in [part for part in module.modules() if isinstance(part, FrozenNetwork) and part.shard]:
            mesh = mesh or init_device_mesh(device.type, (dist.get_world_size(),))
            for part in (*network.decoder.layers, network):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
    materialize(module, device)
    module.to(device)
