"""Measure a model's bits per byte: python scripts/evaluate.py --model runs/NAME/best --data corpus/validation"""

from command_line import run
from healthslm.evaluation.evaluate import EvaluationOptions, evaluate

if __name__ == "__main__":
    run(evaluate, EvaluationOptions)
