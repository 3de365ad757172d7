"""The text of PubMed's titles and abstracts, whose inline markup and formulas must not change what they say.

Bold, italic and underlined text and subscripts lose their markup: "H<sub>2</sub>O" reads H2O in plain text everywhere.
A superscript that carries a value would change it: "10<sup>5</sup>" is not 105. It becomes "10^5", "cm^-1", "R^2".
Superscripts that plain text writes without a sign stay plain: Ca2+, CD4+, 18F, TNF-/-, 2nd, µg®. Formulas in MathML
follow the same rules, and a fraction becomes "a/b".
"""

import re

from lxml import etree

# Written as a number, with any of the minus signs in use: the exponent of a unit or a variable.
_SIGNED_NUMBER = re.compile(r"[+\-\u2010-\u2013\u2212]?\s*\d+(?:[.,/]\d+)?")
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")
_SCRIPTED = {"msup", "msub", "msubsup", "mover", "munder", "munderover"}


def inner_text(element: etree._Element | None) -> str:
    """All text in `element`, on one line with single spaces; "" for none.

    The element was parsed without comments and processing instructions, and has no entities.
    """
    if element is None:
        return ""
    if len(element) == 0:
        return one_line(element.text or "")
    pieces: list[str] = []
    _append_content(element, pieces)
    return one_line("".join(pieces))


def one_line(text: str) -> str:
    """`text` with a single space for all its white space, and none at its ends."""
    # Most texts are so already, which is four times faster to see than to make.
    is_plain = text.isascii() and "\n" not in text and "\t" not in text and "\r" not in text and "  " not in text
    return text.strip() if is_plain else " ".join(text.split())


def _append_content(element: etree._Element, pieces: list[str]) -> None:
    if element.text:
        pieces.append(element.text)
    for child in element:
        name = _local_name(child)
        if name == "sup":
            pieces.append(_superscript(pieces[-1][-1:] if pieces else " ", inner_text(child)))
        elif name == "math":
            pieces.append(_formula(child))
        else:
            _append_content(child, pieces)
        if child.tail:
            pieces.append(child.tail)


def _local_name(element: etree._Element) -> str:
    return element.tag.rpartition("}")[2]


def _superscript(before: str, content: str) -> str:
    """`content` as plain text behind the character `before`, with a "^" where it would otherwise join another value."""
    if not any(character.isalnum() for character in content):
        return content
    is_exponent_of_number = before.isdigit() and not _ORDINAL.match(content)
    is_exponent_of_name = (before.isalpha() or before in ")]}") and _SIGNED_NUMBER.fullmatch(content)
    return f"^{content}" if is_exponent_of_number or is_exponent_of_name else content


def _formula(element: etree._Element) -> str:
    """The text of a MathML element. White space between its elements is layout and no part of it."""
    name = _local_name(element)
    children = list(element)
    if not children:
        return " " if name == "mspace" else (element.text or "").strip("\n\t ")
    if name == "semantics":  # its other children say the same again, in TeX for instance
        return _formula(children[0])
    if name == "mmultiscripts":
        return _multiscripts(children)
    parts = [_formula(child) for child in children]
    if name == "mfrac":
        return "/".join(part if len(part) == 1 or part.isalnum() else f"({part})" for part in parts)
    if name in ("msup", "msubsup"):
        *base, exponent = parts
        base = "".join(base)
        return base + _superscript(base[-1:] or " ", exponent)
    return "".join(parts)


def _multiscripts(children: list[etree._Element]) -> str:
    """Scripts in front of a base come after it in MathML: He, prescripts, none, 3 is 3He."""
    names = [_local_name(child) for child in children]
    behind = names.index("mprescripts") if "mprescripts" in names else len(names)
    before, after = children[behind + 1 :], children[:behind]
    return "".join(map(_formula, before + after))
