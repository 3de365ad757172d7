"""Options of the evaluations. They import nothing heavy, so that `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from healthslm.options import CheckedOptions, Device, OptionError, PositiveInt, Precision, Range


@dataclass
class EvaluationOptions(CheckedOptions):
    """Options of `evaluate`."""

    model: str
    """Folder or Hub name of a causal language model, with its tokenizer."""
    data: list[str]
    """Parquet or JSON Lines files with columns `title` and `text`, or folders or glob patterns of such files."""
    output: Path | None = None
    """JSON file to write the results to."""
    documents: Annotated[int | None, Range(at_least=1)] = None
    """Number of documents to evaluate on, from the first one. By default all."""
    context: Annotated[int | None, Range(at_least=1)] = None
    """Maximum window in tokens. By default the model's context."""
    batch_tokens: Annotated[int | None, Range(at_least=1)] = field(default=None, metadata={"memory": True})
    """Tokens of a forward pass. It changes memory and speed but not the result. By default 1,024 on a CPU and 8,192 on
    a GPU."""
    device: Device = "auto"
    """Device to run on. `auto` uses a GPU if there is one."""


@dataclass
class QuantizationOptions(CheckedOptions):
    """Options of `quantize`."""

    model: str
    """Folder or Hub name of a causal language model that is not quantized, with its tokenizer."""
    precisions: list[Precision] = field(default_factory=list)
    """Precisions to compare or to save. By default all that the installed libraries can open. A comparison includes
    fp32, the baseline, in any case."""
    data: list[str] = field(default_factory=list)
    """Compare the precisions on these Parquet or JSON Lines files with columns `title` and `text`, or folders or glob
    patterns of such files."""
    documents: Annotated[int | None, Range(at_least=1)] = None
    """Number of documents to compare on, from the first one. By default all."""
    output: Path | None = None
    """JSON file to write the comparison to."""
    save: Path | None = None
    """New folder to save the model to, in the one precision that `precisions` names."""
    device: Device = "auto"
    """Device to run on. `auto` uses a GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save is not None and len(self.precisions) != 1:
            raise OptionError("save", "needs one precision, such as --precisions nf4")
        if not self.data:
            if self.save is None:
                raise OptionError("data", "is needed to compare precisions; or save one with --save")
            for name in ("documents", "output"):
                if getattr(self, name) is not None:
                    raise OptionError(name, "needs --data")


@dataclass
class FetchOptions:
    """Options of `fetch_evaluation_set`."""

    ids: Path
    """The published file, such as results/pubmed_ids.json."""
    output: Path
    """Folder to write to: documents.parquet, which evaluate.py reads, report.json, and NCBI's responses in xml/."""
    email: str | None = None
    """Your e-mail address. NCBI asks for one to contact users before it blocks them."""
    base_url: str = "https://eutils.ncbi.nlm.nih.gov/entrez/eutils/"
    """URL of the E-utilities."""


@dataclass(kw_only=True)
class EvaluationData(CheckedOptions):
    """Data and baselines of an evaluation."""

    corpus: Path
    """Folder of the corpus that the model was trained on, as written by `build_corpus.py`."""
    tokens: Path
    """Folder of the tokenized corpus, as written by `tokenize_corpus.py`."""
    held_out: Path
    """File of held-out abstracts, with columns `title` and `text`."""
    pubmedqa: Path
    """JSON Lines file with PubMedQA's test questions."""
    baselines: dict[str, str] = field(default_factory=dict)
    """Other models to compare with: display names and their folders or Hub names."""
    finetuned: dict[str, list[Path]] = field(default_factory=dict)
    """Results of models that were fine-tuned from this one: display names, and the files with the metrics of one or
    more runs, which differ in their seeds."""
    documents: PositiveInt = 500
    """Number of documents to generate, of titles to generate, and of abstracts to test for memorization and to compare
    precisions on. Twice as many documents are tested for verbatim continuations."""
    device: Device = "auto"
    """Device to run on. `auto` uses a GPU if there is one."""


@dataclass(kw_only=True)
class ReleaseEvaluationOptions(EvaluationData):
    """Options of `evaluate_release`."""

    model: str
    """Folder or Hub name of the model, with its tokenizer."""
    output: Path
    """Folder to write the results to."""
    training: Path | None = None
    """Folder of the training run, with config.yaml and metrics.jsonl. Memorization is then tested on documents that the
    run has read. By default, it is tested on all training documents."""
    only: list[str] = field(default_factory=list)
    """Names of the metrics to compute. By default all."""
    keep: bool = False
    """Keep results in the output folder that are up to date: same model, same data, same version of the metric."""
