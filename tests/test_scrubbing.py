"""Scrubbing removes copyright notices and e-mail addresses from real abstracts, and none of their content."""

import itertools
import random
import re

import pyarrow.parquet as pq
import pytest
from growth import assert_time_is_not_quadratic

from healthslm.corpus.scrubbing import scrub

SENTENCE = "Mortality fell by 3% in both groups."

NOTICES = """\
© 2019 Elsevier B.V. All rights reserved.
Copyright (c) 2005 Wiley-Liss, Inc.
Copyright © 2018 by the American Society of Nephrology.
(C) 1999 Academic Press.
(c) 2005 Prous Science. All rights reserved.
© The Author(s) 2018. Published by Oxford University Press. All rights reserved. For permissions, please e-mail: a@b.uk.
© 2021 The Authors. The Journal of Pathology published by John Wiley & Sons, Ltd. on behalf of The Society.
© 2018 Wu et al.This is an open access article distributed under the terms of the Creative Commons Attribution License.
© 2019, This is a U.S. Government work and not under copyright protection in the US.
© 2025 Elsevier B.V. All rights are reserved, including those for text and data mining, AI training, and the like.
(copyright) 2007 APA, all rights reserved.
Copyright 2003, 2004 S. Karger AG, Basel.
This article is protected by copyright. All rights reserved.
Published by Elsevier Ltd.
J. Cell. Physiol. 211: 12-18, 2007. (c) 2007 Wiley-Liss, Inc.
Am J Ophthalmol 2021;221:100-110. © 2021 Elsevier Inc. All rights reserved.
(PsycINFO Database Record (c) 2015 APA, all rights reserved).
(PsycInfo Database Record (c) 2021 APA, all rights reserved)
(PsycINFO Database Record
""".splitlines()

CONTENT = """\
The Beck Depression Inventory© was filled in by all patients.
A Scottish PROM © score of 9 was the cut-off. Data were analysed in Excel © by two authors.
Copyright law was explained to 40 authors in 2009.
The scale is subject to copyright (© MW Johns, 1990).
Au@SiO2 and N@C60 were compared with Co@ZnO/Ni@NC at -55 dB@8.2 GHz.
The groups were (A) placebo, (B) 5 mg and (C) 10 mg. (C) was stopped in 2001.
Guidelines published by the WHO in 2009 were followed. A series published by Elsevier was reviewed.
An e-mail was sent to all staff, and patients could contact a nurse by email.
We searched PubMed and the PsycINFO database from 1990 to 2020.
Patients' rights are discussed. Tables were reserved for severe cases.
""".splitlines()

ADDRESSES = {
    "Correspondence lasted. Electronic address: x.y@z-1.org.": "Correspondence lasted.",
    "It is new. CONTACT: a@b.edu SUPPLEMENTARY INFORMATION: None.": "It is new. SUPPLEMENTARY INFORMATION: None.",
    "E-mail: jane@fmvz.unesp.br Infections are rising.": "Infections are rising.",
    "Code is available upon request sent to SNAD@lumc.nl.": "Code is available upon request sent.",
    "Ask the office (contact: Heather.House@admin.ox.ac.uk) first.": "Ask the office first.",
    "From Dr. Garmyn, email: marjan@kuleuven.be.": "From Dr. Garmyn.",
    "Call 1-800-438 or adear@nia.nih.gov. It is free.": "Call 1-800-438. It is free.",
    "Write to the authors. E-mail: [email protected]": "Write to the authors.",
    "Both answer: a@b.com, c@d.com or e@f.org.": "Both answer:.",
}


@pytest.fixture(scope="module")
def abstracts(test_data) -> list[str]:
    files = sorted(test_data.glob("corpus/train-abstract-*.parquet"))
    return [text for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist()]


@pytest.mark.parametrize("notice", NOTICES)
def test_a_notice_is_removed_at_the_end_on_a_line_and_at_the_beginning(notice):
    assert scrub(f"{SENTENCE} {notice}") == SENTENCE
    assert scrub(f"{SENTENCE}\n{notice}\n{SENTENCE}") == f"{SENTENCE}\n{SENTENCE}"
    assert scrub(notice) == ""


@pytest.mark.parametrize("notice", [notice for notice in NOTICES if notice.endswith(".")])
def test_text_after_a_notice_is_kept(notice):
    assert scrub(f"{notice} {SENTENCE}") == SENTENCE


@pytest.mark.parametrize("content", CONTENT)
def test_content_is_unchanged(content):
    assert scrub(f"{SENTENCE} {content}\n\n{content}") == f"{SENTENCE} {content}\n\n{content}"


@pytest.mark.parametrize(("text", "clean"), ADDRESSES.items())
def test_an_address_is_removed_with_its_lead_in(text, clean):
    assert scrub(text) == clean


def test_every_sentence_of_a_real_abstract_that_is_not_about_rights_is_kept(abstracts):
    about_rights = re.compile(
        r"©|\(c\)|copyright|rights|publish|licen[cs]e|reproduction|psycinfo|creative|on behalf of|@|elsevier|wiley",
        re.IGNORECASE,
    )
    changed = 0
    for abstract in abstracts:
        scrubbed = scrub(abstract)
        if scrubbed == abstract:
            continue
        changed += 1
        for sentence in re.split(r"(?<=[.?!])\s+", abstract):
            assert about_rights.search(sentence) or len(sentence.split()) < 8 or sentence in scrubbed
    assert changed > 100


def test_no_notice_is_left_in_a_real_abstract(abstracts):
    line = re.compile(r"[Rr]ights (?:are )?reserved|protected by copyright|\([cC]\) (?:19|20)\d\d|© (?:19|20)\d\d")
    with_line = [abstract for abstract in abstracts if line.search(abstract)]
    assert len(with_line) > 100
    assert not [match[0] for abstract in with_line if (match := line.search(scrub(abstract)))]


def test_scrubbing_twice_changes_nothing_more(abstracts):
    pieces = [*NOTICES, *CONTENT, *ADDRESSES, SENTENCE]
    generator = random.Random(0)
    mixtures = [
        "".join(generator.choice(("", " ", "\n")) + generator.choice(pieces) for _ in range(6)) for _ in range(2000)
    ]
    for text in itertools.chain(abstracts, mixtures):
        once = scrub(text)
        assert scrub(once) == once
        assert once == once.strip()


HOSTILE_PIECES = [
    "a",
    "@",
    "a@",
    "a.b@",
    "a@b.",
    " ",
    "\n@",
    "E-mail: ",
    "(contact ",
    "J. Cell. ",
    "Cell 2001;12:3-",
    ". ",
]
HOSTILE_PIECES += ["©", "(c) ", "copyright ", "Copyright © ", "© 2001 ", "© 2001,", "All rights reserved. ", ".\u2003("]


@pytest.mark.parametrize("piece", HOSTILE_PIECES)
def test_scrubbing_any_long_text_terminates(piece):
    """A regular expression that backtracks would take quadratic time on some of these."""
    assert_time_is_not_quadratic(scrub, lambda size: "© " + piece * (size // len(piece)) + "@©")
