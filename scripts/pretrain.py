"""Train a model: python scripts/pretrain.py --recipe configs/healthslm-15m.yaml"""

from command_line import run
from healthslm.training.loop import pretrain
from healthslm.training.options import PretrainOptions

if __name__ == "__main__":
    run(pretrain, PretrainOptions)
