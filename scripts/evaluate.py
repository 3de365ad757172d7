"""Measure the bits per byte of a model: python scripts/evaluate.py --model runs/NAME/best --data corpus/validation"""

from command_line import run
from healthslm.evaluation.evaluate import EvaluationOptions, evaluate

if __name__ == "__main__":
    run(evaluate, EvaluationOptions)
