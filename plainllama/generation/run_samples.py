"""The text that a run draws at each evaluation: one prompt, the same draws every time."""

from pathlib import Path

from model import LLaMA
from plainllama.generation import generate
from plainllama.settings import Sampling, Settings, UserError
from plainllama.tokens.tokenizer import Tokenizer


class RunSamples:
    """Draws a text from a model in training. `why_none`: why there will be none, or ''."""

    def __init__(self, config: Settings, data: Path):
        self.config, self.why_none = config, ""
        self.wanted = config.sample_tokens > 0 and config.block_size > 1
        if not self.wanted:
            return
        try:
            self.tokenizer = Tokenizer.load(data)
        except ImportError:  # training itself does not need the library
            self.why_none = "there is no `tokenizers` package"
            return
        self.prompt = [self.tokenizer.bos_id, *self.tokenizer.encode(config.sample_prompt)]
        if len(self.prompt) >= config.block_size:
            raise UserError(f"sample_prompt has {len(self.prompt)} tokens, and the context of "
                            f"{config.block_size} must hold it and at least one more; shorten it")

    def draw(self, model: LLaMA) -> dict:
        """Draw a text: {prompt, completion, stop}."""
        seeds = [generate.row_seed(self.config.seed, 0)]
        [(stop, text, _)] = generate.complete(model, self.tokenizer, [self.prompt],
                                              self.config.sample_tokens, Sampling(), seeds, [])
        return {"prompt": self.config.sample_prompt, "completion": text, "stop": stop}
