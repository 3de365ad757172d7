"""Generate text with a model: python scripts/generate.py --model runs/NAME/best --prompt "Aspirin and the risk of" """

from command_line import run
from healthslm.generation import GenerationOptions, generate

if __name__ == "__main__":
    run(generate, GenerationOptions)
