"""The report in a browser without a network, wide and narrow."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import Read, everything

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from trimoe.report import build

pytestmark = pytest.mark.xdist_group("pages")  # on one worker, which makes the folders once


def opened(path: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The document as it is after a minute of a browser's time, and what its console said."""
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--enable-logging=stderr",
        "--virtual-time-budget=60000", *options, "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_it_opens_in_a_browser(made: Callable[[str], Path], tmp_path: Path) -> None:
    """No message on the console (a request would be one: the page's policy forbids all), every chart drawn, in light and in dark."""
    written = build.report([everything(made("moe-i2"), tmp_path)], tmp_path / "page.html")[0]
    count = len(json.loads(Read(written.read_text()).scripts[0][1])["specs"])
    for dark in ([], ["--blink-settings=preferredColorScheme=0"]):
        ran = opened(written, tmp_path / f"profile{len(dark)}", *dark)
        assert f'data-drawn="{count}"' in ran.stdout, ran.stderr[-2000:]
        assert ran.stdout.count("graphics-document") + ran.stdout.count("<canvas") >= count
        assert ("Light mode" if dark else "Dark mode") in ran.stdout
        assert not [said for said in ran.stderr.splitlines() if "CONSOLE" in said]


MEASURE = """<script>
(function look() {
  if (!document.documentElement.dataset.drawn) { setTimeout(look, 100); return; }
  const wrong = [];
  for (const svg of document.querySelectorAll(".chart svg.marks")) {
    const outer = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll(".role-axis-title text, .role-axis-label text, .role-legend text")) {
      const inner = text.getBoundingClientRect(), out = inner.left < outer.left - 1 || inner.right > outer.right + 1;
      if (inner.width && out) wrong.push(svg.closest(".chart").dataset.chart + ": " + text.textContent);
    }
  }
  const scrolls = [...document.querySelectorAll("table")].every((table) => table.closest(".scroll"));
  const silent = [...document.querySelectorAll("a[href], button, summary, [tabindex='0']")].filter((one) => {
    if (!one.checkVisibility()) return false;
    one.focus({ focusVisible: true });
    const ring = getComputedStyle(one);
    return document.activeElement !== one || (ring.outlineStyle === "none" && !one.matches(".skip"));
  }).map((one) => one.outerHTML.slice(0, 80));
  const mouse = [...document.querySelectorAll("main *")].filter((one) =>
    one.checkVisibility() && one.scrollWidth > one.clientWidth + 1 && ["auto", "scroll"].includes(getComputedStyle(one).overflowX) && one.tabIndex < 0
  ).map((one) => one.outerHTML.slice(0, 80));
  const first = document.querySelector("a[href], button").className;
  const found = { silent, mouse, first, wrong, scrolls, width: window.innerWidth, page: document.documentElement.scrollWidth };
  parent.document.body.append(Object.assign(parent.document.createElement("pre"), { id: "found", textContent: JSON.stringify(found) }));
})();
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_it_fits_on_a_phone(made: Callable[[str], Path], tmp_path: Path) -> None:
    """390 pixels wide: the page itself does not scroll sideways (tables and wide charts do, in themselves), and no title, label or legend of
    a chart is cut off. Everything that can be clicked or scrolled can be reached by the keyboard and shows that it was."""
    written = build.report([everything(made("naee"), tmp_path)], tmp_path / "page.html")[0].read_text()
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", written)
    frame = html.escape(page.removesuffix("</body>\n</html>") + MEASURE)  # a window has 500 pixels at least
    (tmp_path / "frame.html").write_text(f'<body><iframe srcdoc="{frame}" width="390" height="844" style="border: 0"></iframe>')
    shown = opened(tmp_path / "frame.html", tmp_path / "phone", "--hide-scrollbars").stdout
    found = json.loads(html.unescape(shown.rpartition('<pre id="found">')[2].partition("</pre>")[0]))
    assert found["width"] == 390 and found["page"] == 390 and found["scrolls"] and found["wrong"] == []
    assert found["first"] == "skip" and found["silent"] == [] and found["mouse"] == []
