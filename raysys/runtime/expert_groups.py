"""Experts shared out over workers under DeepSpeed: which parameters are cut, over which group, and how they become whole.

Notable choices
- A module takes part by a method `shard(rank, size, group) -> [parameters]`, which cuts these parameters to this process's
  equal share along their first dimension and computes with the group from then on. Nothing else is known of it.
- Groups are DeepSpeed's: workers 0..P-1 hold all experts between them, the next P again, and so on; the workers with the
  same share average its gradients. DeepSpeed divides these by all workers, so the step is the one of a single process.
- Checkpoints hold experts whole, so they fit any number of workers to share them and any engine.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist

from raysys.runtime.sentences import UserError


class ExpertGroups:
    """The shares of a module's experts, made by cutting them in this process.

    Args:
        module: whole, alike in all workers; cut when this returns.
        size: P, workers that hold all experts between them.

    Raises:
        UserError: the module has no experts, or they cannot be shared out evenly.
    """

    def __init__(self, module: nn.Module, size: int) -> None:
        from deepspeed.utils import groups

        self.size, self.name = size, f"ep_size_{size}"
        groups._create_expert_and_data_parallel(size)
        self.group = groups._get_expert_parallel_group(self.name)
        self.rank = dist.get_rank(self.group)
        cut = set[int]()
        for part in module.modules():
            shard = getattr(part, "shard", None)
            if callable(shard):
                try:
                    parameters = shard(self.rank, size, self.group)
                except ValueError as error:
                    raise UserError(f"train.expert_parallel: got {size}; {error}") from error
                for parameter in parameters:
                    parameter.allreduce, parameter.group_name = False, self.name  # DeepSpeed's marks
                    cut.add(id(parameter))
        self.names = {name for name, p in module.named_parameters() if id(p) in cut}
        """Of the parameters that were cut."""
        if not self.names:
            raise UserError(
                f"train.expert_parallel: got {size}, but the system has no experts to share out; expected 1"
            )

    def split(self, optimizer: torch.optim.Optimizer) -> None:
        """Give experts parameter groups of their own, with the settings of the group they were in."""
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        named = [{**group, "name": f"group {i}"} for i, group in enumerate(optimizer.param_groups)]
        made = split_params_into_different_moe_groups_for_optimizer(named)
        optimizer.param_groups[:] = [group for group in made if group["params"]]

    def whole(self, name: str, value: Tensor, parameter: Tensor) -> Tensor:
        """All experts (E, ...) from what each process holds for a parameter; as it is if it belongs to no share."""
        if name not in self.names or value.shape != parameter.shape:
            return value
        value = value.to(parameter.device).contiguous()
        shares = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(shares, value, group=self.group)
        return torch.cat(shares)

    def own(
        self, state: Mapping[str, Mapping[str, Tensor]], parameters: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """Whole optimizer states by name and key, cut to the shares of this process."""

        def share(name: str, value: Tensor) -> Tensor:
            p = parameters.get(name)
            if name not in self.names or p is None or value.shape != (len(p) * self.size, *p.shape[1:]):
                return value
            return value.chunk(self.size)[self.rank].clone()

        return {name: {key: share(name, value) for key, value in content.items()} for name, content in state.items()}

    def marker(self) -> nn.Module:
        """An empty module by which DeepSpeed notices that there are experts."""
        from deepspeed.moe.layer import MoE

        class Marker(MoE):  # type: ignore[misc]
            """DeepSpeed looks for this type, for its number of experts (to log), and calls it once."""

            def __init__(self) -> None:
                nn.Module.__init__(self)
                self.num_experts = 0

            def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
                """The groups are there already."""

        return Marker()
