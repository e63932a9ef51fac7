"""Faults of a page in a browser: texts that are cut off, that overlap, or that make the page too wide."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

LOOK = """
<body style="margin: 0">FRAMES<pre id="found"></pre><script>
function look(frame) {
  const page = frame.contentDocument, width = Number(frame.width), said = [];
  page.querySelectorAll("details").forEach((box) => { box.open = true; });
  for (const svg of page.querySelectorAll("svg:not(.key)")) {
    const edge = svg.getBoundingClientRect();
    if (edge.width < 100 || svg.querySelectorAll("path, rect, polyline, circle").length < 3) said.push("empty picture");
    const boxes = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
    boxes.forEach(([name, box], index) => {
      if (box.left < edge.left || box.right > edge.right || box.top < edge.top || box.bottom > edge.bottom)
        said.push(`cut off: ${name}`);
      for (const [other, two] of boxes.slice(index + 1))
        if (box.left < two.right && two.left < box.right && box.top < two.bottom && two.top < box.bottom)
          said.push(`overlap: ${name} and ${other}`);
    });
  }
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT), range = page.createRange();
  let texts = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (!node.textContent.trim() || node.parentElement.closest(".scroll, pre, script, svg")) continue;
    texts += 1;
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (box.left < 0 || box.right > width) said.push(`beyond the page: ${node.textContent.trim()}`);
  }
  if (page.documentElement.scrollWidth > width) said.push(`page of ${page.documentElement.scrollWidth} pixels`);
  return {said, texts};
}
addEventListener("load", () => {
  const found = {};
  document.querySelectorAll("iframe").forEach((frame) => { found[frame.name] = look(frame); });
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script></body>
"""
FRAME = '<iframe name="{name}" src="{file}" width="{width}" height="9000" style="border: 0"></iframe>'


def find_browser() -> str:
    """Returns the command of Chromium; skips the test where it is not installed."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("chromium must be installed")
    return found


def look(browser: str, folder: Path, pages: dict[str, tuple[str, int]]) -> dict[str, list[str]]:
    """Opens files of a folder, each in a frame of a width, and returns the faults of their texts by file name."""
    frames = "".join(FRAME.format(name=name, file=file, width=width) for name, (file, width) in pages.items())
    (folder / "look.html").write_text(LOOK.replace("FRAMES", frames))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--dump-dom"]
    done = subprocess.run([*command, (folder / "look.html").as_uri()], capture_output=True, text=True, timeout=120)
    (found,) = re.findall(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    read = json.loads(html.unescape(found))
    assert all(each["texts"] > 20 for each in read.values())
    return {name: each["said"] for name, each in read.items()}
