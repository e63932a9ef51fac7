"""Token-mixing matrices against the attention weights transformers returns."""

import pytest
import torch

from refold.errors import HealError
from refold.healing.activations import Want, observe
from refold.healing.objectives.attention_matrices import AttentionMatrices, write_matrix
from refold.recipe import objectives as specs

STRICT = {"fold": {"loops": 2, "init": "stepwise"}}
STORED = [0, 3, 0, 3]
VARIANTS = ["llama", "llama-mqa-mlp-bias", "gpt_neox", "mistral-window"]


def objective() -> AttentionMatrices:
    return AttentionMatrices(specs.AttentionMatricesOptions())


def expected(source, depths):
    """The mean over `(source layer, layer that is run in its place)`, rows of scored positions only."""
    streams, rows = [stream.detach() for stream in source.streams()], source.documents.scored.nonzero().tolist()
    parts = []
    for layer, run in depths:
        ours, target = source.mixer(run, streams[layer])[1], source.mixer(layer, streams[layer])[1].detach()
        parts += [((ours[row, :, column] - target[row, :, column]) ** 2).sum(-1).mean() for row, column in rows]
    return torch.stack(parts).mean()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_matrix_is_what_eager_attention_multiplies_values_by(fold, documents, variant):
    inputs = documents.input_ids, documents.position_ids
    wants = frozenset[Want]({"streams", "attentions"})
    with torch.no_grad():
        found = observe(fold(variant, STRICT, attn_implementation="eager"), *inputs, wants)
        student = fold(variant, STRICT, attn_implementation="sdpa")
        batch = student.model.batch(found.streams[0], position_ids=documents.position_ids)
        for depth, weights in found.attentions.items():
            matrix = write_matrix(student, depth, found.streams[depth], batch)
            torch.testing.assert_close(matrix, weights)
            torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
            assert not matrix[~documents.mask.expand_as(matrix)].any()
            for head in range(4):  # none may be a copy of another
                other = matrix[:, (head + 1) % 4]
                assert (matrix[:, head] - other).abs().max() > 0.1


def test_the_matrix_is_soft_capped(fold, documents):
    student = fold()
    batch = student.model.batch(student.model.embed_tokens(documents.input_ids))
    stream = student.model.embed_tokens(documents.input_ids)
    plain = write_matrix(student, 0, stream, batch)
    depth, mixer = student.model.depths[0], student.model.mixers[0]
    depth.view.softcap = 1.5
    capped = write_matrix(student, 0, stream, batch)
    query, key, _ = mixer.read(stream, batch.rotations[0], {}, None)
    scores = torch.einsum("bqhk,bshk->bhqs", query, key.repeat_interleave(2, dim=2)) * depth.view.scaling
    seen = torch.ones(16, 16).tril().bool()
    reference = (1.5 * torch.tanh(scores / 1.5)).masked_fill(~seen, -torch.inf).softmax(-1)
    torch.testing.assert_close(capped, reference, atol=1e-7, rtol=1e-6)
    assert (capped - plain).abs().max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_depth_is_compared_with_its_source_layer(fold, load_source, documents, run_objective, plain, variant):
    teacher, student = load_source(variant), fold(variant, STRICT)
    found = run_objective(objective(), student, teacher, documents)
    reference = expected(plain(teacher, documents), list(enumerate(STORED)))
    assert reference > 0.05
    torch.testing.assert_close(found.total, reference, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.means["attention_matrices"], found.total.detach())
    found.total.backward()
    assert all(mixer.k_proj.weight.grad.abs().max() > 1e-5 for mixer in student.model.mixers)


def test_a_stored_mixer_learns_from_all_its_depths(fold, load_source, documents, run_objective, plain):
    student = fold(recipe=STRICT)
    run_objective(objective(), student, load_source(), documents).total.backward()
    gradients = []
    for depths in (list(enumerate(STORED)), [(0, 0), (1, 3), (3, 3)]):
        model = load_source()
        (expected(plain(model, documents), depths) * len(depths) / 4).backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    found = student.model.mixers[0].k_proj.weight.grad
    torch.testing.assert_close(found, gradients[0], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(found, gradients[1], rtol=1e-2)


def test_a_model_folded_into_itself_has_nothing_to_learn(fold, load_source, documents, run_objective):
    student = fold()
    found = run_objective(objective(), student, load_source(), documents).total
    assert found < 1e-12
    found.backward()
    assert max(mixer.q_proj.weight.grad.abs().max() for mixer in student.model.mixers) < 1e-5
    with torch.no_grad():
        student.model.mixers[2].k_proj.weight.mul_(1.01)
    assert run_objective(objective(), student, load_source(), documents).total > 1e-8


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "mistral-window"])
def test_packed_documents_count_as_each_alone(fold, load_source, require_documents_apart, variant):
    require_documents_apart(objective(), fold(variant, STRICT), load_source(variant))


def test_half_precision_is_compared_in_float32(fold, load_source, documents, run_objective):
    exact = run_objective(objective(), fold(recipe=STRICT), load_source(), documents).total
    student = fold(recipe=STRICT, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = run_objective(objective(), student, load_source(dtype=torch.bfloat16), documents).total
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.float(), rtol=0.05, atol=0)


def test_the_teacher_must_be_loaded_with_eager_attention(fold, load_source):
    assert objective().teacher_attention == "eager"
    with pytest.raises(HealError, match=r"eager attention is required to read attention weights \(got sdpa\); load"):
        objective().check(fold(recipe=STRICT), load_source(attn="sdpa"))


def test_a_mixer_that_has_no_matrix_is_refused(fold, load_source):
    student = fold(recipe=STRICT)
    student.model.mixers[1].num_matrix_heads = None
    with pytest.raises(HealError, match=r"token-mixing matrix down are required \(depth 1: attention cann"):
        objective().check(student, load_source())


def test_another_number_of_heads_is_refused(fold, load_source):
    with pytest.raises(HealError, match=r"as the teacher's 8 are required \(depth 0: attention has 4\)"):
        objective().check(fold(recipe=STRICT), load_source(num_attention_heads=8))


def test_a_teacher_without_attention_there_is_refused(fold):
    teacher = fold(recipe={"drop": {"attention": {"layers": [1]}}}, attn_implementation="eager")
    with pytest.raises(HealError, match=r"what stands for source layers 1 is required"):
        objective().check(fold(recipe=STRICT), teacher)


def test_a_depth_that_reads_another_ones_keys_is_refused(fold, load_source):
    with pytest.raises(HealError, match=r"values of their own are required \(depth 1 reads those of depth 0\)"):
        objective().check(fold("llama", {"share_kv": {"from": "pairs"}}), load_source("llama"))


def test_a_depth_with_a_prefix_is_refused(fold, load_source):
    recipe = {"fold": {"loops": 2}, "relax": {"type": "prefix", "length": 2}}
    with pytest.raises(HealError, match=r"attend to tokens alone are required \(depth 0 has a prefix\)"):
        objective().check(fold("llama", recipe), load_source("llama"))
