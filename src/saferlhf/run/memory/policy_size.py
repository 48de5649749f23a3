"""Whether a policy can be sampled from on a device at all, whatever else is done about memory."""

from __future__ import annotations

from saferlhf.config.online_schema import PpoConfig
from saferlhf.config.schema import TrainConfig
from saferlhf.errors import UserError
from saferlhf.run.memory.plan import GIB
from saferlhf.run.memory.roles import role_shapes


def check_policy_fits(config: TrainConfig, gib: float, *, vocabulary_size: int | None = None) -> None:
    """Refuse online training whose policy cannot be whole on a device in any 16-bit format.

    Responses are sampled from whole weights on every device: through sharded ones each token would move all of them. So
    neither more devices nor smaller batches help.

    Raises:
        UserError: with the numbers.
    """
    if not isinstance(config.task, PpoConfig) or config.quantization.name != "none":
        return
    shapes = role_shapes(config, vocabulary_size)
    weights = shapes[0].weights
    count = weights.trained_count + weights.frozen_count
    if 2 * count <= gib * GIB:
        return
    over = f", replicated on {config.trainer.devices} devices" if config.trainer.devices > 1 else ""
    raise UserError(
        f"{count / 1e9:.1f}e9 weights of the policy take {2 * count / GIB:.0f} GiB in bfloat16{over}, and sampling "
        f"needs them whole on each device of {gib:g} GiB",
        f"backbone={config.backbone.name} quantization=none",
        "quantization=nf4 adapter=lora roles=shared: the base in 4 bits, replicated",
    )
