"""The example page loads a folded model in Chromium and streams the text that the model writes in refold."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from refold.conversion.convert import convert
from refold.exporting.export import export
from refold.modeling.load import load_model
from refold.studies.shipped import shipped_model

pytest.importorskip("onnx")
pytestmark = pytest.mark.long

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "browser"
PROMPT = "def read_file(path):"
VISIT = """
import { createRequire } from "node:module";
const [modules, chromium_path, address, ...models] = process.argv.slice(2);
const { chromium } = createRequire(modules + "/")("playwright-core");
const browser = await chromium.launch({ executablePath: chromium_path, args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 390, height: 800 } });
const ready = () => !document.querySelector("#generate").disabled || document.querySelector("#status.failed");
const found = {};
for (const model of models) {
  await page.goto(`${address}/?model=${model}`);
  await page.waitForFunction(ready, null, { timeout: 120000 });
  if (await page.isEnabled("#generate")) {
    await page.click("#generate");
    await page.waitForFunction(() => document.getElementById("stop").disabled, null, { timeout: 200000 });
  }
  const width = await page.evaluate(() => document.documentElement.scrollWidth);
  found[model] = { text: await page.textContent("#answer"), status: await page.textContent("#status"), width };
}
await browser.close();
console.log(JSON.stringify(found));
"""


@pytest.fixture(scope="module")
def tools() -> tuple[str, Path, str]:
    """Node, a folder `node_modules` with transformers.js and playwright-core, and Chromium."""
    node, chromium = shutil.which("node"), shutil.which("chromium")
    modules = Path(os.environ.get("REFOLD_BROWSER_MODULES", ""))
    if node is None or chromium is None:
        pytest.skip("node and chromium must be installed")
    if not (modules / "@huggingface" / "transformers").is_dir() or not (modules / "playwright-core").is_dir():
        pytest.skip(
            "REFOLD_BROWSER_MODULES must name a node_modules folder with @huggingface/transformers, playwright-core"
        )
    return node, modules, chromium


@pytest.fixture
def site(tools, tmp_path) -> Iterator[tuple[Path, str]]:
    """The example with its packages, and the address where it is served."""
    folder = tmp_path / "site"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules", "model*"))
    (folder / "node_modules").symlink_to(tools[1])

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_page_streams_the_text_of_a_folded_model(tools, site, tmp_path):
    (folder, address), folded = site, tmp_path / "folded"
    convert(shipped_model(), folded, {"fold": {"loops": 2}})
    export(folded, folder / "model_float", "onnx", dtype="float32")
    for name in ("int8", "int4"):
        export(folded, folder / f"model_{name}", "onnx", quantise=name)
    script = tmp_path / "visit.mjs"
    script.write_text(VISIT)
    models = ["model_float", "model_int8", "model_int4", "missing"]
    command = [tools[0], str(script), str(tools[1]), tools[2], address, *models]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(folded)
    model: Any = load_model(folded, dtype=torch.float32)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    tokens = model.generate(prompt, max_new_tokens=64, do_sample=False)[0]
    assert found["model_float"]["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    for name in models[:3]:
        assert found[name]["text"].startswith(PROMPT)
        assert len(found[name]["text"]) > len(PROMPT) + 20, found[name]
        assert "tokens/s" in found[name]["status"]
        assert found[name]["width"] <= 390
    assert "cannot be loaded" in found["missing"]["status"]
