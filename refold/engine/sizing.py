"""Sizes of an engine's memory: how many pages fit, chosen from the memory that is free."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from refold.blueprint.part_sizes import head_counts
from refold.blueprint.schema import Blueprint
from refold.engine.pages import PageGroup, PoolSettings, fit_pages, paged_depths, pool_bytes
from refold.engine.pools import Pools
from refold.engine.remote_keeper import RemoteKeeper
from refold.engine.settings import AttentionWorkers, EngineSettings
from refold.engine.worker_process import WorkerProcesses
from refold.errors import RefoldError
from refold.modeling.model import RefoldForCausalLM

SMALLEST = 64 * 2**20
"""Bytes that the pools may always take, if they need them."""
WEIGHTS = 2
"""Default bound on the bytes of the pools, in bytes of the weights."""
FREE_SHARE = 0.5
"""Bound on the bytes of the pools, as a share of the free memory."""


def make_pools(model: RefoldForCausalLM, settings: EngineSettings, max_context: int) -> Pools:
    """Makes the pools of an engine.

    Without `settings.memory` they hold `max_rows` full contexts, or as much of it as fits into twice the bytes of the
    weights and half of the free memory, but one full context at least.

    Args:
        model: The model.
        settings: Of the engine.
        max_context: Maximal number of tokens of a sequence.

    Raises:
        RefoldError: Not even one page for each row fits.
    """
    blueprint = model.config.read_blueprint()
    size = settings.page_size
    row_pages = -(-max_context // size)
    workers = settings.attention_workers
    device = torch.device(settings.kv_device) if settings.kv_device else model.device
    wanted = PoolSettings(
        num_pages=settings.max_rows * row_pages,
        max_rows=settings.max_rows,
        page_size=size,
        dtype=model.dtype,
        device=device,
        # Skipped tokens that wait reach back too.
        max_span=settings.chunk + settings.max_pending,
    )
    if settings.memory is not None:
        allowed = settings.memory
    else:
        weights = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
        one = pool_bytes(blueprint, replace(wanted, num_pages=row_pages))
        bound = min(max(WEIGHTS * weights, SMALLEST), int(FREE_SHARE * free_bytes(device)))
        allowed = max(bound, one)
    fitted = fit_pages(blueprint, wanted, allowed)
    if fitted.num_pages < 1:
        raise RefoldError(
            f"memory: at least {pool_bytes(blueprint, replace(wanted, num_pages=1)):,} bytes are required for one page "
            f"at every depth (got {allowed:,}); raise memory or lower page_size"
        )
    if workers is None:
        return Pools(blueprint, fitted, device=model.device)
    return make_remote_pools(blueprint, fitted, workers)


def make_remote_pools(blueprint: Blueprint, sizes: PoolSettings, workers: AttentionWorkers) -> Pools:
    """Makes pools whose pages are in attention workers, which are started if no addresses are given.

    Args:
        blueprint: The stack.
        sizes: Of all workers' pages together.
        workers: Number or addresses, and how pages are split among them.

    Raises:
        RefoldError: The stack or the sizes cannot be split among so many, or a worker cannot be reached.
    """
    heads, count = head_counts(blueprint), workers.count
    if not paged_depths(blueprint):
        raise RefoldError("attention_workers: a stack with attention is required (all mixers of this one keep states)")
    num_heads = max(heads)
    if workers.split == "heads" and len(heads) > 1:
        raise RefoldError(
            f"attention_workers: the same number of key-value heads at every depth is required to split them (got "
            f"{', '.join(map(str, heads))}); split by rows"
        )
    if workers.split == "heads" and count > num_heads:
        raise RefoldError(
            f"attention_workers: at most one for each of the {num_heads} key-value heads is possible (got {count}); "
            f"take fewer, or split by rows"
        )
    if workers.split == "rows" and count > min(sizes.max_rows, sizes.num_pages):
        raise RefoldError(
            f"attention_workers: at most one for each of the {sizes.max_rows} rows and {sizes.num_pages} pages is "
            f"possible (got {count}); take fewer, or raise max_rows or memory"
        )
    started = WorkerProcesses(workers.processes, workers.threads) if workers.processes else None
    addresses = workers.addresses if started is None else started.addresses

    def make_keeper(groups: Sequence[PageGroup]) -> RemoteKeeper:
        return RemoteKeeper(blueprint, sizes, groups, addresses, workers, started)

    return Pools(blueprint, sizes, make_keeper, count if workers.split == "rows" else 1)


def free_bytes(device: torch.device) -> int:
    """Returns the free memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # Systems without /proc: the smallest machine that models of some size run on.
        return 4 * 2**30


def max_tokens(pools: Pools, max_context: int) -> int:
    """Returns the number of tokens of the longest sequence that the pools can hold alone."""
    if not pools.groups:
        return max_context
    return min(max_context, pools.settings.num_pages // pools.num_shares * pools.settings.page_size)
