"""Converting the inline markup and formulas of PubMed's titles and abstracts to plain text of the same meaning.

Bold, italic and underlined text and subscripts lose their markup: "H<sub>2</sub>O" becomes H2O. An exponent gets a "^",
because "10<sup>5</sup>" is not 105: "10^5", "cm^-1", "R^2". Superscripts that plain text usually writes without a sign
get none: Ca2+, CD4+, 18F, TNF-/-, 2nd, µg®. MathML formulas follow the same rules, and a fraction becomes "a/b".
"""

import re

from lxml import etree

# The exponent of a unit or a variable: a number with any of the plus and minus signs in use.
_SIGNED_NUMBER = re.compile(r"[+\-\u2010-\u2013\u2212]?\s*\d+(?:[.,/]\d+)?")
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")


def inner_text(element: etree._Element | None) -> str:
    """All text in `element` on one line with single spaces; "" if `element` is None.

    The element must have been parsed without comments, processing instructions and entities.
    """
    if element is None:
        return ""
    if len(element) == 0:
        return one_line(element.text or "")
    pieces: list[str] = []
    _append_content(element, pieces)
    return one_line("".join(pieces))


def one_line(text: str) -> str:
    """Strip `text` and replace every run of white space in it with a single space."""
    # Most texts need no change, and checking that is four times faster than splitting and joining.
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
    """A superscript as plain text after the character `before`: with a "^" if it is an exponent."""
    if not any(character.isalnum() for character in content):
        return content
    is_exponent_of_number = before.isdigit() and not _ORDINAL.match(content)
    is_exponent_of_name = (before.isalpha() or before in ")]}") and _SIGNED_NUMBER.fullmatch(content)
    return f"^{content}" if is_exponent_of_number or is_exponent_of_name else content


def _formula(element: etree._Element) -> str:
    """The text of a MathML element, without the white space between its children, which is layout."""
    name = _local_name(element)
    children = list(element)
    if not children:
        return " " if name == "mspace" else (element.text or "").strip("\n\t ")
    if name == "semantics":  # its other children repeat the formula, in TeX for instance
        return _formula(children[0])
    if name == "mmultiscripts":
        return _multiscripts(children)
    texts = [_formula(child) for child in children]
    if name == "mfrac":
        return "/".join(text if len(text) == 1 or text.isalnum() else f"({text})" for text in texts)
    if name in ("msup", "msubsup"):
        base, exponent = "".join(texts[:-1]), texts[-1]
        return base + _superscript(base[-1:] or " ", exponent)
    return "".join(texts)


def _multiscripts(children: list[etree._Element]) -> str:
    """Move prescripts, which MathML writes after the base, in front of it: He, mprescripts, none, 3 becomes 3He."""
    names = [_local_name(child) for child in children]
    marker = names.index("mprescripts") if "mprescripts" in names else len(names)
    before, after = children[marker + 1 :], children[:marker]
    return "".join(map(_formula, before + after))
