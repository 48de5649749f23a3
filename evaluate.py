"""Score a trained model: `python evaluate.py suite=preference model=LOCATOR`. See README.md."""

from saferlhf.cli import evaluate

if __name__ == "__main__":
    evaluate()
