"""Colours of pages are legible on light and on dark screens, and in print."""

from collections.abc import Mapping

import pytest

from refold.pages.palette import DARK, LIGHT, RAMP, SERIES, contrast


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#777777") == pytest.approx(1.0)
    # The example of WebAIM: the lightest grey that passes on white.
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_series_stand_out(palette: Mapping[str, str]) -> None:
    assert palette.keys() == LIGHT.keys()
    for role in ("ink", "quiet", "link", *SERIES):
        for ground in ("paper", "box"):
            assert contrast(palette[role], palette[ground]) >= 4.5, f"{role} on {ground}"
    assert contrast(palette["faint"], palette["paper"]) < 4.5


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_stands_out_on_both_ends_of_the_ramp(palette: Mapping[str, str]) -> None:
    shallow, deep = (palette[role] for role in RAMP)
    assert contrast(palette["ink"], shallow) >= 4.5
    assert contrast(palette["ink"], deep) >= 4.5
    # A ramp of one hue is read by its lightness.
    assert contrast(shallow, deep) >= 1.9
    assert contrast(palette["paper"], deep) > contrast(palette["paper"], shallow)
