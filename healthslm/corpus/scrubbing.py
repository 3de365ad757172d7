"""Removing publishers' copyright notices and e-mail addresses from texts.

A notice is recognized by the beginning of its sentence, and the text after it is kept. "©" in the name of a scale or a
program, "@" in a compound and copyright as a topic are content and are kept too. All repetitions in the regular
expressions are bounded or anchored, so the time is linear in the length of the text.
"""

import itertools
import re

# Nearly all texts contain none of these, in lower case, and are returned unchanged.
_HINTS = (
    "@",
    "[email",
    "©",
    "(c)",
    "copyright",
    "rights reserved",
    "rights are reserved",
    "published by",
    "psycinfo d",
)

_YEAR = r"(?:19|20)\d\d"
_MARK = r"(?:©|\(c\)|\[copyright\]|\(copyright\)|copyright\b)"
_SIGN = r"(?:copyright\s?(?:©|\(c\))|©\s?copyright\b|©|\[copyright\]|\(copyright\)|\\textcopyright)"  # unambiguous
_PUBLISHER = (
    r"(?:academic press|blackwell|bmj|cambridge university|elsevier|iop|(?:john )?wiley|karger|lippincott|mdpi|"
    r"nature publishing|oxford university|sage|springer|taylor & francis|thieme|wolters)"
)
_PROTECTED = "This article is protected by copyright"
_NOTICE_START = (
    rf"(?i:{_MARK}(?:{_MARK}|by\b|the\b|[-,:\s]){{0,5}}{_YEAR}(?:[-–/,\s]{{1,2}}{_YEAR}){{0,5}}"
    rf"(?:\s?[.,:;-]|\s(?:by|the)\b|\s(?-i:[A-Z])|\s*$)"
    rf"|{_SIGN},?\s?(?:{_YEAR}\b|this is an open|published\b|author|(?:by |the )|(?-i:[A-Z]))|\(c\) the author"
    rf"|(?:copyright )?the copyright holder for this preprint|copyright published by|(?<=[.!?]\s){_YEAR} {_PUBLISHER}\b"
    rf"|{_PROTECTED}|(?:all )?rights (?:are )?reserved\b|(?-i:Published) by {_PUBLISHER}\b)"
)
_NOTICE = re.compile(_NOTICE_START)
_LONGEST_NOTICE = 400  # characters; in a longer sentence, content follows the notice without a full stop
# A sentence begins after a full stop that does not end an abbreviation, a notice after any final punctuation. Either
# may follow without a space.
_SENTENCE_START = re.compile(
    r"(?<=[.!?])(?<!\s[A-Z]\.)(?<!\bU\.S\.)(?<!\bDr\.)\s+(?=[A-Z(\[])|(?<=[a-z]\.)(?=[A-Z][a-z])"
    rf"|(?<=[.!?)\]:;])\s*(?={_NOTICE_START})|\s(?={_PROTECTED})|^\s+"
)
# Sentences about rights that continue a notice, and a journal name at the end of the text.
_CONTINUATION = re.compile(
    r"(?i:[^.]{0,120}\bpublished (?:by|on behalf)|licensee\b|on behalf of\b|produc(?:ed|tion)\b[^.]{0,20} (?:by|with)\b"
    r"|th(?:is|e) (?:article|work|paper|is)\b[^.]{0,80}(?:government|licen[cs]e|creative|public domain|distribut)"
    r"|this is an open[- ]access|to view a copy of this licen|\(?https?://(?:www\.)?creativecommons"
    r"|(?:re-?use|distribution or reproduction|no (?:commercial|claim)|see rights|for (?:commercial|permissions?))\b"
    r"|(?:inc|ltd|llc|gmbh)\b|[^.?!]{0,100}$)"
)
# The article's own citation before a notice: "J. Cell. Physiol. 211: 12-18, 2007. (c) 2007 Wiley-Liss, Inc."
_CITATION = re.compile(
    rf"(?:^|(?<=[.!?)]\s))(?=.{{0,80}}\b{_YEAR})(?:[A-Z][A-Za-z]{{0,14}}\.? (?:(?:and|of|the|&) )?){{1,6}}"
    rf"(?:{_YEAR}[;:,] ?)?\d{{1,4}}[:;(,][^a-z]{{3,40}}\s(?={_NOTICE_START})"
)
_PSYCINFO = re.compile(rf"\s?(?i:\(psycinfo database record(?: \(c\) {_YEAR} apa, all rights reserved)?)\)?[.;]?")

_ADDRESS = (
    r"(?:(?<![\w.+@-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,5}(?:[a-z]{2,12}|[A-Z]{2,12})(?![\w@-])|\[email\s?protected\])"
)
_LEAD_IN = (
    r"(?:(?<!\w)(?i:electronic address|e-?mail(?: address)?|contact|\*?\s?correspondence|please|to|at|via|from|or|and)"
    r"\s?:?\s{0,2}){0,3}"
)
_EMAIL = re.compile(rf"(?:\s?\({_LEAD_IN}{_ADDRESS}\)|[\s,;]{{0,2}}{_LEAD_IN}{_ADDRESS})(?P<stop>\.?)")


def scrub(text: str) -> str:
    """Remove copyright notices, and e-mail addresses with their lead-in ("E-mail:"), and strip the text.

    Takes a section, a paragraph or a text of several lines. Line breaks are kept, except those of lines that become
    empty. Scrubbing twice gives the same text as scrubbing once.
    """
    if _may_need_scrubbing(text):
        lines = [(line, _scrub_line(line) if _may_need_scrubbing(line) else line) for line in text.split("\n")]
        text = "\n".join(scrubbed for line, scrubbed in lines if scrubbed or not line)
    return text.strip()


def _may_need_scrubbing(text: str) -> bool:
    lowered = text.lower()
    return any(hint in lowered for hint in _HINTS)


def _scrub_line(line: str) -> str:
    return _without_notices(_without_addresses(_PSYCINFO.sub("", line)))


def _without_notices(line: str) -> str:
    line = _CITATION.sub("", line)
    starts = [0, *(match.end() for match in _SENTENCE_START.finditer(line)), len(line)]
    kept: list[str] = []
    in_notice = False
    for start, end in itertools.pairwise(starts):
        begins_notice = end - start <= _LONGEST_NOTICE and _NOTICE.match(line, start, end)
        in_notice = bool(begins_notice or (in_notice and _CONTINUATION.match(line, start, end)))
        if not in_notice:
            kept.append(line[start:end])
    return "".join(kept).rstrip() if len(kept) < len(starts) - 1 else line


def _without_addresses(line: str) -> str:
    def replacement(match: re.Match[str]) -> str:
        ended = line[match.start() - 1 : match.start()] in ("", *".?!")
        return "" if ended else match["stop"]

    return _EMAIL.sub(replacement, line).strip() if "@" in line or "[email" in line else line
