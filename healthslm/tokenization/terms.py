"""Finding words and four classes of biomedical terms in English text, by published naming rules.

The rules favor precision over recall: they miss some terms, but rarely match another word.

- drugs: common stems of international nonproprietary names, such as "-sartan" or "-tinib" (WHO, Use of stems in the
  selection of INN for pharmaceutical substances, 2018);
- genes and their proteins: symbols of three to five capitals and a number (Bruford et al., Guidelines for human gene
  nomenclature, Nature Genetics 52, 2020), shorter or hyphenated symbols of a few families ("CD4", "IL-6"), and proteins
  named after their mass ("p53");
- diseases: Greek endings of disorders, such as "-itis" or "-aemia";
- numbers: integers and decimals such as "1,000" or "0.05" that are not part of a name.

Words are the longest runs of letters and digits.
"""

import re

import numpy as np

Spans = dict[str, np.ndarray]

DRUG_STEMS = """
    afil apine azepam barbital bactam caine ciclib cillin citabine conazole coxib curium curonium cycline dipine
    dronate fibrate flurane formin gabalin gatran gliflozin gliptin glitazone grastim grel lisib lukast mab micin
    mycin nib nidazole olol oxacin oxetine parib parin penem peridol peridone platin prazole pril prilat profen
    quine racetam relin rubicin sartan semide setron taxel tecan thiazide trexate triptan triptyline vastatin vir
    vudine xaban zolam zomib
"""
NOT_DRUGS = "april ghrelin metavir mongrel"

GENE_FAMILIES = """
    BCL BMP CCL CCR CD CDK COX CXCL CXCR FGF GLP HER HIF HSP IGF IL MCP MMP PARP PD STAT TIMP TLR TP VEGFR
"""
# Viruses and FEV1 end in V, gases and anions in O and a digit; prostaglandins, thromboxanes, leukotrienes and
# aflatoxins look like genes; the others are diseases, cell lines, scales, drug codes and units.
NOT_GENES = r"""
    [A-Z]+V\d [A-Z]*[ACINPV]O[234] PG[A-Z]\d TX[AB]\d LT[A-E]\d AFB\d COVID SARS CVA SNB ICD DSM PHQ GAD7 DASS SPSS
    BAY AUC TCID IVS
"""

DISEASE_ENDINGS = """
    algias? a?emias? itis oma omas omata osis path(?:y|ies) penias? urias? plegias? paresis plasias? iasis oedema edema
    rrho?ea megaly dystroph(?:y|ies) lepsy pno?ea iectasis
"""
NOT_DISEASES = r"""
    \w*gnosis kurtosis \w*optosis \w*mitosis \w*meiosis \w*osmosis \w*biosis \w*morphosis \w*hypnosis \w*anastomosis
    \w*zygosis aponeurosis \w*(?:endo|exo|phago|pino|trans)cytosis aromas? \w*stromas? stomas? stomata diplomas? chroma
    theobroma rhizoma zygoma \w+somas? \w+somata thomas hybridomas? oklahoma academia artemia bohemia endemia
    (?:eu|normo)?glyca?emia immitis \w*rhabditis (?:sym|em|tele|homo?eo|naturo|osteo|allo|anti)path(?:y|ies) nostalgia
    cardioplegia
"""


def _words_ending_in(endings: str, exceptions: str) -> re.Pattern[str]:
    """Match lower-case or capitalized words with at least two letters before one of the endings."""
    ending, exception = ("|".join(listed.split()) for listed in (endings, exceptions))
    return re.compile(rf"\b(?!(?i:{exception})\b)[A-Za-z][a-z]+(?:{ending})\b")


TERM_CLASSES = {
    "words": re.compile(r"[^\W_]+"),
    "drugs": _words_ending_in(f"(?:{'|'.join(DRUG_STEMS.split())})s?", NOT_DRUGS),
    "genes": re.compile(
        rf"(?<![\w-])(?:(?:{'|'.join(GENE_FAMILIES.split())})-?\d{{1,3}}|p[1-9]\d"
        rf"|(?!{'|'.join(NOT_GENES.split())})[A-Z]{{3,5}}\d{{1,2}}(?:[A-Z]\d{{0,2}})?)(?!\w)"
    ),
    "diseases": _words_ending_in(DISEASE_ENDINGS, NOT_DISEASES),
    "numbers": re.compile(r"(?<![\w.,·])(?<![^\W\d]-)(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![.,·]?\w)"),
}


def find_terms(text: str) -> Spans:
    """Find the terms of each class: shape (terms, 2), the start and the exclusive end of each in characters."""
    return {
        name: np.array([match.span() for match in pattern.finditer(text)], dtype=np.int64).reshape(-1, 2)
        for name, pattern in TERM_CLASSES.items()
    }
