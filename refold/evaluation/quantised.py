"""A model under evaluation with its linears quantised."""

from dataclasses import replace

import torch

from refold.blueprint.quantisation import find_scheme
from refold.evaluation.subject import Subject
from refold.modeling.quantise import quantise_linears


def quantise_subject(subject: Subject, name: str) -> Subject:
    """Rounds the weights of a subject's linears in place, and counts their bytes as integers with scales.

    Args:
        subject: Loaded for this evaluation.
        name: Of the scheme.

    Raises:
        RefoldError: There is no such scheme.
    """
    scheme, facts = find_scheme(name), subject.facts
    weights = quantise_linears(subject.model, scheme)
    stored = getattr(torch, facts.dtype).itemsize
    before = sum(weight.numel() * min(weight.element_size(), stored) for weight in weights)
    after = sum(scheme.num_bytes(*weight.shape) for weight in weights)
    changes = {"quantised": name, "weight_bytes": facts.weight_bytes - before + after}
    return replace(subject, facts=facts.model_copy(update=changes))
