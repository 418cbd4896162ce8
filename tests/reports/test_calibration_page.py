"""The calibration's page: the one bad site cannot be missed, and every number is there."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from pipeline.records import (
    Architecture,
    Calibration,
    Preprocessing,
    Quantization,
    QuantizedModel,
    SiteCalibration,
)
from reports import assemble, document
from reports.culprits import culprits, low, most_helped, sentences, worst_first
from reports.document import Report, Site
from reports.pages import share, write_pages
from reports.sitechart import draw_sites, stage_of

WORST, HELPED = "stages.1.blocks.1.res_out", "stages.0.blocks.1.dw_out"


def _site(name: str, sqnr_db: float, plain_sqnr_db: float = 0.0) -> Site:
    return Site(
        site=name, role="dw_in", range_method="min-max", strength=0.0, minimum=-1.0, maximum=1.0,
        clipped=0.0, spread_before=2.0, spread_after=2.0, sqnr_db=sqnr_db,
        plain_sqnr_db=plain_sqnr_db, scale=0.5, zero_point=0, bits=8,
    )  # fmt: skip


def _page(report: Report, folder: Path) -> str:
    files = {file.name: file for file in write_pages(report, folder)}
    return files["calibration.html"].read_text(encoding="utf-8")


def _rows(page: str) -> list[str]:
    return re.findall(r"<tr[^>]*>.*?</tr>", page[page.index("<tbody>") :], flags=re.DOTALL)


def _texts(svg: str) -> list[tuple[str, str]]:
    """Return the texts of an SVG with their tags."""
    return [
        (html.unescape(text), tag)
        for tag, text in re.findall(r"(<text[^>]*>)(.*?)</text>", svg, flags=re.DOTALL)
    ]


# --- which sites stand out ------------------------------------------------------------------------


def test_the_low_sites_stand_out_worst_first() -> None:
    sites = [_site(f"s{i}", value) for i, value in enumerate((40, 40, 40, 40, 40, 33.9, 34.1, 20))]
    assert [site.site for site in culprits(sites)] == ["s7", "s5"]
    assert [site.site for site in worst_first(sites)][:3] == ["s7", "s5", "s6"]


def test_the_worst_stands_out_where_all_are_alike_and_five_at_most() -> None:
    alike = [_site(f"s{i}", 40 - i % 3) for i in range(9)]
    assert [site.site for site in culprits(alike)] == ["s2"]
    many = [_site(f"s{i}", 10 + i if i < 8 else 40) for i in range(30)]
    assert [site.site for site in culprits(many)] == ["s0", "s1", "s2", "s3", "s4"]
    assert len(low(many)) == 8
    assert "and 3 more." in " ".join(sentences(_calibration(many)))


def test_the_most_helped_is_where_the_plain_grid_costs_most() -> None:
    assert most_helped([_site("a", 40, 39), _site("b", 36, 31)]) is None
    found = most_helped([_site("a", 40, 39), _site("b", 36, 9), _site("c", 12, 1)])
    assert found is not None
    assert found.site == "b"


def _calibration(sites: list[Site]) -> document.Calibration:
    return document.Calibration(
        settings={"method": "search"}, scheme="w8a8", placement="all", sites=tuple(sites)
    )


@pytest.mark.parametrize(
    ("plain", "said"),
    [(7.5, "12.5 dB less"), (26.0, "6.0 dB more"), (20.01, "the same")],
)
def test_the_sentences_say_what_the_plain_grid_costs(plain: float, said: str) -> None:
    sites = [_site("a", 40, 40), _site("bad", 20, plain), _site("c", 41, 41)]
    text = " ".join(sentences(_calibration(sites)))
    assert "worst of 3 sites is bad with 20.0 dB; the median site has 40.0 dB" in text
    assert f"{plain:.1f} dB, {said}." in text
    assert "No other site lies more than 6 dB below the median." in text


def test_one_site_alone_is_said_to_be_alone() -> None:
    alone = _calibration([_site("a", 40, 40)])
    synthetic = alone.model_copy(update={"images": "none"})
    assert not any("synthetic" in sentence for sentence in sentences(alone))
    assert any("synthetic" in sentence for sentence in sentences(synthetic))
    assert sentences(_calibration([_site("a", 40, 40)]))[0] == "The only site is a with 40.0 dB."


# --- from the record ------------------------------------------------------------------------------


def _quantized(chosen: dict[str, SiteCalibration]) -> QuantizedModel:
    return QuantizedModel(
        architecture=Architecture(depths=(1,), dims=(4,), classes=2),
        preprocessing=Preprocessing(input_size=32),
        labels=None,
        scheme="w8a8",
        placement="all",
        calibration=Calibration(rounding="gptq"),
        sites={
            name: Quantization(scale=0.25 + place, zero_point=place)
            for place, name in enumerate((*chosen, "stages.0.blocks.0.gelu_in"))
        },
        chosen=chosen,
        parents={},
    )


def test_the_record_is_laid_out_site_by_site_in_network_order() -> None:
    names = ("stem.stem_out", "stages.0.blocks.0.dw_in", "head.head_in")
    chosen = {
        name: SiteCalibration(
            range_method="entropy", strength=0.5, minimum=-1.0, maximum=2.0 + place, clipped=0.25,
            spread_before=9.0, spread_after=3.0, sqnr_db=30.0 - place, plain_sqnr_db=11.0,
        )
        for place, name in enumerate(names)
    }  # fmt: skip
    found = assemble.calibration(_quantized(chosen), sample=12)
    assert found is not None
    assert [site.site for site in found.sites] == list(names)
    assert found.sample == 12
    assert found.settings == {
        "method": "search", "rounding": "gptq", "rescale": True, "correct_bias": True
    }  # fmt: skip
    assert found.sites[1] == Site(
        site="stages.0.blocks.0.dw_in", role="dw_in", range_method="entropy", strength=0.5,
        minimum=-1.0, maximum=3.0, clipped=0.25, spread_before=9.0, spread_after=3.0,
        sqnr_db=29.0, plain_sqnr_db=11.0, scale=1.25, zero_point=1, bits=8,
    )  # fmt: skip


def test_where_nothing_is_quantized_there_is_no_calibration() -> None:
    assert assemble.calibration(_quantized({})) is None


# --- the page -------------------------------------------------------------------------------------


def test_the_page_lies_beside_the_index_and_each_leads_to_the_other(
    calibrated_report: Report, full_report: Report, tmp_path: Path
) -> None:
    files = write_pages(calibrated_report, tmp_path / "a")
    assert [file.name for file in files][:2] == ["index.html", "calibration.html"]
    index, page = (file.read_text(encoding="utf-8") for file in files[:2])
    assert '<a href="calibration.html">' in index
    assert WORST in index
    assert '<a href="index.html">' in page
    without = write_pages(full_report, tmp_path / "b")
    assert "calibration.html" not in {file.name for file in without}
    assert "calibration.html" not in without[0].read_text(encoding="utf-8")


def test_the_worst_site_is_named_first_and_marked(
    calibrated_report: Report, tmp_path: Path
) -> None:
    page = _page(calibrated_report, tmp_path)
    assert f"is {WORST} with 21.5 dB" in page[: page.index("<figure")]
    rows = _rows(page)
    assert calibrated_report.calibration is not None
    assert len(rows) == len(calibrated_report.calibration.sites)
    assert rows[0].startswith('<tr class="low">')
    assert WORST in rows[0]
    assert "21.5 dB" in rows[0]
    assert not [row for row in rows[1:] if 'class="low"' in row]


@pytest.mark.parametrize("form", [0, 1], ids=["wide", "narrow"])
def test_the_chart_names_the_worst_in_bold_and_red(calibrated_report: Report, form: int) -> None:
    assert calibrated_report.calibration is not None
    svg = draw_sites(calibrated_report.calibration)[form]
    texts = _texts(svg)
    marked = [(text, tag) for text, tag in texts if "var(--bad)" in tag]
    assert [text for text, _ in marked] == [f"{WORST} 21.5 dB"]
    assert "font-weight: 700" in marked[0][1]
    assert f"{HELPED} 8.5 → 37.5 dB" in [text for text, _ in texts]
    # The marks of one site: a line, a hollow mark and a filled one.
    assert len(re.findall(r"<use[^>]*var\(--bad\)", svg)) == 2
    titles = re.findall(r"<title>(.*?)</title>", svg)
    assert titles[0].startswith("stem.image: ")
    assert len(titles) == len(calibrated_report.calibration.sites)


def test_without_a_bad_site_only_the_worst_is_marked(
    calibrated_report: Report, tmp_path: Path
) -> None:
    calibration = calibrated_report.calibration
    assert calibration is not None
    sites = tuple(site for site in calibration.sites if site.site != WORST)
    better = calibration.model_copy(update={"sites": sites})
    page = _page(calibrated_report.model_copy(update={"calibration": better}), tmp_path)
    assert WORST not in page
    assert len([row for row in _rows(page) if 'class="low"' in row]) == 1
    assert "No site lies more than 6 dB below the median." in page


def test_every_number_of_a_site_is_in_its_row(calibrated_report: Report, tmp_path: Path) -> None:
    row = next(row for row in _rows(_page(calibrated_report, tmp_path)) if HELPED in row)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.DOTALL)
    expected = ["37.5 dB", "8.5 dB", "mse", "0.75", "-3.391", "5.5", "&lt;0.01 %", "42.5", "1.62",
                "0.03125", "-24", "8", "dw_out", "10"]  # fmt: skip
    assert cells == expected


def test_the_settings_are_on_the_page(calibrated_report: Report, tmp_path: Path) -> None:
    page = _page(calibrated_report, tmp_path)
    for name, value in (("Method", "search"), ("Correct bias", "no"), ("Images tried", "96")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page


def test_the_page_stands_alone_and_escapes_names(calibrated_report: Report, tmp_path: Path) -> None:
    calibration = calibrated_report.calibration
    assert calibration is not None
    odd = calibration.sites[0].model_copy(update={"site": "<script>x</script>", "sqnr_db": 1.0})
    changed = calibration.model_copy(update={"sites": (odd, *calibration.sites[1:])})
    page = _page(calibrated_report.model_copy(update={"calibration": changed}), tmp_path)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    references = re.findall(r"""(?:href|src)\s*=\s*["']?([^"'\s>]+)""", page)
    references += re.findall(r"url\(([^)]*)\)", page)
    assert {one for one in references if not one.startswith("#")} == {"data:,", "index.html"}
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert "#0102" not in page


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_calibration_of_few_sites_is_drawn(
    calibrated_report: Report, count: int, tmp_path: Path
) -> None:
    calibration = calibrated_report.calibration
    assert calibration is not None
    few = calibration.model_copy(update={"sites": calibration.sites[:count]})
    page = _page(calibrated_report.model_copy(update={"calibration": few}), tmp_path)
    assert len(_rows(page)) == count


def test_values_beyond_the_scale_are_drawn_at_its_end_and_said(
    deep_report: Report, calibrated_report: Report, tmp_path: Path
) -> None:
    said = "Values beyond the scale are drawn at its end."
    assert said in _page(deep_report, tmp_path / "a")
    assert said not in _page(calibrated_report, tmp_path / "b")


def test_stages_are_read_off_names() -> None:
    assert [stage_of(n) for n in ("stem.image", WORST, "head.head_in", "image")] == [
        "stem", "stage 1", "head", "image"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00 %"), (1e-7, "<0.01 %"), (0.0001, "0.01 %"), (0.2, "20.00 %")]
)
def test_a_small_share_never_looks_like_none(value: float, text: str) -> None:
    assert share(value) == text
