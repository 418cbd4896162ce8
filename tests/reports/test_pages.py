"""A report's pages: what stands in them, and how they look in a browser."""

from __future__ import annotations

import html
import importlib
import importlib.util
import os
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.records import Agreement, Parity
from reports import layouts
from reports.contention import contention
from reports.document import Check, Device, Gate, Report
from reports.pages import escape_markdown, file_names, list_gaps, write_pages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REQUIRE_BROWSER = "CONVNEXT_EDGE_REQUIRE_BROWSER"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LAUNCH_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def _index(report: Report, folder: Path) -> str:
    return write_pages(report, folder)[0].read_text(encoding="utf-8")


def _reasons(report: Report) -> set[str]:
    found = {row.accuracy.reason for row in report.artifacts}
    found |= {latency.reason for row in report.artifacts for latency in row.latency}
    return {reason for reason in found if reason}


def test_writes_index_and_one_page_per_device(full_report: Report, tmp_path: Path) -> None:
    files = write_pages(full_report, tmp_path / "pages")
    assert [file.name for file in files] == ["index.html", "local.md", "edge-box-arm64-rack-3.md"]
    assert sorted(files) == sorted((tmp_path / "pages").iterdir())


@pytest.mark.parametrize("which", ["full_report", "poor_report"])
def test_every_reason_appears_escaped(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    report: Report = request.getfixturevalue(which)
    page = _index(report, tmp_path)
    assert _reasons(report)
    for reason in _reasons(report):
        assert str(_escape(reason)) in page
    # Both of these reasons hold markup, and neither may come through as it is.
    assert "<Core ML>" not in page
    assert "--eval <folder>" not in page


def _escape(text: str) -> str:
    """Escape as the pages do: numeric entities for quotes."""
    return html.escape(text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")


def test_nothing_from_a_report_becomes_markup(full_report: Report, tmp_path: Path) -> None:
    row = full_report.artifacts[0].model_copy(
        update={
            "runtime": "<script>r</script>",
            "placement": '"><img src=x onerror=a>',
            "graph_form": "$\\x$",
        }
    )
    rows = (row, row.model_copy(update={"scheme": "w8a8"}), *full_report.artifacts[1:])
    report = full_report.model_copy(update={"artifacts": rows})
    page = _index(report, tmp_path)
    assert "<script" not in page
    assert "<img" not in page
    assert "artifacts/&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;/tflite.tflite" in page


@pytest.mark.parametrize("which", ["full_report", "poor_report"])
def test_the_page_stands_alone(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    files = write_pages(request.getfixturevalue(which), tmp_path)
    page = files[0].read_text(encoding="utf-8")
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    references = re.findall(r"""(?:href|src)\s*=\s*["']?([^"'\s>]+)""", page)
    references += re.findall(r"url\(([^)]*)\)", page)
    beside = {file.name for file in files}
    assert all(one.startswith("#") or one == "data:," or one in beside for one in references)


def test_every_device_s_page_is_linked(full_report: Report, tmp_path: Path) -> None:
    files = write_pages(full_report, tmp_path)
    page = files[0].read_text(encoding="utf-8")
    names = [file.name for file in files if file.suffix == ".md"]
    assert names
    assert all(f'<a href="{name}">' in page for name in names)


def test_what_devices_compute_is_on_the_page(full_report: Report, tmp_path: Path) -> None:
    saturating = Parity(
        device="board", runtime="onnx", scheme="w8a8", outcome="measured", against="reference",
        n=100, top1_agreement=0.97, max_abs_logit_diff=0.5, diff_over_error=2.43,
    )  # fmt: skip
    away = replace(saturating, device="phone", outcome="not_run", reason="it is <away>")
    assert "Do devices agree" not in _index(full_report, tmp_path)
    report = full_report.model_copy(update={"parity": (saturating, away)})
    page = _index(report, tmp_path)
    section = page[page.index("Do devices agree") :].partition("<h2>")[0]
    assert "97.00 %" in section
    assert '<span class="tag warn">2.43</span>' in section
    assert "not run: it is &lt;away&gt;" in section
    # One of which nothing but outputs is known has a page too.
    assert '<a href="board.md">' in page
    assert "97.00 %" in (tmp_path / "board.md").read_text(encoding="utf-8")


def test_identifiers_are_unique_and_references_resolve(full_report: Report, tmp_path: Path) -> None:
    page = _index(full_report, tmp_path)
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', page)) <= set(identifiers)


def test_the_same_report_gives_the_same_bytes(full_report: Report, tmp_path: Path) -> None:
    again = Report.model_validate_json(full_report.model_dump_json(by_alias=True))
    first = [file.read_bytes() for file in write_pages(full_report, tmp_path / "a")]
    assert [file.read_bytes() for file in write_pages(again, tmp_path / "b")] == first


def test_no_placeholder_colour_is_left(full_report: Report, tmp_path: Path) -> None:
    page = _index(full_report, tmp_path)
    assert "#0102" not in page
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert not re.search(r"#[0-9a-f]{6}\b", " ".join(svgs))


@pytest.mark.parametrize(
    ("outcome", "word"),
    [("pass", "pass"), ("fail", "fail"), ("inconclusive", "inconclusive"), ("not_run", "not run")],
)
def test_the_gate_s_word_is_in_the_header(
    outcome: Any, word: str, full_report: Report, tmp_path: Path
) -> None:
    gate = Gate(outcome=outcome, checks=full_report.gate.checks)
    page = _index(full_report.model_copy(update={"gate": gate}), tmp_path)
    assert f"<b>{word}</b>" in page[: page.index("</header>")]


def test_a_pass_with_checks_that_were_not_run_says_so(full_report: Report, tmp_path: Path) -> None:
    one = Check(name="a", outcome="pass", value=1.0, limit=2.0, why="")
    missing = Check(name="b", outcome="not_run", value=None, limit=2.0, why="it is away")
    page = _index(
        full_report.model_copy(update={"gate": Gate(outcome="pass", checks=(one, missing))}),
        tmp_path,
    )
    head = page[: page.index("</header>")]
    assert "1 of 2 checks were not run; all others pass." in head
    assert "Every check" not in head
    gate = Gate(outcome="pass", checks=(one,))
    page = _index(full_report.model_copy(update={"gate": gate}), tmp_path)
    assert "Every check of the budget passes." in page[: page.index("</header>")]


def test_disturbed_times_are_warned_of_above_the_charts(
    full_report: Report, poor_report: Report, tmp_path: Path
) -> None:
    above = _index(full_report, tmp_path).partition("Do the runtimes agree?")[0]
    assert re.search(r"while \d+ of \d+ latencies were taken", above)
    assert "--again" not in _index(poor_report, tmp_path)


def test_missing_is_a_dash_and_never_zero(poor_report: Report, tmp_path: Path) -> None:
    page = _index(poor_report, tmp_path)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page, flags=re.DOTALL)
    texts = [" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in cells]
    assert texts
    assert not [text for text in texts if re.fullmatch(r"[+−-]?0(\.0+)?( ?(%|ms|MB|dB|×))?", text)]
    assert "<dt>Float top-1</dt><dd>—</dd>" in page
    assert sum(text.startswith("—") for text in texts) >= len(poor_report.artifacts) * 3


def test_an_empty_chart_says_why(poor_report: Report, tmp_path: Path) -> None:
    page = _index(poor_report, tmp_path)
    assert "No accuracy was measured: no labelled images: pass --eval &lt;folder&gt;" in page
    assert "Nothing was timed here: --no-bench was given" in page
    assert "No two w8a8 artifacts were run on the same images" in page


def test_a_report_without_latency_rows_or_artifacts(poor_report: Report, tmp_path: Path) -> None:
    rows = tuple(row.model_copy(update={"latency": ()}) for row in poor_report.artifacts)
    files = write_pages(poor_report.model_copy(update={"artifacts": rows}), tmp_path / "a")
    assert [file.name for file in files] == ["index.html"]
    assert "this run timed nothing" in files[0].read_text(encoding="utf-8")
    bare = _index(poor_report.model_copy(update={"artifacts": ()}), tmp_path / "b")
    assert "The report holds no artifact." in bare


@pytest.mark.parametrize(
    ("kept", "axis"), [("sqnr_db", "SQNR, dB"), ("agreement_with_float", "agreement with float, %")]
)
def test_the_scatter_falls_back_without_top1(
    kept: str, axis: str, full_report: Report, tmp_path: Path
) -> None:
    rows = []
    for row in full_report.artifacts:
        data = row.model_dump()
        missing = {"top1", "drop_pp", "drop_ci95_pp", "sqnr_db", "agreement_with_float"} - {kept}
        data["accuracy"] |= dict.fromkeys(missing)
        rows.append(type(row).model_validate(data))
    page = _index(full_report.model_copy(update={"artifacts": tuple(rows)}), tmp_path)
    assert axis in page
    assert "No top-1 was measured, so this shows" in page


def test_what_was_interpreted_is_said(full_report: Report, tmp_path: Path) -> None:
    assert "interpreted" not in _index(full_report, tmp_path / "host")
    rows = [
        row.model_copy(update={"accuracy": replace(row.accuracy, kind="interpreted")})
        if row.runtime == "tflite"
        else row
        for row in full_report.artifacts
    ]
    pairs = [
        replace(pair, kind="interpreted") if "tflite" in {pair.a, pair.b} else pair
        for pair in full_report.agreement
    ]
    changed = {"artifacts": tuple(rows), "agreement": tuple(pairs)}
    page = _index(full_report.model_copy(update=changed), tmp_path / "interpreted")
    of_tflite = sum(pair.kind == "interpreted" for pair in pairs)
    assert page.count('<small class="why">interpreted</small>') == 2 + of_tflite
    assert "What is interpreted was computed from the artifact's own program" in page


def test_few_samples_explain_a_missing_p90(full_report: Report, tmp_path: Path) -> None:
    page = _index(full_report, tmp_path)
    assert "fewer than 64 samples say nothing about p90" in page


def test_gaps_are_grouped_by_reason_and_failures_lead(full_report: Report) -> None:
    gaps = list_gaps(full_report)
    assert [gap.outcome for gap in gaps] == ["failed", "not_run"]
    assert "coreml w8a8: accuracy" in gaps[1].subjects
    assert "gate: speed-up: coreml" in gaps[1].subjects


def test_artifacts_of_one_runtime_and_scheme_are_told_apart(
    crowded_report: Report, tmp_path: Path
) -> None:
    files = write_pages(crowded_report, tmp_path)
    for file in files[:2]:
        assert "pointwise, one-by-one-convolution-with-transposes" in file.read_text("utf-8")
    assert "| w8a8 (all, channels-last, avx2) |" in files[1].read_text("utf-8")
    subjects = [subject for gap in list_gaps(crowded_report) for subject in gap.subjects]
    assert "coreml w8a8 (all, channels-last, full): accuracy" in subjects


def test_contention_is_asked_at_one_thread_only(full_report: Report) -> None:
    row = next(r for r in full_report.artifacts if (r.runtime, r.scheme) == ("openvino", "w8a8"))
    assert contention(row.latency[0]) == pytest.approx(1.5)
    # With two, CPU time counts both: their ratio tells nothing.
    assert contention(replace(row.latency[0], threads=2)) is None
    assert contention(replace(row.latency[0], accelerated=True)) is None
    clear = next(r for r in full_report.artifacts if (r.runtime, r.scheme) == ("onnx", "w8a8"))
    assert contention(clear.latency[0]) is None


def test_a_unit_beside_the_cpu_lets_it_wait(full_report: Report, tmp_path: Path) -> None:
    row = next(r for r in full_report.artifacts if (r.runtime, r.scheme) == ("openvino", "w8a8"))
    alone = replace(row.latency[0], device="alone", operations_on={"CPU": 40})
    beside = replace(alone, device="beside", operations_on={"CPU": 30, "Neural Engine": 10})
    assert contention(alone) == pytest.approx(1.5)
    assert contention(beside) is None
    spread = row.model_copy(update={"latency": (alone, beside)})
    write_pages(full_report.model_copy(update={"artifacts": (spread,)}), tmp_path)
    page = (tmp_path / "beside.md").read_text(encoding="utf-8")
    assert "- openvino w8a8: CPU 30, Neural Engine 10" in page
    (asked,) = (line for line in page.splitlines() if line.startswith("| openvino | w8a8 | 1 |"))
    assert asked.split(" | ")[5] == "—"
    assert "yes, wall is 1.50× CPU" in (tmp_path / "alone.md").read_text(encoding="utf-8")


def test_device_page_holds_the_report_s_numbers(full_report: Report, tmp_path: Path) -> None:
    page = (write_pages(full_report, tmp_path)[1]).read_text(encoding="utf-8")
    assert (
        "| onnx | w8a8 | all | channels-last | host | 1 | 200 | 61.3 | 33.8 | 36.5 | 1.81× |"
        in page
    )
    assert "yes, wall is 1.50× CPU" in page
    assert "samples/loca-onnx-w8a8.json" in page
    assert "| 0.0021 | 0.002 |" in page
    assert "| 212 | 88.4 | 412.0 MB | 81.2 mJ |" in page


def test_a_device_page_says_what_the_device_is(full_report: Report, tmp_path: Path) -> None:
    board = Device(
        name="edge box <arm64> | rack/3", kind="device", description="Raspberry Pi 5, Debian 13",
        cores=4, isa=("asimd", "asimddp"), versions={"onnxruntime": "1.20.0"},
    )  # fmt: skip
    known = full_report.model_copy(update={"devices": (board,)})
    here, there = (file.read_text() for file in write_pages(known, tmp_path)[1:])
    for text in ("Raspberry Pi 5, Debian 13, 4 cores", "asimd, asimddp", "| onnxruntime 1.20.0 |"):
        assert text in there
        assert text not in here


def test_device_page_tables_are_whole(full_report: Report, tmp_path: Path) -> None:
    for file in write_pages(full_report, tmp_path)[1:]:
        text = file.read_text(encoding="utf-8")
        assert "<arm64>" not in text
        for block in re.split(r"\n\s*\n", text):
            lines = [line for line in block.splitlines() if line.startswith("|")]
            columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
            assert len(columns) <= 1, block


def test_device_page_gives_reasons(full_report: Report, tmp_path: Path) -> None:
    page = (write_pages(full_report, tmp_path)[2]).read_text(encoding="utf-8")
    assert str(escape_markdown("'Illegal instruction' | signal 4")) in page
    assert "&lt;Core ML&gt;" in page
    assert "# convnext_tiny on edge box &lt;arm64&gt; \\| rack/3" in page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b", r"a\|b"),
        ("not_run", "not_run"),
        ("_x_", r"\_x\_"),
        ("<b>\n&", "&lt;b&gt; &amp;"),
        ("`*[x]`", r"\`\*\[x\]\`"),
    ],
)
def test_markdown_is_escaped(text: str, expected: str) -> None:
    assert str(escape_markdown(text)) == expected


def test_file_names_are_safe_and_unique() -> None:
    names = file_names(["../up", "A b", "a-b", "", "é"])
    assert names == {"../up": "up.md", "A b": "A-b.md", "a-b": "a-b-2.md", "": "device.md",
                     "é": "device-2.md"}  # fmt: skip


# --- in a browser ---------------------------------------------------------------------------------

# Boxes of text in one SVG that cut into each other by more than a pixel.
OVERLAPS = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')]
    .map(e => [e.textContent, e.getBoundingClientRect()]);
  return texts.flatMap(([a, p], i) => texts.slice(i + 1)
    .filter(([b, q]) => Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1
                     && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 1)
    .map(([b]) => a + ' / ' + b));
})"""
CLIPPED = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
  const p = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(e => {
    const q = e.getBoundingClientRect();
    return q.left < p.left - 1 || q.right > p.right + 1
        || q.top < p.top - 1 || q.bottom > p.bottom + 1;
  }).map(e => e.textContent);
})"""
# The lowest contrast of any text with what lies behind it, by WCAG's formula.
CONTRAST = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const lum = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const worst = {ratio: 99, text: ''};
  const has = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  for (const e of document.querySelectorAll('body, body *')) {
    if (e !== document.body && !has(e)) continue;
    const style = getComputedStyle(e);
    const ink = parse(e.tagName === 'text' ? style.fill : style.color);
    const [a, b] = [lum(ink), lum(behind(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < worst.ratio) Object.assign(worst, {ratio, text: e.textContent.slice(0, 40)});
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Give a browser of this system; nothing is downloaded."""
    executable = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    missing = [f"any of {', '.join(BROWSERS)}"] if executable is None else []
    if importlib.util.find_spec("playwright") is None:
        missing.append("the Python package playwright")
    if missing:
        message = (
            f"the pages cannot be looked at without {' and '.join(missing)}; install a Chromium"
            " from the system's packages (for example `apt-get install chromium`) and run"
            " `pip install playwright` (the package alone: no `playwright install`)"
        )
        if os.environ.get(REQUIRE_BROWSER):
            pytest.fail(message)
        pytest.skip(message)
    with importlib.import_module("playwright.sync_api").sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=executable, args=list(LAUNCH_ARGUMENTS)
        )
        yield chromium
        chromium.close()


@pytest.mark.parametrize(
    "view",
    [("light", 1280), ("light", 390), ("dark", 1280), ("dark", 390)],
    ids=["light-1280", "light-390", "dark-1280", "dark-390"],
)
@pytest.mark.parametrize(
    "which",
    [
        "full_report",
        "poor_report",
        "crowded_report",
        "calibrated_report",
        "deep_report",
        "trained_report",
        "tuned_report",
    ],
)
def test_looks_right_in_a_browser(
    which: str, view: tuple[Any, int], browser: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    scheme, width = view
    files = write_pages(request.getfixturevalue(which), tmp_path)
    for file in (file for file in files if file.suffix == ".html"):
        page = browser.new_page(viewport={"width": width, "height": 900})
        try:
            complaints: list[str] = []
            requests: list[str] = []
            page.on("console", lambda message: complaints.append(message.text))  # noqa: B023
            page.on("pageerror", lambda error: complaints.append(str(error)))  # noqa: B023
            page.on("request", lambda sent: requests.append(sent.url))  # noqa: B023
            page.emulate_media(color_scheme=scheme)
            page.goto(file.as_uri())
            page.screenshot(path=tmp_path / f"{file.stem}-{scheme}-{width}.png", full_page=True)
            _assert_legible(page)
            assert complaints == []
            assert [url for url in requests if url not in {file.as_uri(), "data:,"}] == []
        finally:
            page.close()


def _assert_legible(page: Any) -> None:
    overflow = page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(CLIPPED) == []
    contrast = page.evaluate(CONTRAST)
    assert contrast["ratio"] >= 4.5, contrast["text"]


def test_layouts_and_times_stand_on_the_page(tuned_report: Report, tmp_path: Path) -> None:
    write_pages(tuned_report, tmp_path)
    page = (tmp_path / "index.html").read_text()
    plain = " ".join(page.split())
    for layout in tuned_report.layouts:
        assert layouts.sentence(layout).replace("'", "&#39;") in plain
    assert page.count("Candidates of ") == 2
    assert "failed: the worker died" in plain
    assert "0.42 … 0.46" in plain
    for kind in tuned_report.breakdowns[0].ms or {}:
        assert f"<td>{kind}</td>" in page
    assert "2.77 times that" in plain
    assert "coreml w8a8 on local: not run: coremltools runs models on macOS only" in plain


@pytest.fixture
def crowded_report(full_report: Report) -> Report:
    """Long names, two placements per runtime, and a matrix of many runtimes."""
    rows = []
    for row in full_report.artifacts:
        rows.append(row)
        if row.scheme != "float":
            form = "one-by-one-convolution-with-transposes"
            rows.append(row.model_copy(update={"placement": "pointwise", "graph_form": form}))
    names = [
        "onnx",
        "openvino",
        "tflite",
        "coreml",
        "reference",
        "a-runtime-of-others",
        "yet-another",
    ]
    agreement = tuple(
        Agreement(a=a, b=b, scheme="w8a8", kind="host", n=100, profile_a=None, profile_b=None,
                  top1_agreement=1.0 - 0.013 * abs(i - j), max_abs_logit_diff=0.3)
        for i, a in enumerate(names) for j, b in enumerate(names) if i < j
    )  # fmt: skip
    return full_report.model_copy(update={"artifacts": tuple(rows), "agreement": agreement})
