"""Take every measure of a model: python scripts/evaluate_release.py --model . --corpus corpus --tokens tokens …"""

from command_line import run
from healthslm.evaluation.measures import ReleaseEvaluationOptions, evaluate_release

if __name__ == "__main__":
    run(evaluate_release, ReleaseEvaluationOptions)
