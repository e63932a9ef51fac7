import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refold.blueprint.cost import Cost, cost, smaller_from
from refold.mixers.spec import CacheCost
from refold.planning.build import build_blueprint, identity_blueprint
from refold.recipe.load import load_recipe

# The architecture of conftest: hidden 32, 4 heads and 2 key-value heads of 8, MLP 80, vocabulary 96.
ATTENTION, MLP, EMBEDDING = 32 * 32 + 2 * 16 * 32 + 32 * 32, 3 * 80 * 32, 96 * 32
LAYER = ATTENTION + MLP + 2 * 32


def test_the_source_by_hand(make_arch):
    counted = cost(identity_blueprint(make_arch(4)), 2)
    assert counted.non_embedding_parameters == 4 * LAYER + 32
    assert counted.parameters == 4 * LAYER + 32 + 2 * EMBEDDING
    assert counted.weight_bytes == 2 * counted.parameters
    assert counted.cache == (CacheCost(bytes_per_token=4 * 2 * 2 * 16, max_tokens=None),)
    assert counted.state_bytes == 0
    assert counted.flops_per_token == 2 * (4 * (ATTENTION + MLP) + EMBEDDING)
    assert counted.flops_per_context_token == 4 * 4 * 32
    assert counted.cache_bytes(100) == 100 * 256
    assert counted.flops(100) == counted.flops_per_token + 100 * 512


def test_a_tied_head_is_stored_once_and_run_all_the_same(make_arch):
    untied, tied = (cost(identity_blueprint(make_arch(4, tie_word_embeddings=tie)), 2) for tie in (False, True))
    assert untied.parameters - tied.parameters == EMBEDDING
    assert untied.non_embedding_parameters == tied.non_embedding_parameters
    assert untied.flops_per_token == tied.flops_per_token


def test_tying_saves_weights_alone_and_loras_cost_both(make_arch):
    arch = make_arch(4)
    source, strict, relaxed = (
        cost(build_blueprint(arch, load_recipe(sections)).blueprint, 4)
        for sections in ({}, {"fold": {"loops": 2}}, {"fold": {"loops": 2}, "relax": {"rank": 2}})
    )
    assert strict.non_embedding_parameters == 2 * LAYER + 32
    assert (strict.cache, strict.flops_per_token) == (source.cache, source.flops_per_token)
    # Rank 2 on q, k, v, o (64 + 48 + 48 + 64) and gate, up, down (3 x 112), at each of four depths.
    lora = 4 * 2 * (64 + 48 + 48 + 64 + 3 * 112)
    assert relaxed.parameters - strict.parameters == lora
    assert relaxed.flops_per_token - strict.flops_per_token == 2 * lora


def test_own_vectors_are_counted_for_each_depth(make_arch):
    arch = make_arch(4, attention_bias=True)
    tied, own = (
        cost(build_blueprint(arch, load_recipe({"fold": {"loops": 2}, "relax": {"rank": 0, **extra}})).blueprint, 2)
        for extra in ({}, {"vectors": "own"})
    )
    # Two more copies of both norms and of the biases of q, k, v, o.
    assert own.parameters - tied.parameters == 2 * (2 * 32 + 32 + 16 + 16 + 32)


def test_dropped_parts_cost_nothing(make_arch):
    arch = make_arch(4)
    sections = {"drop": {"attention": {"layers": [1]}, "mlp": {"layers": [2]}, "block": {"layers": [3]}}}
    counted = cost(build_blueprint(arch, load_recipe(sections)).blueprint, 2)
    assert counted.non_embedding_parameters == 2 * (ATTENTION + MLP + 64) + 32
    assert counted.cache == (CacheCost(2 * 2 * 2 * 16, None),)
    assert counted.flops_per_token == 2 * (2 * (ATTENTION + MLP) + EMBEDDING)


def test_windows_bound_cache_and_flops(make_arch):
    arch = make_arch(4, "mistral", sliding_window=8)
    wide = arch.layers[0].model_copy(update={"window": None})
    counted = cost(identity_blueprint(arch.model_copy(update={"layers": (wide, *arch.layers[1:])})), 2)
    assert counted.cache == (CacheCost(64, None), CacheCost(192, 8))
    assert counted.cache_bytes(5) == 5 * 256
    assert counted.cache_bytes(100) == 100 * 64 + 8 * 192
    assert counted.flops_per_context_token == 512
    assert counted.flops(100) - counted.flops_per_token == 100 * 128 + 8 * 384


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt_neox", "qwen3", "gemma2", "olmo2", "phi3"])
def test_a_source_weighs_what_its_tensors_do(make_arch, model_type):
    from refold.blueprint.source_tensors import source_tensors
    from refold.families.registry import find_family

    arch = make_arch(3, model_type)
    total = 0
    for tensor in source_tensors(arch, find_family(model_type)).values():
        size = 1
        for side in tensor.shape:
            size *= side
        total += size
    assert cost(identity_blueprint(arch), 2).parameters == total


def _made_cost(weights: int, state: int, cache: dict[int | None, int]) -> Cost:
    return Cost(
        parameters=0,
        non_embedding_parameters=0,
        weight_bytes=weights,
        cache=tuple(CacheCost(size, window) for window, size in cache.items()),
        state_bytes=state,
        flops_per_token=0,
        flops_per_context_token=0,
        context_flops=(),
    )


SOURCE = _made_cost(100, 0, {None: 10})


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (SOURCE, _made_cost(100, 50, {}), 6),
        (SOURCE, _made_cost(100, 49, {}), 5),
        (SOURCE, _made_cost(120, 50, {None: 3}), 11),
        (SOURCE, _made_cost(99, 0, {None: 10}), 0),
        (SOURCE, SOURCE, None),
        (SOURCE, _made_cost(50, 0, {None: 11}), None),
        # The source's window is full before the target's state is paid for.
        (_made_cost(100, 0, {8: 10}), _made_cost(100, 80, {}), None),
        (_made_cost(100, 0, {8: 10}), _made_cost(100, 79, {}), 8),
        # Smaller, then larger, and when its window is full soon smaller for good: 95 + 20 x 12 < 100 + 24 x 10.
        (SOURCE, _made_cost(95, 0, {20: 12}), 24),
    ],
)
def test_where_a_target_begins_to_need_less_memory(source, target, expected):
    assert smaller_from(source, target) == expected


amounts = st.integers(0, 300)
caches = st.dictionaries(st.sampled_from([None, 1, 7, 40, 64]), st.integers(0, 9))


@given(st.tuples(amounts, amounts, caches), st.tuples(amounts, amounts, caches))
@settings(max_examples=200, deadline=None)
def test_it_is_the_first_length_from_which_it_stays_so(one, other):
    source, target = _made_cost(*one), _made_cost(*other)
    # At one byte per token, the largest difference there can be here is made up for after 1,672.
    smaller = [target.memory_bytes(context) < source.memory_bytes(context) for context in range(1800)]
    expected = None if not smaller[-1] else next((at for at in range(1799, 0, -1) if not smaller[at - 1]), 0)
    assert smaller_from(source, target) == expected
