"""`refold serve` under probes, a crowd and full load.

    python benchmarks/server.py --write docs/results/server.md
    python benchmarks/server.py --model MODEL --text TEXT --fold --write docs/results/server.md

The soak serves a fold of the model with two further sets of adapters (`--fold`), else the model. Probes and throughput
serve the model. Parts that an earlier run with the same `--work` has measured stay on the page. The clients are one
process, which needs a core besides those of the server (`--threads`).
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from launched_server import LaunchedServer
from page import Page, Target, commit
from probes import KEY, QUEUE_LIMIT, SOURCE, Probed, probe_table, run_probes
from server_page import soak_section, start_section, throughput_section
from server_throughput import compare, make_batch, offline_engine
from soak import Sample, get_json, soak
from traffic import CHAT, Traffic
from workplace import workplace

from refold.checkpoint.locate import locate

PARTS = ("probes", "soak", "throughput")
SHIPPED = Path(__file__).resolve().parent.parent / "refold" / "shipped" / "stdlib-5m"
TEXT = Path(argparse.__file__)
"""Text that is there wherever Python is."""
MOST_CHARACTERS = 2_000_000
ROWS = 32
TEMPLATE = "{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}assistant:"
FOLD: dict[str, Any] = {"fold": {"loops": 2, "init": "average"}, "relax": {"rank": 16, "init": "svd"}}
ADAPTERS = ("first", "second")


class Folder(NamedTuple):
    """A model that is served.

    Attributes:
        place: Its folder.
        adapters: Folders of further adapters by name.
    """

    place: Path
    adapters: dict[str, Path]

    @property
    def arguments(self) -> list[str]:
        """Arguments of `refold serve`."""
        return [str(self.place), *(f"--adapters={name}={place}" for name, place in self.adapters.items())]


def main() -> int:
    options = read_options()
    with workplace(options.work) as work:
        measure(options, work)
        page = Page("refold serve", options.seed)
        notes = []
        for part in PARTS:
            if (found := work / f"{part}.json").exists():
                kept = json.loads(found.read_text())
                page.targets += [Target(**each) for each in kept["targets"]]
                page.sections(kept["sections"])
                notes.append(f"{part}: {kept['note']}")
        page.section("Runs", "Each part is a run of its own. " + "; ".join(notes) + ".")
        return min(1, page.finish(options.write))


def measure(options: argparse.Namespace, work: Path) -> None:
    """Runs the parts that are asked for, and keeps the results of each in a file."""
    text = read_text(options.text)
    model = Folder(with_template(options.model, work / "model"), {})
    for part in options.parts:
        page, load = Page(part, options.seed), os.getloadavg()[0]
        if part == "probes":
            measure_probes(page, model, work, options)
        elif part == "soak":
            measure_soak(page, fold(model.place, work) if options.fold else model, text, work, options)
        else:
            measure_throughput(page, model, text, work, options)
        note = f"load average {load:.1f} before and {os.getloadavg()[0]:.1f} after, commit {commit()}"
        kept = {"sections": page.sections(), "targets": [vars(each) for each in page.targets], "note": note}
        (work / f"{part}.json").write_text(json.dumps(kept))


def read_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of a model")
    parser.add_argument("--text", type=Path, default=TEXT, help="text or parquet that prompts are cut from")
    parser.add_argument("--fold", action="store_true", help="serve a fold with adapters in the soak")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="none: only the page is written")
    parser.add_argument("--streams", type=int, default=200, help="clients of the soak at a time")
    parser.add_argument("--seconds", type=float, default=180.0, help="time of the soak")
    parser.add_argument("--requests", type=int, default=96, help="requests of a round of the throughput")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=96, help="most tokens of a prompt and of an answer")
    parser.add_argument("--rows", type=int, default=ROWS, help="answers that run at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of the engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for models, logs and results; parts in it are not lost")
    parser.add_argument("--write", type=Path, help="page to write")
    return parser.parse_args()


def measure_probes(page: Page, model: Folder, work: Path, options: argparse.Namespace) -> None:
    """Starts two servers, and asks them what other servers answer wrongly."""
    key_file, hub = work / "keys.txt", work / "no-hub"
    key_file.write_text(KEY + "\n")
    hub.mkdir(exist_ok=True)
    limits = ["--max-rows", "1", "--max-queue", str(QUEUE_LIMIT - 1), "--api-key-file", str(key_file)]
    base = [*model.arguments, "--name", "probed", "--threads", str(options.threads)]
    offline = {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    with (
        LaunchedServer(base, work / "open.log", offline) as opened,
        LaunchedServer([*base, *limits], work / "strict.log") as strict,
    ):
        start_section(page, opened)
        found = asyncio.run(_probe(opened, strict))
    page.section("Probes", f"{probe_table(found)}\n\n{SOURCE}")
    num = sum(verdict.passed for _, verdict in found)
    page.target("all probes are passed", f"{num} of {len(found)}", num == len(found))


async def _probe(opened: LaunchedServer, strict: LaunchedServer) -> Any:
    state = (await get_json(opened.address, "/state"))["models"][0]
    return await run_probes(Probed(opened, strict, state["name"], state["max_context"]))


def measure_soak(page: Page, folder: Folder, text: str, work: Path, options: argparse.Namespace) -> None:
    """Lets a crowd ask, and compares greedy answers with an engine in this process."""
    queue = ["--max-queue", str(4 * options.streams), "--max-rows", str(options.rows)]
    arguments = [*folder.arguments, "--threads", str(options.threads), *queue]
    with LaunchedServer(arguments, work / "soak.log") as server:
        names, soaked = asyncio.run(_soak(server, text, options))
    differing = compare_samples(folder, names[0], soaked.tally.samples, options)
    soak_section(page, soaked, differing, names, options.streams, server.stderr)


async def _soak(server: LaunchedServer, text: str, options: argparse.Namespace) -> Any:
    models = (await get_json(server.address, "/state"))["models"]
    names = [each["name"] for each in models]
    main = models[0]
    traffic = Traffic(options.seed, text, names, has_chat=main["has_chat"], max_context=main["max_context"])
    return names, await soak(server, traffic, options.streams, options.seconds, main)


def compare_samples(
    folder: Folder, main_name: str, samples: Sequence[Sample], options: argparse.Namespace
) -> tuple[list[str], int]:
    """Returns the differences between answers of the server and of an engine, and how many of them stand at ties."""
    from refold.engine.engine import Engine
    from refold.engine.settings import EngineSettings
    from refold.generation.sampling import Sampling

    engine = Engine(folder.place, EngineSettings(max_rows=options.rows, threads=options.threads))
    for name, place in folder.adapters.items():
        engine.add_adapters(name, place)
    prompts, settings, adapters = [], [], []
    for body in (each.body for each in samples):
        prompts.append(body.get("messages") or body["prompt"])
        passed = ("stop", "n", "presence_penalty", "frequency_penalty", "top_p")
        given = {name: body[name] for name in passed if name in body}
        settings.append(Sampling(max_new_tokens=body["max_tokens"], **given))
        adapters.append(None if body["model"] == main_name else body["model"])
    differing, num_ties = [], 0
    for sample, result in zip(samples, engine.generate(prompts, settings, adapter=adapters), strict=True):
        texts = [choice.text for choice in result.choices]
        if texts != sample.texts:
            kind = CHAT if "messages" in sample.body else "completion"
            differing.append(f"{kind}: {sample.texts!r} for {texts!r}")
            num_ties += any(choice.ties for choice in result.choices)
    return differing, num_ties


def measure_throughput(page: Page, model: Folder, text: str, work: Path, options: argparse.Namespace) -> None:
    """Answers the same requests through HTTP and in an engine, in turn."""
    from refold.modeling.load import load_tokenizer

    tokenizer = load_tokenizer(locate(str(model.place)))
    rows = 2 * options.rows
    batches = [
        make_batch(f"{options.seed} {number}", text, tokenizer, options.requests, rows, options.longest)
        for number in range(options.rounds + 1)
    ]
    settings = {"max_rows": options.rows, "threads": options.threads}
    engine = offline_engine(str(model.place), settings, work / "offline.log")
    arguments = [*model.arguments, "--name", "loaded", "--threads", str(options.threads)]
    with LaunchedServer([*arguments, "--max-rows", str(options.rows)], work / "loaded.log") as server, begun(engine):
        found = asyncio.run(compare(server, "loaded", engine, batches))
    throughput_section(page, found)


@contextlib.contextmanager
def begun(engine: Any) -> Iterator[None]:
    """Runs a contender's process as long as the context."""
    engine.begin()
    try:
        yield
    finally:
        engine.end()


def read_text(path: Path) -> str:
    """Returns the text of a file, at most the first two million characters."""
    from refold.data.corpus import open_text

    parts, length = [], 0
    for document in open_text(str(path)).documents():
        parts.append(str(document))
        length += len(parts[-1])
        if length > MOST_CHARACTERS:
            break
    return "\n".join(parts)[:MOST_CHARACTERS]


def with_template(model: Path, folder: Path) -> Path:
    """Returns a copy of a model's folder with a chat template."""
    if not folder.exists():
        folder.mkdir(parents=True)
        for each in model.iterdir():
            # Without the rights of the file, which may be read-only.
            shutil.copyfile(each, folder / each.name)
        if not (folder / "chat_template.jinja").exists():
            (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def fold(source: Path, work: Path) -> Folder:
    """Returns a relaxed fold of a model, not healed, with two further sets of adapters: LoRAs with some noise."""
    import torch

    from refold.conversion.convert import ConvertOptions, convert
    from refold.modeling.load import load_model

    folder = work / "folded"
    if not folder.exists():
        convert(source, folder, FOLD, options=ConvertOptions(allow_larger=True))
    model = load_model(folder, device="cpu")
    adapters = {}
    for seed, name in enumerate(ADAPTERS):
        generator = torch.Generator().manual_seed(seed)
        for tensor, weight in model.named_parameters():
            if ".lora." in tensor:
                noise = torch.randn(weight.shape, generator=generator) * weight.detach().float().std()
                weight.data.add_(0.3 * noise.to(weight.dtype))
        adapters[name] = work / name
        if not adapters[name].exists():
            model.save_pretrained(adapters[name])
    return Folder(folder, adapters)


if __name__ == "__main__":
    sys.exit(main())
