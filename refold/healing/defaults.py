"""Chooses context, batch, warm-up and learning rate of a healing stage that leaves them open."""

import math

from refold.recipe.heal import HealStage

ENOUGH_STEPS = 200
"""Optimizer steps below which a stage ends before AdamW's moments and the schedule have settled; the user is told."""
WANTED_STEPS = 1000
"""Optimizer steps that the chosen batch leaves at least, where the smallest batch allows it."""
SMALLEST_BATCH, LARGEST_BATCH = 512, 16_384
LONGEST_CONTEXT = 1024
SHORTEST_WARMUP, LONGEST_WARMUP, WARMUP_STEPS = 0.02, 0.1, 20
BASE_RATE, BASE_HIDDEN_SIZE = 2e-3, 64
"""The best rate of every batch of the grid on stories260K, whose hidden size is 64."""
FAR = 0.5
"""Nats per token above the teacher from which a start counts as far."""
NEAREST = 0.15
"""Share of the far rate that a start with no distance to its teacher gets."""
LOWEST_RATE, HIGHEST_RATE = 2e-5, 4e-3
KNOWN_TEXT = 0.45
"""Share of ln(vocabulary) below which the loss of a pretrained model on text lies."""


def complete_stage(stage: HealStage, positions: int) -> HealStage:
    """Returns a stage whose context, batch and warm-up are set; keys the user set stay as they are.

    The learning rate stays open: it depends on the loss at the stage's first step, see `choose_learning_rate`.

    Args:
        stage: As the recipe has it.
        positions: Tokens of the longest sequence the model reads.
    """
    batch = stage.batch_tokens or choose_batch(stage.tokens)
    context = stage.context
    if context is None:
        context = max(2, min(LONGEST_CONTEXT, positions, stage.tokens))
        if stage.batch_tokens is None:
            context = min(context, batch)
    warmup = stage.warmup
    if warmup is None:
        warmup = choose_warmup(count_steps(stage.tokens, context, batch))
    return stage.model_copy(update={"batch_tokens": batch, "context": context, "warmup": warmup})


def choose_batch(tokens: int) -> int:
    """Returns the tokens of one optimizer step: the largest power of two that leaves `WANTED_STEPS` steps.

    Between 512 and 16,384. At a budget of 20,000 tokens each halving of the batch from 4,096 down to 512 gains 0.06 to
    0.30 bits per byte, at every learning rate (docs/results/heal-defaults.md). How far more steps pay at larger budgets
    has not been measured; 1,000 steps is a usual length of a fine-tuning run.

    Args:
        tokens: Training tokens of the stage.
    """
    wanted = 2 ** math.floor(math.log2(max(1, tokens / WANTED_STEPS)))
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, wanted))


def choose_warmup(num_steps: int) -> float:
    """Returns the share of the steps over which the learning rate rises: 20 steps, but 2% to 10% of all."""
    return min(LONGEST_WARMUP, max(SHORTEST_WARMUP, WARMUP_STEPS / num_steps))


def choose_learning_rate(hidden_size: int, distance: float | None) -> float:
    """Returns the peak learning rate of a stage.

    `rate = 2e-3 * (64 / hidden_size)^(2/3) * damage`. `damage` rises from 0.15 at no distance to 1 at 0.5 nats per
    token and beyond: a start near its teacher has little to learn and much to lose. The exponent joins 2e-3 at hidden
    size 64 (docs/results/heal-defaults.md), the 1e-3 to 2e-3 and 5e-4 to 1e-3 that far starts wanted at 128 and 256
    (docs/results/healing.md), and the 2e-4 of Relaxed Recursive Transformers at 2,048 (arXiv 2410.20672). The batch is
    not part of the rule: at a fixed budget the best rate was the same for all batches from 512 to 4,096 tokens. The
    result is rounded to two digits and lies between 2e-5 and 4e-3.

    Args:
        hidden_size: Width of the residual stream.
        distance: Nats per token by which the start's loss exceeds the teacher's; None: unknown, taken as near.
    """
    damage = NEAREST + (1 - NEAREST) * min(1.0, max(0.0, distance or 0.0) / FAR)
    rate = BASE_RATE * (BASE_HIDDEN_SIZE / hidden_size) ** (2 / 3) * damage
    return float(f"{min(HIGHEST_RATE, max(LOWEST_RATE, rate)):.1e}")


def excess_loss(loss: float, vocab_size: int) -> float:
    """Returns how far a start without a teacher is above the loss of a model that knows its text, nats per token."""
    return max(0.0, loss - KNOWN_TEXT * math.log(vocab_size))


def count_steps(tokens: int, context: int, batch_tokens: int) -> int:
    """Returns the optimizer steps of a stage trained by one process."""
    num_sequences = -(-tokens // context)
    return -(-num_sequences // max(1, batch_tokens // context))


def describe_stage(stage: HealStage, distance: float | None = None) -> str:
    """Returns a line with the settings a stage trains with, and what to change where it has few steps.

    Args:
        stage: With context, batch and warm-up set.
        distance: That the learning rate was chosen by; None: it was not chosen.
    """
    assert stage.batch_tokens is not None
    assert stage.context is not None
    assert stage.warmup is not None
    steps = count_steps(stage.tokens, stage.context, stage.batch_tokens)
    rate = "learning rate chosen when the stage starts"
    if stage.learning_rate is not None:
        rate = f"learning rate {stage.learning_rate:g}"
        if distance is not None:
            rate += f" (the start is {distance:.2f} nats per token from its target)"
    line = (
        f"{steps:,} steps of {stage.batch_tokens:,} tokens, context {stage.context:,}, {rate}, "
        f"warm-up over {math.ceil(stage.warmup * steps):,} steps"
    )
    if steps < ENOUGH_STEPS:
        line += f"; fewer than {ENOUGH_STEPS} steps heal little: give more tokens"
        if stage.batch_tokens > SMALLEST_BATCH:
            line += f", or set heal.batch_tokens={SMALLEST_BATCH}"
    return line
