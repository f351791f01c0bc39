"""A bug of vLLM with every speculative method: `logprob_token_ids` ends the engine.

The rejection sampler returns such a request no log probabilities, and when another request of the batch asks for
`logprobs` it raises, which ends the engine and all its requests. vLLM refuses other parameters that its speculative
decoding cannot serve; where our method is chosen this one is refused in the same way.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm_specbranch.patching import Patch


def _refuse_logprob_token_ids(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        original(self, speculative_config)
        # Ours is the only speculative config with this field.
        if self.logprob_token_ids and getattr(speculative_config, "specbranch", None) is not None:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(
                "The logprob_token_ids sampling parameter is not yet supported with speculative decoding."
            )

    return _validate_spec_decode


PATCHES = (
    Patch(
        symbol="vllm.sampling_params:SamplingParams._validate_spec_decode",
        kind="wrap",
        process="frontend",
        why="With speculative decoding `logprob_token_ids` gives no log probabilities, and beside a request with"
        " `logprobs` it ends the engine: any client could.",
        remove_when="vLLM's rejection sampler serves or refuses `logprob_token_ids`.",
        fingerprints={"0.32.0": "2283724c4c43d009421e4438577593bbc550ffc00eb3faa872e4683cf607f070"},
        make=_refuse_logprob_token_ids,
    ),
)
