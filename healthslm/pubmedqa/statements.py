"""Turning a statement into a yes/no question and its answer, by rules.

"Statins reduce mortality in sepsis: a cohort study." becomes "Do statins reduce mortality in sepsis?" with the answer
yes, and "Aspirin does not prevent dementia" becomes "Does aspirin prevent dementia?" with the answer no. This is how
Jin et al. (2019), "PubMedQA: a dataset for biomedical research question answering", made their artificial questions.
They found the verb with a part-of-speech tagger. Here the verb comes from a list, so that statements with other verbs
are missed; what isn't surely a statement is refused.
"""

import re
from typing import Literal, NamedTuple


def _words(text: str) -> list[str]:
    return text.split()


# Verbs of findings. "Analysis reveals ..." and "data suggest ..." are left out: their questions ask nothing.
_VERBS = _words("""
    abolish abrogate accelerate accumulate achieve activate affect aggravate alleviate allow alter ameliorate antagonize
    attenuate augment bind boost compromise confer contain contribute correlate counteract create degrade delay depend
    deplete deteriorate determine develop differ differentiate diminish discriminate disrupt distinguish elevate elicit
    eliminate enable encode enhance ensure evoke exacerbate exceed exert exhibit exist explain facilitate favor favour
    fluctuate generate govern hamper hinder impair impede improve inactivate include indicate induce inhibit initiate
    interact interfere involve lead maintain mediate mimic minimize mitigate modify modulate neutralize normalize occur
    outperform overcome persist possess potentiate precede predict predispose preserve prevent produce prolong promote
    protect provide reactivate recognize recruit reduce reflect regulate relieve rely remain repress require resemble
    respond restore restrict retain sensitize serve shorten stabilize stimulate strengthen suppress sustain synergize
    undergo underlie upregulate downregulate vary weaken worsen
""")
# Their form without -s is also an adjective or a common noun: only the form with -s is taken.
_VERBS_WITH_S = _words("act appear associate decline express help lower mirror moderate play represent reverse shape")
# Both forms are also nouns: taken where a noun phrase follows rather than a preposition.
_NOUN_VERBS = _words("""
    benefit block cause change damage decrease drive hasten impact increase influence limit rescue support target
    trigger
""")


def _third_person(verb: str) -> str:
    if re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ies"
    return verb + ("es" if re.search(r"(s|sh|ch|x|z|o)$", verb) else "s")


_BASE_FORMS = {_third_person(verb): verb for verb in _VERBS + _VERBS_WITH_S + _NOUN_VERBS}
_PLURAL_VERBS = {*_VERBS, *_NOUN_VERBS}
_AMBIGUOUS = {*_NOUN_VERBS, *map(_third_person, _NOUN_VERBS)}
_PRESENT = {"was": "is", "were": "are"}
_MOVED = {"is", "are", "was", "were", "can", "does", "do", "did"}
_HAVE = {"has", "have", "had"}
_FAIL = {"fails", "fail", "failed"}
_AUXILIARIES = _MOVED | _HAVE

# A subordinate clause could hold the verb, a pronoun refers to something else, and a hedge is neither yes nor no.
_NOT_IN_SUBJECT = frozenset(
    _words("""that which who whom whose where when while if because how why what whether although though since unless
    than we i it they he she this these those such our their its there here may might would will must cannot can to
    whenever despite unlike should could study studies paper article review authors author data results findings
    literature suggest suggests show shows reveal reveals demonstrate demonstrates identify identifies highlight
    highlights but not no neither none nor only either let""")
)
_NOT_BEFORE_VERB = frozenset(_words("to and or the a an of in on with by for from at as not into than during"))
_PREPOSITIONS = frozenset(
    _words("""in of on after during with for from by and or to at as among between due following before within over
    under caused induced associated observed seen versus vs across through via than is are was were""")
)
_NEGATION = re.compile(
    r"\b(?:not|no|nor|neither|never|none|cannot|rarely|hardly|unclear|unknown|may|might|"
    r"could|would|should|probably|possibly|perhaps|likely|needed|warranted|recommended|publicly|registered|further|"
    r"need|needs|required to)\b",
    re.IGNORECASE,
)
_DEVERBAL = _words("""
    association correlation relationship relation difference effect influence impact benefit evidence role increase 
    change improvement advantage interaction link
""")
_ABSENCE = re.compile(
    rf"(?:no(?! longer)|lack of|absence of)(?: an?| any)? (?P<what>(?:\w+ )?(?:{'|'.join(_DEVERBAL)})s?\b.*)", re.I
)
_THERE = re.compile(r"there (?P<verb>is|are|was|were) (?P<no>no (?!longer))?(?P<what>.+)", re.IGNORECASE)
_SAY = r"(?:suggest(?:s|ed)?|indicate(?:s|d)?|show(?:s|ed)?|demonstrate(?:s|d)?|provides? evidence)"
_LEAD_IN = re.compile(
    r"(?:conclusions?[-:.]?|however|furthermore|moreover|finally|also|additionally|in addition|nevertheless|notably|"
    r"consequently|in (?:conclusion|summary|this study|our study|these patients)|thus|therefore|hence|overall|"
    r"we conclude that|we found that|it is concluded that|"
    rf"(?:our|these|the|this) (?:data|results|findings|study|observations) {_SAY} that),? ",
    re.IGNORECASE,
)
# A second clause can have another answer: "is not associated with age but with sex".
_END = re.compile(r"[:;] | [-–—] |(?<=[a-z]{3})\. |,? (?:but|whereas|although|while|because) ")
_FEWEST_WORDS = 4


class Question(NamedTuple):
    """A yes/no question and its answer."""

    text: str
    answer: Literal["yes", "no"]


def question_of(statement: str, context: str = "") -> Question | None:
    """The question that a statement answers.

    Args:
        statement: A title, or a sentence of a conclusion. What follows a colon is left out.
        context: The abstract. Capitalized words that it also has in lower case lose their capital in the question.

    Returns:
        None if the text is not surely a statement: a noun phrase, a question, a hedge ("may"), or one whose verb isn't
        in the list.
    """
    statement = " ".join(statement.split()).strip(". ")
    if statement.startswith("[") and statement.endswith("]"):  # a translated title
        statement = statement[1:-1].rstrip(". ")
    statement = _LEAD_IN.sub("", _LEAD_IN.sub("", statement))
    if "?" in statement or statement.isupper():
        return None
    statement = _END.split(statement)[0].rstrip(" .")
    words = statement.split()
    if len(words) < _FEWEST_WORDS:
        return None
    found = _absence(statement) or _clause(words)
    if found is None:
        return None
    first, rest, answer = found
    if _NEGATION.search(rest):  # a second negation, or one that the rules don't know
        return None
    if answer == "no":  # "any" comes with "not" and would tell the answer
        rest = re.sub(r"\bany ", "", rest)
    return Question(f"{first} {_lower(rest, context)}?", answer)


def _absence(statement: str) -> tuple[str, str, Literal["yes", "no"]] | None:
    """ "No effect of X on Y", "Lack of X", and "There is no X" and "There is X"."""
    if match := _THERE.fullmatch(statement):
        what = match["what"]
        if match["no"] and match["verb"].lower() in ("is", "was"):
            what = _with_article(what)
        return (
            _PRESENT.get(match["verb"].lower(), match["verb"]).capitalize(),
            f"there {what}",
            "no" if match["no"] else "yes",
        )
    if (match := _ABSENCE.fullmatch(statement)) and not _AUXILIARIES.intersection(statement.lower().split()):
        return "Is", f"there {_with_article(match['what'])}", "no"
    return None


def _with_article(phrase: str) -> str:
    """The phrase with "a", unless it is plural."""
    noun = next((word for word in phrase.split()[:3] if word.rstrip("s") in _DEVERBAL), "")
    if noun.endswith("s") or noun == "evidence" or phrase.split()[0] in ("a", "an", "the"):
        return phrase
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"


def _clause(words: list[str]) -> tuple[str, str, Literal["yes", "no"]] | None:
    """Subject, verb and the rest, with the auxiliary in front."""
    place = _verb(words)
    if place is None:
        return None
    verb, subject, rest = words[place].lower(), words[:place], words[place + 1 :]
    negated = verb == "cannot" or rest[0].lower() == "not"
    if rest[0].lower() == "not":
        rest = rest[1:]
        if not rest or rest[0].lower() in ("only", "just", "always", "necessarily", "merely", "all"):
            return None
    if verb in _FAIL:
        if negated or rest[0] != "to":
            return None
        auxiliary = "do" if _is_plural(subject) and verb != "fails" else "does"
        rest, negated = rest[1:], True
    elif verb in _HAVE:
        if negated or _is_perfect(rest):
            if verb == "had":
                return None
            auxiliary = verb
        else:
            auxiliary = "do" if verb != "has" and _is_plural(subject) else "does"
            if rest == ["no"]:
                return None
            if rest[0] == "no":
                rest, negated = _with_article(" ".join(rest[1:])).split(), True
            rest = ["have", *rest]
    elif verb in _MOVED or verb == "cannot":
        auxiliary = _PRESENT.get(verb, verb).removesuffix("not")
        if verb == "did":
            auxiliary = "do" if _is_plural(subject) else "does"
        if (
            rest
            and rest[0] == "no"
            and len(rest) > 1
            and re.fullmatch(r"better|more|less|worse|different|\w+er", rest[1])
        ):
            rest, negated = rest[1:], True
    else:
        auxiliary, rest = ("Does", [_BASE_FORMS[verb], *rest]) if verb in _BASE_FORMS else ("Do", [verb, *rest])
    if len(rest) < 2:
        return None
    if auxiliary.lower() in ("does", "do"):
        rest = [rest[0], *(_in_base_form(rest, index) for index in range(1, len(rest)))]
    return auxiliary.capitalize(), " ".join(subject + rest), "no" if negated else "yes"


def _is_perfect(rest: list[str]) -> bool:
    """Whether "has" is an auxiliary: "has increased in", but not "has increased levels"."""
    rest = [word for word in rest if not word.endswith("ly") and word not in ("already", "also")]
    if not rest or rest[0] in ("been", "become"):
        return bool(rest)
    return rest[0].endswith("ed") and rest[1:2] != [] and rest[1] in _PREPOSITIONS


def _verb(words: list[str]) -> int | None:
    """Place of the first finite verb, if a subject comes before it and something after it."""
    for place in range(1, len(words) - 1):
        word, before, after = words[place], words[place - 1].lower(), words[place + 1].lower().rstrip(",")
        if before.strip("(),") in _NOT_IN_SUBJECT or (place == 1 and before in _PREPOSITIONS):
            return None
        if word[1:] != word[1:].lower():  # HAS, CAN: abbreviations
            continue
        word = word.lower()
        if word in _MOVED or word == "cannot" or word in _HAVE or word in _FAIL:
            return None if before in _NOT_BEFORE_VERB or before.endswith(",") else place
        if word not in _BASE_FORMS and word not in _PLURAL_VERBS:
            continue
        if before in _NOT_BEFORE_VERB or before.endswith((",", "'s", "’s")):
            continue
        if word in _AMBIGUOUS and (after in _PREPOSITIONS or words[place + 1].lower().endswith(",")):
            continue
        if word in _PLURAL_VERBS and not _is_plural(words[:place]):
            continue
        return place
    return None


def _is_plural(subject: list[str]) -> bool:
    """Whether a subject takes a verb without -s: a plural before the verb or before a preposition, or two nouns."""
    words = [word for word in subject if not word.endswith("ly")]
    heads = [
        place for place, word in enumerate(words) if word.lower() in ("of", "in", "with", "for", "from", "on", "to")
    ]
    head = words[heads[0] - 1] if heads and heads[0] > 0 else (words[-1] if words else "")
    return "and" in words or bool(
        re.search(r"([^sui]s|ae|ria|cells|data)\)?$|^(?:men|women|children|mice|people)$", head.lower())
    )


def _in_base_form(words: list[str], place: int) -> str:
    """The word, without -s if it is a second verb: "reduces pain and improves sleep"."""
    word, before = words[place], words[place - 1]
    if before.endswith("ly") and place > 1:
        before = words[place - 2]
    return _BASE_FORMS.get(word, word) if before in ("and", "or", "but") or before.endswith(",") else word


def _lower(text: str, context: str) -> str:
    """Lower the first word, and all words of a title in title case, that the context has in lower case."""
    words = text.split()
    capitals = [word[:1].isupper() for word in words[1:] if len(word) > 3]
    title_case = len(capitals) > 2 and sum(capitals) > len(capitals) / 2
    known = set(re.findall(r"[a-z][\w-]*", context)) | _COMMON
    for place, word in enumerate(words if title_case else words[:1]):
        letters = word.strip("(),")
        if letters[1:] == letters[1:].lower() and letters.lower() in known:
            words[place] = word.lower()
    return " ".join(words)


_COMMON = frozenset(_words("a an the of in on with by for from at as and or to after during no not between is are"))
