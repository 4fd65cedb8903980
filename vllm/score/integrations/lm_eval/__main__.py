"""lm-eval's command, with the model `vllm-score` registered."""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
