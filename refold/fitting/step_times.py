"""Milliseconds of one decoded token of a whole blueprint, by the table of a device."""

from refold.blueprint.schema import Blueprint, depth_factors, depth_linears, linear_pools
from refold.fitting.device_table import DeviceTable

MLP_KIND = "mlp"


def blueprint_milliseconds(blueprint: Blueprint, table: DeviceTable, context: int) -> float:
    """Returns the milliseconds of one decoded token through a blueprint: all depths, the head, and the step.

    Args:
        blueprint: The blueprint.
        table: The table of the device.
        context: Tokens that are attended to.

    Raises:
        RefoldError: The table has no times of a scheme or of a kind of part.
    """
    arch, total = blueprint.arch, table.step_ms()
    for index, depth in enumerate(blueprint.depths):
        factors, pools = depth_factors(blueprint, index), linear_pools(blueprint, index)
        for name, (rows, columns) in depth_linears(blueprint, index).items():
            part = blueprint.pool(pools[name])[getattr(depth, pools[name])]
            scheme, rank = part.quantised.get(name, depth.quantised.get(name)), factors.get(name)
            total += table.linear_ms(rows, columns, scheme, rank)
            if name in depth.ranks:
                total += table.linear_ms(rows, columns, None, depth.ranks[name])
        if depth.mixer is not None:
            own = blueprint.part_arch("mixer", depth.mixer)
            size = own.num_attention_heads * own.head_dim
            mixer = blueprint.mixers[depth.mixer].mixer
            # A recurrent mixer has a state, and softmax over its own window at most.
            own_window = getattr(mixer, "window", 0)
            reached = own_window if mixer.is_recurrent else min(context, depth.window or context)
            total += table.part_ms(mixer.type, arch.hidden_size, size, reached)
        if depth.mlp is not None:
            total += table.part_ms(MLP_KIND, arch.hidden_size, 0, context)
    head = blueprint.quantised.get("embedding" if arch.tied_head else "head")
    return total + table.linear_ms(arch.vocab_size, arch.hidden_size, head)
