"""Tasks of ours for lm-evaluation-harness. `python -m healthslm.evaluation.lm_eval_tasks` prints their folder, which is
the value for the harness's `--include_path`."""

from pathlib import Path

FOLDER = Path(__file__).parent
