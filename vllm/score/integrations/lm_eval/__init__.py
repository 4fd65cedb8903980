"""Score mode as a model of lm-eval: `lm_eval --model vllm-score --model_args pretrained=...`.

Installed beside lm-eval, the model is known by itself (see `vllm_score_lm_eval`). Importing this
package registers it too, and `python -m vllm.score.integrations.lm_eval` is lm-eval's command
with the model registered, wherever that way is switched off.
"""

from vllm.score.integrations.lm_eval.model import VLLMScoreLM
from vllm_score_lm_eval import register

__all__ = ["VLLMScoreLM"]

register()
