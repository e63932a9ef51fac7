"""Segments of a stack: cuts at exits and loop borders, and segments that can share a launch."""

import pytest

from refold.blueprint.passes import describe_passes, find_passes, last_writing_depth
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe


def build(arch, **sections):
    return build_blueprint(arch, load_recipe(sections)).blueprint


def borders(passes):
    return [(each.depths.start, each.depths.stop, each.kind, each.is_exit) for each in passes.segments]


def test_a_source_is_one_segment(make_arch):
    assert borders(find_passes(build(make_arch(4)))) == [(0, 4, 0, False)]


def test_loops_of_one_block_are_of_one_kind(make_arch):
    passes = find_passes(build(make_arch(6), fold={"loops": 3}))
    assert borders(passes) == [(0, 2, 0, False), (2, 4, 0, False), (4, 6, 0, False)]
    assert (passes.period, passes.start, passes.num_loops) == (2, 0, 3)
    assert [passes.name(each) for each in passes.segments] == ["loop 1", "loop 2", "loop 3"]


def test_loras_and_vectors_do_not_part_loops(make_arch):
    blueprint = build(make_arch(4), fold={"loops": 2, "init": "average"}, relax={"rank": 3, "vectors": "own"})
    assert borders(find_passes(blueprint)) == [(0, 2, 0, False), (2, 4, 0, False)]


def test_prelude_and_coda_are_segments_of_their_own(make_arch):
    passes = find_passes(build(make_arch(6), fold={"loops": 2, "prelude": 1, "coda": 1}))
    assert borders(passes) == [(0, 1, 0, False), (1, 3, 1, False), (3, 5, 1, False), (5, 6, 2, False)]
    assert [passes.name(each) for each in passes.segments] == ["prelude", "loop 1", "loop 2", "coda"]


def test_a_cut_inside_one_loop_is_made_in_every_loop(make_arch):
    passes = find_passes(build(make_arch(8), fold={"loops": 2}, exits={"at": [1, 3]}))
    assert borders(passes) == [(0, 2, 0, True), (2, 4, 1, True), (4, 6, 0, False), (6, 8, 1, False)]
    assert [len(each) for each in passes.shared_kinds().values()] == [2, 2]


def test_keys_of_the_first_loop_part_the_loops(make_arch):
    blueprint = build(make_arch(4), fold={"loops": 2}, share_kv={"from": "first_loop"})
    assert borders(find_passes(blueprint)) == [(0, 4, 0, False)]
    assert last_writing_depth(blueprint) == 1


def test_every_depth_keeps_keys_without_sharing(make_arch):
    assert last_writing_depth(build(make_arch(4), fold={"loops": 2})) == 3


def test_the_last_depth_without_attention_keeps_none(make_arch):
    blueprint = build(make_arch(4), drop={"attention": {"layers": [3]}})
    assert last_writing_depth(blueprint) == 2


def test_neighbours_that_are_tied_do_not_loop(make_arch):
    blueprint = build(make_arch(6), fold={"loops": 2, "pattern": "sequence"})
    assert len(find_passes(blueprint).segments) == 1


@pytest.mark.parametrize(("depth", "expected"), [(3, [(0, 2), (2, 3)]), (2, [(0, 2)]), (1, [(0, 1)])])
def test_a_stack_that_is_left_early_ends_there(make_arch, depth, expected):
    passes = find_passes(build(make_arch(4), fold={"loops": 2}, exits={}), depth)
    assert [(each.depths.start, each.depths.stop) for each in passes.segments] == expected


def test_a_further_cut(make_arch):
    assert borders(find_passes(build(make_arch(4)), cut_at=3)) == [(0, 3, 0, False), (3, 4, 1, False)]


def test_a_stack_can_be_left_whole(make_arch):
    blueprint = build(make_arch(6), fold={"loops": 3}, exits={})
    assert borders(find_passes(blueprint, whole=True)) == [(0, 6, 0, False)]
    assert borders(find_passes(blueprint, cut_at=2, whole=True)) == [(0, 2, 0, False), (2, 6, 1, False)]


def test_passes_in_words(make_arch):
    told = describe_passes(build(make_arch(4), fold={"loops": 2}, exits={}))
    assert told == (
        "loop 1: depths 0..1, then an exit; shares launches with 2..3",
        "loop 2: depths 2..3; shares launches with 0..1",
    )
