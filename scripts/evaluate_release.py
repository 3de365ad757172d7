"""Run all evaluations of a model: python scripts/evaluate_release.py --recipe configs/evaluation.yaml --model . …"""

from command_line import run
from healthslm.evaluation.metrics import ReleaseEvaluationOptions, evaluate_release

if __name__ == "__main__":
    run(evaluate_release, ReleaseEvaluationOptions)
