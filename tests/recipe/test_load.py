import time
from pathlib import Path

import pytest

from refold.errors import RecipeError
from refold.recipe.heal import HealStage
from refold.recipe.load import built_in_recipes, load_recipe
from refold.recipe.recipe import LoraRelax, RankShare, Recipe


def test_nothing_and_an_empty_file_are_the_empty_recipe(tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    assert load_recipe() == load_recipe({}) == load_recipe(empty) == load_recipe(str(empty)) == Recipe()


def test_built_ins_load_and_describe_themselves():
    described = built_in_recipes()
    folds = {"recursive", "relaxed", "joint", "pruned", "scratch"}
    mixers = {"retnet", "striped-mamba", "mamba2", "gla", "gated-deltanet", "linear-attention", "hybrid"}
    assert set(described) == folds | mixers | {"lowrank", "compact", "narrow", "recursive-gguf", "pruned-gguf"}
    assert all(described.values())


def test_a_file_and_overrides_go_through_the_same_model(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("fold: {loops: 2}\nheal:\n  - {tokens: 20M, learning_rate: 5e-4}\n")
    overrides = ["fold.loops=3", "relax.rank={parameters: 0.1}", "heal.0.context=256", "fold.init=[0, 2]"]
    recipe = load_recipe(file, overrides)
    assert recipe.fold is not None
    assert (recipe.fold.loops, recipe.fold.init) == (3, (0, 2))
    assert recipe.relax == LoraRelax(rank=RankShare(parameters=0.1))
    assert recipe.heal == (HealStage(tokens=20_000_000, learning_rate=5e-4, context=256),)


def test_an_override_of_null_removes_a_section():
    assert load_recipe("relaxed", ["relax=null"]).relax is None


def test_a_recipe_survives_its_own_dump():
    for name in built_in_recipes():
        resolved = load_recipe(name).resolved()
        assert type(resolved).model_validate_json(resolved.model_dump_json()) == resolved
        assert load_recipe(resolved).resolved() == resolved


@pytest.mark.parametrize(
    ("fold", "relax", "weights", "inits"),
    [
        ({}, None, "source", ("stepwise", None)),
        ({}, {"rank": 4}, "source", ("average", "svd")),
        ({}, {"rank": 4, "init": "zero"}, "source", ("stepwise", "zero")),
        ({}, {"rank": 4, "init": "joint"}, "source", ("average", "joint")),
        ({}, {"rank": 0}, "source", ("stepwise", "zero")),
        ({"init": "stepwise"}, {"rank": 4}, "source", ("stepwise", "zero")),
        ({"init": "stepwise"}, {"rank": 4, "init": "svd"}, "source", ("stepwise", "svd")),
        ({"init": "lower"}, {"rank": 4}, "source", ("lower", "svd")),
        ({"init": "random"}, {"rank": 4}, "source", ("random", "zero")),
        ({}, {"rank": 4}, "fresh", ("stepwise", "zero")),
    ],
)
def test_defaults_are_the_recommended_pairs(fold, relax, weights, inits):
    sections = {"fold": {"loops": 2, **fold}, "weights": weights, **({"relax": relax} if relax else {})}
    resolved = load_recipe(sections).resolved()
    assert resolved.fold is not None
    assert resolved.relax is None or isinstance(resolved.relax, LoraRelax)
    assert (resolved.fold.init, resolved.relax.init if resolved.relax else None) == inits


MISTAKES = [
    ({"fold": {"loop": 2}}, r"fold\.loop: unknown key; did you mean 'loops'\?"),
    ({"folds": {"loops": 2}}, r"recipe: .*folds: unknown key; did you mean 'fold'\?"),
    ({"batch_tokens": 512}, r"batch_tokens: unknown key; did you mean 'heal\.batch_tokens'\?"),
    ({"context": 512}, r"context: unknown key; did you mean 'calibration\.context' or 'heal\.context'\?"),
    (
        {"serving": []},
        r"serving: unknown key; must be one of calibration, description, drop, dtype, exits, factor, fold, heal",
    ),
    ({"fold": {}}, r"fold: exactly one of loops, groups is required \(got none\)"),
    ({"fold": 3}, r"fold: must be a mapping \(got 3\)"),
    ({"fold": {"loops": 0}}, r"fold\.loops: must be at least 1 \(got 0\)"),
    ({"fold": {"loops": "2"}}, r"fold\.loops: must be a whole number \(got '2'\)"),
    ({"fold": {"loops": True}}, r"fold\.loops: must be a whole number \(got True\)"),
    (
        {"fold": {"loops": 2, "pattern": "cycl"}},
        r"pattern: must be one of cycle, .* \(got 'cycl'\); did you mean 'cycle'",
    ),
    ({"fold": {"loops": 2, "init": "stepwis"}}, r"fold\.init: must be one of .*; did you mean 'stepwise'"),
    ({"fold": {"loops": 2, "init": 5}}, r"fold\.init: must be text or a list \(got 5\)"),
    ({"fold": {"loops": 2, "init": []}}, r"fold\.init: must not be empty"),
    ({"fold": {"loops": 2, "init": [0, -1]}}, r"fold\.init\[1\]: must be at least 0 \(got -1\)"),
    ({"fold": {"loops": 2, "tie": []}}, r"fold\.tie: must not be empty"),
    ({"fold": {"loops": 2, "tie": ["mlp", "mlp"]}}, r"fold\.tie: each entry must occur once \(got 'mlp' 2 times\)"),
    ({"relax": {}}, r"relax\.rank: required"),
    (
        {"relax": {"type": "prefix", "length": 3, "rank": 3}},
        r"relax\.rank: unknown key; must be one of at, gain, length",
    ),
    ({"relax": {"rank": -1}}, r"relax\.rank: must be at least 0 \(got -1\)"),
    ({"relax": {"rank": "half"}}, r"relax\.rank: must be full or a whole number \(got 'half'\)"),
    ({"relax": {"rank": {"mlp": "ful"}}}, r"relax\.rank\.mlp: must be full or a whole number .*; did you mean 'full'"),
    ({"relax": {"rank": {"parameters": 0}}}, r"relax\.rank\.parameters: must be above 0 \(got 0\)"),
    (
        {"relax": {"rank": {"parameters": 0.1, "mlp": 3}}},
        r"relax\.rank\.mlp: unknown key; .* energy, parameters, split",
    ),
    ({"relax": {"rank": {}}}, r"relax\.rank: must not be empty"),
    ({"drop": {"block": {}}}, r"drop\.block: exactly one of count, share, layers, parameters is required \(got none\)"),
    ({"drop": {"mlp": {"count": 1, "share": 0.5}}}, r"drop\.mlp: exactly one of count, share, layers .*count, share"),
    ({"drop": {"mlp": {"parameters": "3M"}}}, r"drop\.mlp\.parameters: unknown key"),
    ({"drop": {"block": {"share": 1.5}}}, r"drop\.block\.share: must be at most 1 \(got 1\.5\)"),
    ({"drop": {"block": {"share": True}}}, r"drop\.block\.share: must be a number \(got true\)"),
    ({"drop": {"block": {"count": 1, "by": "size"}}}, r"drop\.block\.by: must be .*similarity.* \(got 'size'\)"),
    ({"exits": {"at": "loop"}}, r"exits\.at: must be loops or a list \(got 'loop'\); did you mean 'loops'"),
    ({"exits": {"at": [1, 1]}}, r"exits\.at: each entry must occur once"),
    ({"ignore_tensors": [{"name": "x"}]}, r"ignore_tensors\[0\]\.reason: required"),
    ({"ignore_tensors": [{"name": "x", "reason": ""}]}, r"ignore_tensors\[0\]\.reason: must not be empty"),
    ({"heal": {"tokens": 1}}, r"heal: must be a list"),
    ({"heal": [{"tokens": "20MB"}]}, r"heal\[0\]\.tokens: must be a whole number such as"),
    ({"heal": [{"tokens": 1, "learning_rate": 0}]}, r"heal\[0\]\.learning_rate: must be above 0"),
    ({"heal": [{"tokens": 1, "learning_rate": "fast"}]}, r"heal\[0\]\.learning_rate: must be a number \(got 'fast'\)"),
    ({"heal": [{"tokens": 1, "weight_decay": float("nan")}]}, r"weight_decay: must be a finite number \(got nan\)"),
    (
        {"heal": [{"tokens": 1, "objective": {"distil": {"cross_entropy": 0, "divergence_weight": 0}}}]},
        r"heal\[0\]\.objective\.distil: cross_entropy and divergence_weight: at least one above 0",
    ),
    (
        {"heal": [{"tokens": 1, "objective": {"next_token": {"temperature": 2}}}]},
        r"heal\[0\]\.objective\.next_token\.temperature: unknown key",
    ),
    (
        {"heal": [{"tokens": 1, "objective": {"distil": {"top_k": 8, "divergence": "reverse_kl"}}}]},
        r"top_k: requires divergence forward_kl \(got reverse_kl\)",
    ),
    (
        {"heal": [{"tokens": 1, "objective": {"distil": {"top_k": 8, "temperature": 2}}}]},
        r"top_k: requires temperature 1 \(got 2\)",
    ),
    ({"heal": [{"tokens": 1, "objective": "distill"}]}, r"objective\.distill: unknown key; did you mean 'distil'"),
    ({"heal": [{"tokens": 1, "objective": {}}]}, r"objective: at least one of next_token, distil, .* \(got none\)"),
    ({"heal": [{"tokens": 1, "thaw": {"when": "share"}}]}, r"thaw\.latest: a share below 1 is required .* \(got 1\)"),
    ({"heal": {"protocol": "distill", "tokens": 1}}, r"heal: protocol must be one of .* did you mean 'distil'"),
    ({"heal": {"protocol": "distil"}}, r"heal: protocol distil: requires `tokens`, such as 20M \(got None\)"),
    ({"seed": "2024-13-45"}, r"seed: must be a whole number \(got '2024-13-45'\)"),
    ({"seed": 2**63}, r"seed: must be at most 9223372036854775807"),
    ({"mixers": [{"type": ["mamba"]}]}, r"mixers\[0\]: type: must be one of .* \(got \['mamba'\]\)"),
    ({"heal": {"protocol": {"a": 1}, "tokens": 1}}, r"heal: protocol must be one of .* \(got {'a': 1}\)"),
    ({"heal": [{"tokens": "1e99"}]}, r"heal\[0\]\.tokens: must be at most 9223372036854775807 \(got '1e99'\)"),
]


@pytest.mark.parametrize(("sections", "message"), MISTAKES, ids=lambda each: str(each)[:70])
def test_a_mistake_is_named_with_its_key_path(sections, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(sections)


def test_a_key_of_a_file_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("1: 2\n")
    with pytest.raises(RecipeError, match=r"\[1\]: keys should be strings"):
        load_recipe(file)


def test_a_list_of_wrong_entries_is_not_called_empty():
    with pytest.raises(RecipeError) as caught:
        load_recipe({"factor": {"ranks": {"q_proj": [0, 0]}}})
    assert "q_proj[1]: must be at least 1 (got 0)" in str(caught.value)
    assert "empty" not in str(caught.value)
    with pytest.raises(RecipeError, match="q_proj: must not be empty"):
        load_recipe({"factor": {"ranks": {"q_proj": []}}})


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(RecipeError) as caught:
        load_recipe({"fold": {"loop": 2, "init": "x"}, "heal": [{}]}, ["seed=-1"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "recipe: 4 mistakes"
    assert [line.strip().split(":")[0] for line in lines[1:]] == [
        "seed",
        "fold.init",
        "fold.loop",
        "heal[0].tokens",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold: {loops: 2\n", r"bad\.yaml, line 2: valid YAML is required"),
        ("fold:\n  loops: 2\n  loops: 3\n", r"bad\.yaml, line 3: .*key 'loops' stands twice \(first in line 2\)"),
        ("- fold\n", r"bad\.yaml: a mapping of sections is required \(got a list\)"),
        ("relaxed\n", r"bad\.yaml: a mapping of sections is required \(got text\)"),
        ("fold: !!python/object:os.system {}\n", r"bad\.yaml, line 1: valid YAML is required"),
        ("fold: \x07\n", r"bad\.yaml: valid YAML is required"),
        ("? [a]\n: b\n", r"line 1: .*a key must be text \(got a list or a mapping\)"),
        ("seed: !!int abc\n", r"line 1: .*a whole number is required \(got 'abc'\)"),
        ("seed: 0x_\n", r"line 1: .*a whole number is required \(got '0x_'\)"),
        ("seed: !!float abc\n", r"a number is required \(got 'abc'\)"),
        ("seed: !!bool maybe\n", r"true or false is required \(got 'maybe'\)"),
        ("seed: !!timestamp 2024-01-01\n", r"could not determine a constructor"),
        ("seed: " + "9" * 5000, r"a number must have at most 40 digits \(got 5,000\)"),
        ("seed: 99999999999999999999\n", r"a whole number must be at most 9223372036854775807"),
        ("fold: " + "[" * 3000, r"must be at most 50 levels deep"),
        ("fold: &a [*a]\n", r"an anchor must not hold an alias of itself"),
        ("<<: 1\n", r"a mapping, or a list of mappings, is required after `<<`"),
        ("fold: {<<: [1]}\n", r"a mapping, or a list of mappings, is required after `<<`"),
        ('description: "\\ud800"\n', r"Unicode text is required \(got half a surrogate pair\)"),
        ('description: "\\UFFFFFFFF"\n', r"an escape or a directive is out of range"),
        ("relax:\n  rank: {energy:0.5}\n", r"line 2: .*a blank is required after the colon .*write 'energy: 0\.5'"),
        ("fold:\n  loops:2\n", r"fold: must be a mapping \(got 'loops:2'\); write a blank after the colon"),
        ("x: " + "a" * 2_000_000, r"must be at most 1,048,576 characters"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)


def test_what_is_no_file_and_no_built_in_is_refused(tmp_path):
    with pytest.raises(
        RecipeError, match=r"must be one of .*joint, .*pruned, .* path of a YAML file .*did you mean 'relaxed'"
    ):
        load_recipe("relaxd")
    with pytest.raises(RecipeError, match=r"missing\.yaml: a readable YAML file is required \(No such file"):
        load_recipe("missing.yaml")
    with pytest.raises(RecipeError, match=r"a readable YAML file is required \(Is a directory\)"):
        load_recipe(tmp_path)
    file = Path(tmp_path) / "latin.yaml"
    file.write_bytes(b"description: caf\xe9\n")
    with pytest.raises(RecipeError, match="UTF-8 text is required"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fold.loops"], r"--set fold\.loops: `key\.path=value` is required"),
        (["=3"], r"--set =3: `key\.path=value` is required"),
        (["fold..loops=3"], r"`key\.path=value` is required"),
        (["fold.loops={"], r"--set fold\.loops=\{, line 1: valid YAML is required"),
        (["relax.rank=3", "relax.rank.mlp=4"], r"relax\.rank must be a mapping to hold 'mlp' \(got 3\)"),
        (["heal.1.tokens=4"], r"heal is a list of 1; an index below that is required \(got '1'\)"),
        (["heal.first.tokens=4"], r"heal\[0\]\.first: unknown key"),
        (["heal=[]", "heal.tokens=4"], r"heal is a list of 0; an index below that is required \(got 'tokens'\)"),
        (["fold.loop=3"], r"fold\.loop: unknown key; did you mean 'loops'"),
        (
            ["heal={protocol: xatl, tokens: 1k}", "heal.0.context=64"],
            "heal has no numbered entries; drop the '0' to set",
        ),
        (["mixers.0.type=gla"], "mixers has no numbered entries; set it as a whole"),
    ],
)
def test_a_wrong_override_is_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("relaxed", overrides)


LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
)


def test_aliases_are_counted_as_often_as_they_are_used(tmp_path):
    file = tmp_path / "laughs.yaml"
    file.write_text(LAUGHS)
    began = time.process_time()
    with pytest.raises(RecipeError, match=r"line 5: .*must hold at most 20,000 values") as caught:
        load_recipe(file)
    assert time.process_time() - began < 5
    assert len(str(caught.value)) < 500


def test_values_are_repeated_shortly(tmp_path):
    file = tmp_path / "long.yaml"
    file.write_text(LAUGHS.replace("\n", "\n", 1).split("\na4")[0] + "\nfold: *a3\nseed: " + "x" * 9000)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert max(map(len, str(caught.value).splitlines())) < 500
    with pytest.raises(RecipeError) as caught:
        load_recipe({}, ["fold.loops=" + "x" * 9000])
    assert len(str(caught.value)) < 500
    with pytest.raises(RecipeError, match=r"the path must have at most 50 keys"):
        load_recipe({}, [".".join("a" * 9000) + "=1"])
    with pytest.raises(RecipeError, match=r"an index below that is required"):
        load_recipe({"heal": [{"tokens": 1}]}, [f"heal.{'1' * 5000}.tokens=1"])


def test_many_mistakes_end_with_their_number(tmp_path):
    with pytest.raises(RecipeError, match=r"\.\.\. and 70 more$"):
        load_recipe({f"key{n}": 1 for n in range(100)})


def test_merge_keys_are_read_and_own_keys_win(tmp_path):
    file = tmp_path / "merged.yaml"
    file.write_text(
        "heal:\n  - &first {tokens: 10M, seed: 3}\n  - &second {<<: *first, seed: 4}\n"
        "  - {<<: [{seed: 9}, *second], tokens: 1k}\n"
    )
    assert [(stage.tokens, stage.seed) for stage in load_recipe(file).heal] == [(10**7, 3), (10**7, 4), (1000, 9)]


def test_a_key_of_a_list_counts_for_every_entry():
    stages = load_recipe({"heal": [{"tokens": 10}, {"tokens": 20, "warmup": 0.5}]}, ["heal.warmup=0.1"]).heal
    assert [(stage.tokens, stage.warmup) for stage in stages] == [(10, 0.1), (20, 0.1)]
    first, second = load_recipe({"heal": [{"tokens": 10}, {"tokens": 20}]}, ["heal.1.warmup=0.3"]).heal
    assert (first.warmup, second.warmup) == (None, 0.3)
