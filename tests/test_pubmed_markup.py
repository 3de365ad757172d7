"""Markup, formulas and titles of PubMed's XML become text that means the same."""

import pytest
from lxml import etree

from healthslm.corpus.markup import inner_text, one_line
from healthslm.corpus.pubmed import clean_title


@pytest.mark.parametrize(
    ("xml", "text"),
    [
        ("10<sup>5</sup> cells", "10^5 cells"),
        ("5 × 10<sup>-3</sup> cm<sup>−1</sup>", "5 × 10^-3 cm^−1"),
        ("2<sup>−ΔΔCt</sup>", "2^−ΔΔCt"),
        ("<i>R</i><sup>2</sup> = 0.9, (m/s)<sup>2</sup>", "R^2 = 0.9, (m/s)^2"),
        ("Ca<sup>2+</sup>, CD4<sup>+</sup>, SO<sub>4</sub><sup>2-</sup>", "Ca2+, CD4+, SO4^2-"),
        ("<sup>18</sup>F and [<sup>11</sup>C]", "18F and [11C]"),
        ("<i>Xyz</i><sup>-/-</sup> mice, the 2<sup>nd</sup> test of X<sup>®</sup>", "Xyz-/- mice, the 2nd test of X®"),
        ("H<sub>2</sub>O, VO<sub>2max</sub>", "H2O, VO2max"),
        ("<b>Bold <u>and <i>nested</i></u></b>\n  text ends", "Bold and nested text ends"),
        ("no&#160;break,\u2009thin", "no break, thin"),
    ],
)
def test_inline_markup_keeps_its_meaning(xml, text):
    assert inner_text(etree.fromstring(f"<AbstractText>{xml}</AbstractText>")) == text


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        ("<m:msup><m:mn>10</m:mn> <m:mn>5</m:mn></m:msup>", "10^5"),
        ("<m:msub><m:mi>T</m:mi>\n <m:mn>1</m:mn></m:msub>", "T1"),
        ("<m:msubsup><m:mi>T</m:mi> <m:mn>2</m:mn> <m:mo>∗</m:mo></m:msubsup>", "T2∗"),
        ("<m:mfrac><m:mrow><m:mi>a</m:mi><m:mo>+</m:mo><m:mi>b</m:mi></m:mrow><m:mi>c</m:mi></m:mfrac>", "(a+b)/c"),
        ("<m:semantics><m:mi>x</m:mi><m:annotation>\\mathit{x}</m:annotation></m:semantics>", "x"),
        ("<m:mi>a</m:mi><m:mspace/><m:mtext>\u00a0</m:mtext><m:mi>b</m:mi>", "a b"),
    ],
)
def test_formulas_read_as_text(formula, text):
    xml = f'<AbstractText>at <m:math xmlns:m="http://www.w3.org/1998/Math/MathML">{formula}</m:math> it</AbstractText>'
    assert inner_text(etree.fromstring(xml)) == f"at {text} it"


@pytest.mark.parametrize(
    ("title", "cleaned", "is_translation"),
    [
        ("[Asthma in children].", "Asthma in children.", True),
        ("[Is it asthma?].", "Is it asthma?", True),
        ("[Effect of [3H]thymidine].", "Effect of [3H]thymidine.", True),
        ("[18F]FDG uptake in [cells].", "[18F]FDG uptake in [cells].", False),
        ("[3H]thymidine uptake.", "[3H]thymidine uptake.", False),
        ("[Not Available].", "", False),
        ("", "", False),
    ],
)
def test_titles_lose_only_the_brackets_of_a_translation(title, cleaned, is_translation):
    assert clean_title(title) == (cleaned, is_translation)


@pytest.mark.parametrize("text", ["", " ", "a b", " a b", "a  b", "a\tb", "a\nb ", "a\rb", "ä\u2009b", "\u00a0a\u3000"])
def test_one_line_has_single_spaces(text):
    assert one_line(text) == " ".join(text.split())
