"""PubMedQA in two phases: artificial questions from the corpus, then cross-validation on the expert questions."""
