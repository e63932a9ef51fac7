"""Claims of Relaxed Recursive Transformers about what recursion and distillation are worth."""

from refold.claims.claim import Claim, ClaimArm
from refold.claims.contrast import as_good, better
from refold.claims.papers.recursive_arms import REDUCED, RRT, STRICT, STRICT_DISTILLED, UNLOOPED, fold

MARGIN = 0.005
"""Bits per byte by which a divergence may be worse and still count as equal; the paper's differ by 0.5 points."""
OTHER_DIVERGENCES = tuple(
    ClaimArm(
        f"strict, distilled by {name.replace('_', ' ')}",
        fold("stepwise"),
        heal=({"objective": {"distil": {"divergence": name}}},),
    )
    for name in ("reverse_kl", "jensen_shannon", "total_variation")
)

SCRATCH = Claim(
    name="rrt-scratch",
    paper=RRT,
    statement="A recursive model converted from a pretrained one beats a model of its size trained from scratch on the "
    "same tokens.",
    figures="15B tokens (table F.1): Gemma 51.7 against 38.2, TinyLlama 42.7 against 36.0, Pythia 43.5 against 36.2",
    measurements=(better(STRICT, REDUCED),),
)
LOOPING = Claim(
    name="rrt-looping",
    paper=RRT,
    statement="The same layers are worth more when they run twice than when they run once, which is depth pruning.",
    figures="Pythia 410M on the Pile, 15B tokens (table F.3): looped 41.54 (perplexity 11.03), else 40.35 (11.48)",
    measurements=(better(STRICT, UNLOOPED),),
    note="The model that is not looped has half the FLOPs and half the cache.",
)
DISTILLATION = Claim(
    name="rrt-distillation",
    paper=RRT,
    statement="Distillation from the full model beats training on text alone.",
    figures="Gemma 2B strict, 15B tokens (section 3.6, table I.1): forward KL 53.4, text alone 51.7",
    measurements=(better(STRICT_DISTILLED, STRICT),),
    note="Our teacher is the source itself; the paper's is the source after training on the same text.",
)
DIVERGENCE = Claim(
    name="rrt-divergence",
    paper=RRT,
    statement="Forward KL is at least as good for distillation as reverse KL, Jensen-Shannon and total variation.",
    figures="Gemma 2B strict, 15B tokens (table I.1): 53.4, against 53.3, 52.9 and 53.0",
    measurements=tuple(as_good(STRICT_DISTILLED, other, MARGIN) for other in OTHER_DIVERGENCES),
    note="Half of the loss is cross-entropy in all of them; the paper does not state its weights.",
)
CLAIMS = (SCRATCH, LOOPING, DISTILLATION, DIVERGENCE)
