"""Train a model: python scripts/pretrain.py --recipe configs/healthslm-15m.yaml"""

from command_line import run
from healthslm.recipe import PretrainOptions
from healthslm.training import pretrain

if __name__ == "__main__":
    run(pretrain, PretrainOptions)
