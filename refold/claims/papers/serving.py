"""Claim of Relaxed Recursive Transformers about the throughput of continuous depth-wise batching."""

from refold.claims.claim import Claim
from refold.claims.papers.recursive_arms import RRT
from refold.claims.throughput import RecordedThroughput

THROUGHPUT = Claim(
    name="rrt-throughput",
    paper=RRT,
    statement="Recursive models with early exits answer many requests 2.66 times as fast as the source in static "
    "batches, and 1.88 times as fast as the source with continuous batching.",
    figures="Gemma 2B strict (table K.2), by a simulation with oracle exits: 2877 tokens/s against 1080 and 1528",
    measurements=(RecordedThroughput(1.88),),
    note="Ours is measured, with live exits, against full depth in the same engine with continuous batching.",
)
CLAIMS = (THROUGHPUT,)
