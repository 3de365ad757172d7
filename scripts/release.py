"""Release the model of a training run: python scripts/release.py runs/NAME --recipe configs/evaluation.yaml"""

from command_line import run
from healthslm.release.release import ReleaseOptions, release

if __name__ == "__main__":
    run(release, ReleaseOptions)
