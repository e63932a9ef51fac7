"""Mixer outputs against transformers' own attention modules, called one by one."""

from dataclasses import replace

import pytest
import torch

from refold.errors import HealError
from refold.healing.objectives.mixer_outputs import MixerOutputs
from refold.recipe import objectives as specs

PRUNED = {"drop": {"block": {"layers": [0, 2]}}}
STRICT = {"fold": {"loops": 2, "init": "stepwise"}}
STORED = [0, 3, 0, 3]  # the source layer that is run at each depth: stepwise keeps layers 0 and 3 of four
VARIANTS = ["llama", "gpt_neox", "gpt_neox-sequential", "mistral-window"]


def objective(**options) -> MixerOutputs:
    return MixerOutputs(specs.MixerOutputsOptions(**options))


def distance(ours, target, scored, kind):
    """Mean over scored positions, by the definition."""
    ours, target = ours[scored], target[scored]
    if kind == "l2":
        return ((ours - target) ** 2).sum(-1).sqrt().mean() / ours.shape[-1] ** 0.5
    return (((ours - target) ** 2).mean(-1) / (target**2).mean(-1)).mean()


def expected(source, depths, kind="mse", student=None):
    """The mean over `(source layer, layer that is run in its place)`, each on the teacher's stream or the student's."""
    streams = [stream.detach() for stream in source.streams()]
    own = streams if student is None else student
    parts = [
        distance(
            source.mixer(run, own[at if student else layer])[0],
            source.mixer(layer, streams[layer])[0].detach(),
            source.documents.scored,
            kind,
        )
        for at, (layer, run) in enumerate(depths)
    ]
    return torch.stack(parts).mean()


@pytest.mark.parametrize("kind", ["mse", "l2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_depth_is_compared_with_its_source_layer_on_the_teachers_stream(
    fold, load_source, documents, run_objective, plain, variant, kind
):
    teacher = load_source(variant)
    found = run_objective(objective(loss=kind), fold(variant, STRICT), teacher, documents)
    reference = expected(plain(teacher, documents), list(enumerate(STORED)), kind)
    assert reference > 0.1
    torch.testing.assert_close(found.total, reference)
    torch.testing.assert_close(found.means["mixer_outputs"], reference.detach())
    assert not found.means["mixer_outputs"].requires_grad
    shifted = expected(plain(teacher, documents), [(layer, STORED[layer - 1]) for layer in range(4)], kind)
    assert (found.total - shifted).abs() > 0.01 * reference


@pytest.mark.parametrize("variant", VARIANTS)
def test_students_inputs_are_its_own_streams(fold, load_source, documents, run_objective, plain, variant):
    teacher = load_source(variant)
    source = plain(teacher, documents)
    own = source.streams(STORED)
    found = run_objective(objective(inputs="student"), fold(variant, STRICT), teacher, documents)
    torch.testing.assert_close(found.total, expected(source, list(enumerate(STORED)), student=own))
    alone = expected(source, list(enumerate(STORED)))
    assert (found.total - alone).abs() > 0.01 * alone


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_a_stored_mixer_learns_from_all_its_depths(fold, load_source, documents, run_objective, plain, inputs):
    teacher, student = load_source(), fold(recipe=STRICT)
    run_objective(objective(), student, teacher, documents).total.backward()

    def reference(depths):
        model = load_source()
        (expected(plain(model, documents), depths) * len(depths) / 4).backward()
        return [model.model.layers[layer].self_attn.v_proj.weight.grad for layer in (0, 3)]

    found = [mixer.v_proj.weight.grad for mixer in student.model.mixers]
    for gradient, wanted in zip(found, reference(list(enumerate(STORED))), strict=True):
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(gradient, wanted)
    with_one_less = reference([(0, 0), (1, 3), (3, 3)])
    assert not torch.allclose(found[0], with_one_less[0], rtol=1e-2)
    torch.testing.assert_close(found[1], with_one_less[1])


def test_with_the_teachers_inputs_nothing_but_mixers_is_run(fold, load_source, documents, run_objective):
    student, wanted = fold(recipe=STRICT), objective()
    assert wanted.student_wants == frozenset()
    assert wanted.teacher_wants == {"streams", "mixers"}
    assert objective(inputs="student").teacher_wants == {"mixers"}
    run_objective(wanted, student, load_source(), documents).total.backward()
    reached = {name for name, weight in student.named_parameters() if weight.grad is not None}
    assert reached == {name for name in dict(student.named_parameters()) if name.startswith("model.mixers.")}


@pytest.mark.parametrize("inputs", ["teacher", "student"])
@pytest.mark.parametrize("variant", [*VARIANTS, "gemma2", "gemma3_text", "olmo2"])
def test_a_model_folded_into_itself_has_nothing_to_learn(fold, load_source, documents, run_objective, variant, inputs):
    student = fold(variant)
    found = run_objective(objective(inputs=inputs), student, load_source(variant), documents)
    assert 0 <= found.total < 1e-12
    found.total.backward()
    assert max(mixer.q_proj.weight.grad.abs().max() for mixer in student.model.mixers) < 1e-5
    with torch.no_grad():
        # No factor, which a norm would take out again.
        weight = student.model.mixers[2].q_proj.weight
        weight.add_(0.01 * weight.flip(0))
    assert run_objective(objective(inputs=inputs), student, load_source(variant), documents).total > 1e-8


@pytest.mark.parametrize("inputs", ["teacher", "student"])
@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "mistral-window"])
def test_packed_documents_count_as_each_alone(fold, load_source, require_documents_apart, variant, inputs):
    require_documents_apart(objective(inputs=inputs), fold(variant, STRICT), load_source(variant, attn="sdpa"))


@pytest.mark.parametrize("kind", ["mse", "l2"])
def test_micro_batches_add_up(fold, load_source, documents, run_objective, kind):
    teacher, student = load_source(), fold(recipe=STRICT)
    whole = run_objective(objective(loss=kind), student, teacher, documents).total
    halves = [
        run_objective(objective(loss=kind), student, teacher, documents.rows(rows), documents.num_tokens).total
        for rows in (slice(0, 1), slice(1, 2))
    ]
    torch.testing.assert_close(whole, halves[0] + halves[1])


def test_what_is_not_scored_does_not_count(fold, load_source, documents, run_objective):
    teacher, student = load_source(), fold(recipe=STRICT)
    found = run_objective(objective(), student, teacher, documents).total
    changed = documents.input_ids.clone()
    changed[1, 12:] = 5
    other = run_objective(objective(), student, teacher, replace(documents, input_ids=changed)).total
    torch.testing.assert_close(other, found, rtol=0, atol=0)
    changed[1, 10] = 5
    assert run_objective(objective(), student, teacher, replace(documents, input_ids=changed)).total != found


@pytest.mark.parametrize(
    ("recipe", "depths"),
    [
        ({"drop": {"attention": {"layers": [1]}}, **STRICT}, [(0, 0), (2, 0), (3, 3)]),
        (PRUNED, [(1, 1), (3, 3)]),
    ],
    ids=["mixer dropped", "pruned"],
)
def test_dropped_mixers_are_left_out(fold, load_source, documents, run_objective, plain, recipe, depths):
    teacher, student = load_source(), fold(recipe=recipe)
    with torch.no_grad():  # what is compared with itself tells nothing
        student.model.mixers[0].q_proj.weight.mul_(0.5)
        teacher_of_student = load_source()
        for layer in student.config.read_blueprint().mixers[0].sources:
            teacher_of_student.model.layers[layer].self_attn.q_proj.weight.mul_(0.5)
    found = run_objective(objective(), student, teacher, documents).total
    streams = plain(teacher, documents).streams()
    parts = [
        distance(
            plain(teacher_of_student, documents).mixer(run, streams[layer])[0],
            plain(teacher, documents).mixer(layer, streams[layer])[0],
            documents.scored,
            "mse",
        )
        for layer, run in depths
    ]
    assert found > 1e-3
    torch.testing.assert_close(found, torch.stack(parts).mean())


def test_a_folded_teacher_is_as_good_as_its_source(fold, load_source, documents, run_objective):
    student = fold(recipe=STRICT)
    found = run_objective(objective(), student, fold(), documents).total
    torch.testing.assert_close(found, run_objective(objective(), student, load_source(), documents).total)


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_a_pruned_teacher_is_mapped_by_source_layer(fold, compact, documents, run_objective, inputs):
    student, teacher = fold(recipe=PRUNED), compact(fold(recipe=PRUNED))
    assert run_objective(objective(inputs=inputs), student, teacher, documents).total < 1e-12
    with torch.no_grad():
        teacher.model.mixers[1].q_proj.weight.mul_(0.5)
    assert run_objective(objective(inputs=inputs), student, teacher, documents).total > 1e-3


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_gradient_checkpointing_changes_nothing(fold, load_source, documents, run_objective, inputs):
    gradients = []
    for checkpoints in (False, True):
        student = fold(recipe=STRICT).train()
        if checkpoints:
            student.gradient_checkpointing_enable()
        run_objective(objective(inputs=inputs), student, load_source(), documents).total.backward()
        gradients.append(student.model.mixers[0].q_proj.weight.grad)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_a_half_precision_teacher_is_compared_in_float32(fold, load_source, documents, run_objective, autocast):
    exact = run_objective(objective(), fold(recipe=STRICT), load_source(), documents).total
    student = fold(recipe=STRICT, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = run_objective(objective(), student, load_source(dtype=torch.bfloat16), documents)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total, exact.float(), rtol=0.03, atol=0)
    found.total.backward()
    assert torch.isfinite(student.model.mixers[0].q_proj.weight.grad).all()


def test_a_target_of_nothing_does_not_divide_by_nothing(fold, load_source, documents, run_objective):
    teacher = load_source()
    torch.nn.init.zeros_(teacher.model.layers[1].self_attn.o_proj.weight)
    assert torch.isfinite(run_objective(objective(), fold(recipe=STRICT), teacher, documents).total)


def test_a_teacher_of_another_depth_is_refused(fold, load_source):
    with pytest.raises(HealError, match=r"objective mixer_outputs: a teacher of 4 source layers.* \(got 3\); name"):
        objective().check(fold(recipe=STRICT), load_source(num_hidden_layers=3))


def test_a_teacher_of_another_width_is_refused(fold, load_source):
    with pytest.raises(HealError, match=r"a teacher of 32 hidden dimensions.* \(got 16\)"):
        objective().check(fold(recipe=STRICT), load_source(hidden_size=16))


@pytest.mark.parametrize(
    "recipe", [{"drop": {"block": {"layers": [1, 2]}}}, {"drop": {"attention": {"layers": [1, 2]}}}]
)
def test_a_teacher_without_the_layers_is_refused(fold, recipe):
    with pytest.raises(HealError, match=r"what stands for source layers 1, 2 is required \(it is dropped there\)"):
        objective().check(fold(recipe=STRICT), fold(recipe=recipe))


def test_a_student_without_mixers_is_refused(fold, load_source):
    with pytest.raises(HealError, match=r"objective mixer_outputs: a depth that can be compared is required"):
        objective().check(fold(recipe={"drop": {"attention": {"count": 4}}}), load_source())


def test_depths_read_keys_made_of_the_teachers_stream(fold, load_source, documents, run_objective):
    teacher, shared, plain = load_source("llama"), fold("llama", {"share_kv": {"from": "pairs"}}), fold("llama")
    made = {}

    def hand_over(view, arguments):
        query, key, value, *rest = arguments
        made[view.layer_idx] = key, value
        return query, *made[view.layer_idx // 2 * 2], *rest

    assert run_objective(objective(), plain, teacher, documents).total < 1e-9
    hooks = [depth.view.register_forward_pre_hook(hand_over) for depth in plain.model.depths]
    reference = run_objective(objective(), plain, teacher, documents).total
    for hook in hooks:
        hook.remove()
    assert reference > 0.01
    torch.testing.assert_close(run_objective(objective(), shared, teacher, documents).total, reference)
