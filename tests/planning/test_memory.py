import pytest

from refold.planning.lines import MEMORY_CONTEXTS, MemoryNeeds, compare_memory
from refold.planning.plan import plan


@pytest.mark.parametrize(
    ("context", "words"), [(None, "never"), (0, "at every length"), (1234567, "from 1,234,567 tokens on")]
)
def test_the_length_in_words(context, words):
    assert MemoryNeeds(cache_and_state=(), smaller_from=context).describe() == words


def test_a_recurrent_target_beside_its_source(make_source):
    costs = plan(make_source("llama"), {"mixers": [{"type": "retention"}]}, allow_larger=True).cost
    memory = compare_memory(costs.source, costs.target)
    assert [each.context for each in memory.cache_and_state] == list(MEMORY_CONTEXTS)
    # Four layers with keys and values of two heads of eight, in float32.
    assert [each.source for each in memory.cache_and_state] == [4 * 2 * 2 * 8 * 4 * each for each in MEMORY_CONTEXTS]
    assert {each.target for each in memory.cache_and_state} == {costs.target.state_bytes}
    begins = memory.smaller_from
    assert begins is not None
    assert costs.target.memory_bytes(begins) < costs.source.memory_bytes(begins)
    assert costs.target.memory_bytes(begins - 1) >= costs.source.memory_bytes(begins - 1)


def test_the_same_model_never_needs_less(make_source):
    costs = plan(make_source("llama"), None, allow_larger=True).cost
    assert compare_memory(costs.source, costs.target).describe() == "never"
