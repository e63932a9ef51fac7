"""Engines whose keys and values are in attention workers: their tokens, their traffic, and the loss of a worker."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch.distributed as dist

from refold.engine.engine import Engine
from refold.engine.remote_keeper import RemoteKeeper
from refold.engine.settings import AttentionWorkers, Drafts, EngineSettings
from refold.engine.worker_process import WorkerProcesses
from refold.errors import RefoldError
from refold.generation.sampling import Sampling
from tests.engine.conftest import greedy, make_prompts, options

NAMES = ("strict", "relaxed", "window", "first keys", "gains", "prefix", "hybrid", "exits", "narrow")
"""Tied, with LoRA, windowed, with shared keys, soft-capped, with prefixes, with states beside keys, with exits, with
layers of different widths."""
BOUND = 30.0
"""Seconds within which a lost worker must be noticed."""


def short(count: int = 8) -> Sampling:
    return Sampling(max_new_tokens=count, ignore_eos=True)


def over(workers: WorkerProcesses, count: int, split: Any, **given: Any) -> AttentionWorkers:
    return AttentionWorkers(addresses=workers.addresses[:count], split=split, **given)


def run(model: Any, prompts: list[list[int]], **given: Any) -> list[list[int]]:
    with Engine(model, EngineSettings(**options(**given))) as engine:
        found = engine.generate(prompts, short())
        assert [each.choices[0].reason for each in found] == ["length"] * len(prompts)
    return [list(each.choices[0].token_ids) for each in found]


@pytest.mark.parametrize(
    ("name", "count", "split", "overlap"),
    [
        # One worker has all heads of any stack.
        *(pytest.param(name, 1, "heads", True, marks=[pytest.mark.long] * (name != "hybrid")) for name in NAMES),
        *((name, 2, "heads", False) for name in NAMES),
        *((name, 3, "rows", True) for name in NAMES),
    ],
)
def test_tokens_are_those_of_generate(load, workers, name, count, split, overlap):
    model, prompts = load(name), make_prompts((1, 5, 9, 17, 23))
    if name == "narrow" or count > model.config.read_blueprint().arch.num_key_value_heads:
        split = "rows"
    found = run(model, prompts, attention_workers=over(workers, count, split, overlap=overlap))
    assert found == [greedy(model, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("split", ["heads", "rows"])
def test_copies_of_rows_that_give_way_come_back(load, workers, split):
    model, prompts = load("strict"), make_prompts((9, 14, 17, 12))
    memory = 28 * model.config.read_blueprint().num_depths * 4 * 2 * 2 * 8 * 4
    settings = EngineSettings(
        **options(preemption="copy", memory=memory, share_prefixes=False),
        attention_workers=over(workers, 2, split),
        max_context=48,
    )
    with Engine(model, settings) as engine:
        found = engine.generate(prompts, short(24))
        assert engine.statistics().preemptions > 0
    assert [list(each.choices[0].token_ids) for each in found] == [greedy(model, prompt, 24) for prompt in prompts]


def test_drafts_and_shared_prompts_give_the_same_tokens(load, workers):
    model, prompts = load("relaxed"), [make_prompts((17,))[0]] * 4
    found = run(
        model, prompts, drafts=Drafts(tokens=3, adapt=False), attention_workers=over(workers, 2, "rows", overlap=True)
    )
    assert found == [greedy(model, prompts[0], 8)] * 4


@pytest.mark.parametrize("split", ["heads", "rows"])
def test_bytes_for_each_token_are_those_of_the_formula(load, workers, split):
    model, prompts = load("first keys"), make_prompts((5, 9))
    blueprint = model.config.read_blueprint()
    arch, item = blueprint.arch, 4
    with Engine(model, EngineSettings(**options(attention_workers=over(workers, 2, split)))) as engine:
        engine.generate(prompts, short())
        counts, traffic = engine.statistics().counts, engine.statistics().traffic
    # The last new token is not run.
    tokens = sum(map(len, prompts)) + 2 * (8 - 1)
    assert counts.launched_tokens == tokens * len(engine.passes.segments)
    made = sum(len(blueprint.made_heads(depth)) for depth in range(blueprint.num_depths))
    assert made < blueprint.num_depths * arch.num_key_value_heads
    query = blueprint.num_depths * arch.num_attention_heads * arch.head_dim * item
    assert traffic.queries == traffic.heads == tokens * query
    assert traffic.keys == tokens * 2 * made * arch.head_dim * item
    assert traffic.control > 0
    assert traffic.pages == 0


def test_an_engine_without_workers_has_no_traffic(load):
    engine = Engine(load("strict"), EngineSettings(**options()))
    engine.generate([[5, 6, 7]], short(2))
    assert engine.statistics().traffic.queries == 0


def submit(engine: Engine, prompts: list[list[int]], count: int) -> list[Any]:
    requests = [engine.prepare(prompt, short(count)) for prompt in prompts]
    for request in requests:
        engine.submit(request)
    for _ in range(6):
        engine.step()
    return requests


def finish(engine: Engine) -> float:
    began = time.monotonic()
    while engine.has_work:
        engine.step()
        assert time.monotonic() - began < BOUND
    return time.monotonic() - began


def test_a_killed_worker_ends_the_requests_whose_rows_it_held_and_no_other(load):
    model, prompts = load("strict"), make_prompts((5, 7, 9, 11, 6, 8))
    started = WorkerProcesses(2, threads=1)
    settings = options(attention_workers=AttentionWorkers(addresses=started.addresses, split="rows"))
    with Engine(model, EngineSettings(**settings)) as engine:
        requests = submit(engine, prompts, 12)
        os.kill(started.pids[1], signal.SIGKILL)
        finish(engine)
        choices = [request.choices[0] for request in requests]
        lost = [place for place, choice in enumerate(choices) if choice.reason == "error"]
        # Four rows: each worker held two of the first four sequences.
        assert len(lost) == 2
        assert set(lost) < {0, 1, 2, 3}
        for place, choice in enumerate(choices):
            expected = greedy(model, prompts[place], 12)
            if place in lost:
                assert "attention worker 2 of 2" in choice.error
                assert "others go on" in choice.error
                assert list(choice.token_ids) == expected[: len(choice.token_ids)]
            else:
                assert list(choice.token_ids) == expected
        # The engine still answers, with the worker that is left.
        assert list(engine.generate([prompts[0]], short())[0].choices[0].token_ids) == greedy(model, prompts[0], 8)
    started.close()


def test_a_killed_worker_that_held_heads_ends_all_requests(load):
    model, prompts = load("strict"), make_prompts((5, 7, 9, 11, 6))
    started = WorkerProcesses(2, threads=1)
    settings = options(attention_workers=AttentionWorkers(addresses=started.addresses))
    with Engine(model, EngineSettings(**settings)) as engine:
        requests = submit(engine, prompts, 12)
        os.kill(started.pids[0], signal.SIGKILL)
        finish(engine)
        for request in requests:
            assert request.choices[0].reason == "error"
            assert "it held head 0 of all sequences, which end" in request.choices[0].error
        with pytest.raises(RefoldError, match="living attention workers are required"):
            engine.generate([prompts[0]], short())
    started.close()


def test_a_worker_that_hangs_is_lost_after_the_timeout(load):
    started = WorkerProcesses(1, threads=1)
    workers = AttentionWorkers(addresses=started.addresses, timeout=2.0)
    with Engine(load("strict"), EngineSettings(**options(attention_workers=workers))) as engine:
        (request,) = submit(engine, [[5, 6, 7]], 12)
        os.kill(started.pids[0], signal.SIGSTOP)
        assert finish(engine) < 10
        assert "is lost" in request.choices[0].error
    os.kill(started.pids[0], signal.SIGCONT)
    started.close()


def test_workers_end_with_their_engine(load):
    engine = Engine(load("strict"), EngineSettings(**options(attention_workers=AttentionWorkers(processes=2))))
    keeper = engine._pools.keeper
    assert isinstance(keeper, RemoteKeeper)
    assert keeper._started is not None
    pids = keeper._started.pids
    (request,) = submit(engine, [[5, 6, 7]], 100)
    assert all(map(is_alive, pids))
    engine.close()
    assert not any(map(is_alive, pids))
    assert request.choices[0].reason == "cancelled"
    with pytest.raises(RefoldError, match="an open engine is required"):
        engine.generate([[5, 6]], short())


def test_workers_end_when_the_process_that_started_them_is_killed():
    code = (
        "from refold.engine.worker_process import WorkerProcesses\n"
        "import time; w = WorkerProcesses(1, threads=1, once=False); print(w.pids[0], flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + BOUND
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_different_numbers_of_heads_are_not_split_by_heads(load, workers):
    settings = EngineSettings(**options(attention_workers=over(workers, 2, "heads")))
    with pytest.raises(RefoldError, match=r"the same number of key-value heads .* \(got 1, 2, 3, 4\); split by rows"):
        Engine(load("narrow"), settings)


def test_a_worker_of_another_engine_is_refused(load, workers):
    busy = over(workers, 1, "heads", timeout=2.0)
    settings = EngineSettings(**options(attention_workers=busy))
    with Engine(load("strict"), settings), pytest.raises(RefoldError, match="serves another"):
        Engine(load("strict"), settings)
    # The worker passes over the engine that has given up.
    assert run(load("strict"), [[5, 6, 7]], attention_workers=over(workers, 1, "heads"))


def test_a_worker_refuses_a_layout_that_is_none(workers):
    host, port = workers.addresses[2].split(":")
    store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
    own = dist.PrefixStore(f"session{store.add('sessions', 1)}", store)
    own.set("device", "cpu")
    own.set("layout", "__import__('os')")
    assert b"a key layout as JSON is required" in own.get("answer")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "processes or addresses are required"),
        ({"processes": 2, "addresses": ("a:1",)}, "and not both"),
        ({"addresses": ("a:1", "a:1")}, "different addresses are required"),
        ({"processes": 1, "timeout": 0.0}, "more than 0 seconds are required"),
        ({"processes": 1, "threads": 0}, "attention_workers.threads: at least 1"),
    ],
)
def test_settings_are_checked(given, says):
    with pytest.raises(RefoldError, match=says):
        AttentionWorkers(**given)


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("strict", {"processes": 9}, "at most one for each of the 2 key-value heads"),
        ("strict", {"processes": 9, "split": "rows"}, "at most one for each of the 4 rows"),
        ("recurrent", {"processes": 1}, "a stack with attention is required"),
        ("strict", {"addresses": ("nowhere",)}, "HOST:PORT is required"),
        ("strict", {"addresses": ("127.0.0.1:9",), "timeout": 1.0}, "start it with `refold worker --address"),
    ],
)
def test_workers_that_do_not_fit_are_refused(load, name, given, says):
    with pytest.raises(RefoldError, match=says):
        Engine(load(name), EngineSettings(**options(attention_workers=AttentionWorkers(**given))))


def test_keys_on_a_device_exclude_workers():
    with pytest.raises(RefoldError, match="no attention workers are required"):
        EngineSettings(kv_device="cpu", attention_workers=AttentionWorkers(processes=1))


def test_keys_on_a_device_give_the_same_tokens(load):
    model, prompts = load("relaxed"), make_prompts((3, 8))
    assert run(model, prompts, kv_device="cpu") == [greedy(model, prompt, 8) for prompt in prompts]


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False
