"""Claims of Relaxed Recursive Transformers about the start of stored layers and LoRAs."""

from refold.claims.claim import Claim
from refold.claims.contrast import better
from refold.claims.papers.recursive_arms import (
    RELAXED,
    RELAXED_ZERO,
    RRT,
    STRICT,
    STRICT_AVERAGE,
    STRICT_LOWER,
    STRICT_RANDOM,
)

START_STRICT = Claim(
    name="rrt-start-strict",
    paper=RRT,
    statement="A strict recursive model starts best from evenly spaced layers (Stepwise), better than from the mean of "
    "tied layers (Average); and any pretrained start, such as the lower layers (Lower), beats a random block.",
    figures="Gemma 2B, two loops, 15B tokens, mean of seven tasks (section 3.4, appendix F): Stepwise 51.7, Lower "
    "47.1, Average 46.7, random 37.6; TinyLlama 42.7, 38.3, 42.2, 36.5; Pythia 43.5, 43.6, 43.3, 36.2",
    measurements=(better(STRICT, STRICT_AVERAGE), better(STRICT_LOWER, STRICT_RANDOM)),
)
START_RELAXED = Claim(
    name="rrt-start-relaxed",
    paper=RRT,
    statement="With LoRAs, averaged layers and LoRAs from the SVD of the tying error beat the strict model, and beat "
    "LoRAs that start at zero.",
    figures="Gemma 2B, rank 512, 15B tokens (appendix G): Average + SVD 55.5, strict 51.7, Average + zero 49.0; "
    "TinyLlama 44.8 against 43.4 from zero; Pythia 45.6 against 44.2",
    measurements=(better(RELAXED, STRICT), better(RELAXED, RELAXED_ZERO)),
)
CLAIMS = (START_STRICT, START_RELAXED)
