"""Train one model, or run a pipeline of models: `python train.py [task=... overrides]`. See README.md."""

from saferlhf.cli import train

if __name__ == "__main__":
    train()
