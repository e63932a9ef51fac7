"""Streams between depths against transformers' own layers, called one by one."""

import pytest
import torch

from refold.errors import HealError
from refold.healing.objectives.hidden_states import HiddenStates
from refold.recipe import objectives as specs

STRICT = {"fold": {"loops": 2, "init": "stepwise"}}
STORED = [0, 3, 0, 3]
PRUNED = {"drop": {"block": {"layers": [0, 2]}}}
VARIANTS = ["llama", "gpt_neox", "gpt_neox-sequential", "mistral-window"]


def objective(**options) -> HiddenStates:
    return HiddenStates(specs.HiddenStatesOptions(**options))


def distance(ours, target, scored):
    ours, target = ours[scored], target[scored]
    return (((ours - target) ** 2).mean(-1) / (target**2).mean(-1)).mean()


def expected(source, depths, scored):
    """The mean over `(where the stream is taken, layer that is run, where it should arrive)`."""
    streams = [stream.detach() for stream in source.streams()]
    return torch.stack(
        [distance(source.layer(run, streams[begin]), streams[end], scored) for begin, run, end in depths]
    ).mean()


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_depth_is_compared_with_where_the_next_begins(fold, load_source, documents, run_objective, plain, variant):
    teacher = load_source(variant)
    found = run_objective(objective(), fold(variant, STRICT), teacher, documents)
    depths = [(layer, run, layer + 1) for layer, run in enumerate(STORED)]
    reference = expected(plain(teacher, documents), depths, documents.scored)
    assert reference > 0.1
    torch.testing.assert_close(found.total, reference)
    torch.testing.assert_close(found.means, {"hidden_states": reference.detach()})


@pytest.mark.parametrize("variant", VARIANTS)
def test_students_inputs_are_its_own_streams(fold, load_source, documents, run_objective, plain, variant):
    teacher = load_source(variant)
    source = plain(teacher, documents)
    own = source.streams(STORED)
    parts = [
        distance(ours, target, documents.scored) for ours, target in zip(own[1:], source.streams()[1:], strict=True)
    ]
    found = run_objective(objective(inputs="student"), fold(variant, STRICT), teacher, documents).total
    torch.testing.assert_close(found, torch.stack(parts).mean())
    assert not torch.isclose(found, run_objective(objective(), fold(variant, STRICT), teacher, documents).total)


@pytest.mark.parametrize(
    ("recipe", "depths"),
    [
        # The first depth starts from the embeddings, each goes on to where the next one's source layer begins.
        (PRUNED, [(0, 1, 3), (3, 3, 4)]),
        ({"drop": {"block": {"layers": [1, 3]}}}, [(0, 0, 2), (2, 2, 4)]),
        # What is there but runs nothing is passed over, what lost its mixer alone is not.
        (
            {"drop": {"attention": {"layers": [1, 2]}, "mlp": {"layers": [1]}}},
            [(0, 0, 2), (2, None, 3), (3, 3, 4)],
        ),
    ],
    ids=["first dropped", "last dropped", "nothing run"],
)
def test_a_depth_before_dropped_layers_does_their_work(
    fold, load_source, documents, run_objective, plain, recipe, depths
):
    teacher, student = load_source(), fold(recipe=recipe)
    source = plain(teacher, documents)
    streams = source.streams()

    def run(layer, begin):
        if layer is not None:
            return source.layer(layer, streams[begin])
        block = teacher.model.layers[begin]
        return streams[begin] + block.mlp(block.post_attention_layernorm(streams[begin]))

    parts = [distance(run(layer, begin), streams[end], documents.scored) for begin, layer, end in depths]
    found = run_objective(objective(), student, teacher, documents).total
    assert found > 0.01
    torch.testing.assert_close(found, torch.stack(parts).mean())


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_a_stored_part_learns_from_all_its_depths(fold, load_source, documents, run_objective, plain, inputs):
    teacher, student = load_source(), fold(recipe=STRICT)
    run_objective(objective(), student, teacher, documents).total.backward()
    model = load_source()
    depths = [(layer, run, layer + 1) for layer, run in enumerate(STORED)]
    expected(plain(model, documents), depths, documents.scored).backward()
    wanted = [model.model.layers[layer].mlp.up_proj.weight.grad for layer in (0, 3)]
    found = [mlp.up_proj.weight.grad for mlp in student.model.mlps]
    torch.testing.assert_close(found, wanted)
    model.zero_grad()
    (expected(plain(model, documents), [*depths[:2], depths[3]], documents.scored) * 3 / 4).backward()
    assert not torch.allclose(model.model.layers[0].mlp.up_proj.weight.grad, wanted[0], rtol=1e-2)


@pytest.mark.parametrize("inputs", ["teacher", "student"])
@pytest.mark.parametrize("variant", [*VARIANTS, "gemma2", "gemma3_text", "olmo2"])
def test_a_model_folded_into_itself_has_nothing_to_learn(fold, load_source, documents, run_objective, variant, inputs):
    student = fold(variant)
    found = run_objective(objective(inputs=inputs), student, load_source(variant), documents)
    assert 0 <= found.total < 1e-12
    found.total.backward()
    gradients = [weight.grad for weight in student.parameters() if weight.grad is not None]
    assert max(gradient.abs().max() for gradient in gradients) < 1e-5
    with torch.no_grad():
        # No factor, which a norm would take out again.
        weight = student.model.mlps[3].down_proj.weight
        weight.add_(0.01 * weight.flip(0))
    assert run_objective(objective(inputs=inputs), student, load_source(variant), documents).total > 1e-8


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "mistral-window"])
def test_packed_documents_count_as_each_alone(fold, load_source, require_documents_apart, variant):
    require_documents_apart(objective(loss="l2"), fold(variant, STRICT), load_source(variant, attn="sdpa"))


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_layers_are_mapped_where_they_count_differently(fold, load_source, compact, documents, run_objective, inputs):
    student = fold(recipe=PRUNED)
    assert len(compact(student).model.depths) == 2
    found = run_objective(objective(inputs=inputs), student, load_source(), documents).total
    again = run_objective(objective(inputs=inputs), compact(student), load_source(), documents).total
    assert found > 0.01
    torch.testing.assert_close(again, found)


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_a_pruned_teacher_is_mapped_by_source_layer(fold, compact, documents, run_objective, inputs):
    student, teacher = fold(recipe=PRUNED), compact(fold(recipe=PRUNED))
    assert run_objective(objective(inputs=inputs), student, teacher, documents).total < 1e-12
    with torch.no_grad():
        teacher.model.mlps[1].up_proj.weight.mul_(0.5)
    assert run_objective(objective(inputs=inputs), student, teacher, documents).total > 1e-3


def test_what_each_side_is_asked_for():
    assert objective().student_wants == frozenset()
    assert objective(inputs="student").student_wants == objective().teacher_wants == {"streams"}


def test_a_teacher_without_the_layers_is_refused(fold, compact):
    with pytest.raises(HealError, match=r"objective hidden_states: a teacher that has what stands for .* layers 0, 2"):
        objective().check(fold(recipe=STRICT), compact(fold(recipe=PRUNED)))


def test_depths_that_repeat_a_layer_are_refused(fold, load_source):
    student = fold(recipe=STRICT)
    student.model.depths[2].spec = student.model.depths[2].spec.model_copy(update={"source": 1})
    with pytest.raises(
        HealError, match=r"later and later source layers.*\(depth 2 stands for layer 1, depth 1 for 1\)"
    ):
        objective().check(student, load_source())


def test_depths_that_read_keys_are_run_one_by_one_too(fold, load_source, documents, run_objective):
    teacher, shared = load_source("llama"), fold("llama", {"share_kv": {"from": "pairs"}})
    run_objective(objective(), shared, teacher, documents).total.backward()
    assert all(weight.grad is not None for part in shared.model.mixers for weight in part.parameters())
    shared.zero_grad()
