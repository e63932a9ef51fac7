"""Rules for context, batch, warm-up and learning rate of a healing stage whose recipe does not set them."""

import math

from refold.recipe.heal import HealStage

ENOUGH_STEPS = 200
"""Optimizer steps below which the user is warned: AdamW's moments have not settled when such a stage ends."""
WANTED_STEPS = 1000
"""Smallest number of optimizer steps that the chosen batch gives, if the smallest batch allows it."""
SMALLEST_BATCH, LARGEST_BATCH = 512, 16_384
LONGEST_CONTEXT = 1024
SHORTEST_WARMUP, LONGEST_WARMUP, WARMUP_STEPS = 0.02, 0.1, 20
BASE_RATE, BASE_HIDDEN_SIZE = 2e-3, 64
"""The best rate of every batch of the grid on stories260K, whose hidden size is 64."""
FAR = 2.0
"""Excess loss over the teacher, in nats per token, from which a student gets the full learning rate."""
NEAREST = 0.15
"""Share of the full learning rate for a student whose loss equals its teacher's."""
LOWEST_RATE, HIGHEST_RATE = 2e-5, 4e-3
KNOWN_TEXT = 0.45
"""Upper bound for the loss of a pretrained model on text, as a share of ln(vocabulary)."""


def complete_stage(stage: HealStage, positions: int) -> HealStage:
    """Returns a stage whose context, batch and warm-up are set; keys set by the user do not change.

    The learning rate stays open: it depends on the loss at the stage's first step, see `choose_learning_rate`.

    Args:
        stage: From the recipe.
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
    """Returns the tokens of one optimizer step: the largest power of two that gives `WANTED_STEPS` steps.

    The result lies between 512 and 16,384. At a budget of 20,000 tokens each halving of the batch from 4,096 to 512
    gains 0.06 to 0.30 bits per byte, at every learning rate (docs/results/heal-defaults.md). The benefit of more steps
    at larger budgets has not been measured; 1,000 steps is a usual length of a fine-tuning run.

    Args:
        tokens: Training tokens of the stage.
    """
    wanted = 2 ** math.floor(math.log2(max(1, tokens / WANTED_STEPS)))
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, wanted))


def choose_warmup(num_steps: int) -> float:
    """Returns the share of the steps over which the learning rate rises: 20 steps, but 2% to 10% of all steps."""
    return min(LONGEST_WARMUP, max(SHORTEST_WARMUP, WARMUP_STEPS / num_steps))


def choose_learning_rate(hidden_size: int, distance: float | None) -> float:
    """Returns the peak learning rate of a stage.

    `rate = 2e-3 * (64 / hidden_size)^(2/3) * damage`. `damage` rises from 0.15 at distance 0 to 1 at 2 nats per token
    and more: a high rate damages a student near its teacher. For a student of SmolLM2-135M at 0.4 nats the best
    rate is 0.2 to 0.4 of the full one (docs/results/real-models.md). The exponent fits 2e-3 at hidden size 64
    (docs/results/heal-defaults.md), the best rates of distant students at 128 and 256 (1e-3 to 2e-3 and 5e-4 to 1e-3,
    docs/results/healing.md), and the 2e-4 of Relaxed Recursive Transformers at 2,048 (arXiv 2410.20672). The batch is
    not part of the rule: at a fixed budget the best rate was the same for all batches from 512 to 4,096 tokens. The
    result is rounded to two digits and lies between 2e-5 and 4e-3.

    Args:
        hidden_size: Width of the residual stream.
        distance: Excess of the student's loss over the teacher's, nats per token; None: unknown, counted as 0.
    """
    damage = NEAREST + (1 - NEAREST) * min(1.0, max(0.0, distance or 0.0) / FAR)
    rate = BASE_RATE * (BASE_HIDDEN_SIZE / hidden_size) ** (2 / 3) * damage
    return float(f"{min(HIGHEST_RATE, max(LOWEST_RATE, rate)):.1e}")


def excess_loss(loss: float, vocab_size: int) -> float:
    """Returns the excess of a loss over the bound for a pretrained model, in nats per token."""
    return max(0.0, loss - KNOWN_TEXT * math.log(vocab_size))


def count_steps(tokens: int, context: int, batch_tokens: int) -> int:
    """Returns the optimizer steps of a stage trained by one process."""
    num_sequences = -(-tokens // context)
    return -(-num_sequences // max(1, batch_tokens // context))


def describe_stage(stage: HealStage, distance: float | None = None) -> str:
    """Returns a line with the settings of a stage, and advice if the stage has few steps.

    Args:
        stage: With context, batch and warm-up set.
        distance: Distance from which the learning rate was chosen; None: it was not chosen.
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
