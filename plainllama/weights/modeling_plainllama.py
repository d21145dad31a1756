"""plainllama's model behind transformers' interface: `export.py --code` puts it into the folder.

Without --code an export opens as transformers' LlamaForCausalLM, which needs no code of ours.
"""

import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import LLaMA, ModelConfig  # export.py --code puts both into one folder


class PlainLlamaConfig(PretrainedConfig):
    """LlamaForCausalLM's keys, which tools read, and `plainllama`, the fields of ModelConfig."""

    model_type = "plainllama"
    max_position_embeddings: int = 0  # must be there before transformers 5 reads llama3's RoPE


class PlainLlamaForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with the calls that transformers, lm-eval and Trainer make."""

    core: LLaMA
    config_class = PlainLlamaConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PlainLlamaConfig):
        super().__init__(config)
        core = LLaMA(ModelConfig(**config.plainllama))
        self.__dict__["core"] = core  # not a submodule: its parts are, under the checkpoint's names
        self.model, self.lm_head = core.model, core.lm_head
        self.post_init()

    def _init_weights(self, module) -> None:
        """All weights come from the checkpoint."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                labels: Tensor | None = None, **_) -> CausalLMOutput:
        """Ids (B, T) -> logits (B, T, V) and, with labels (B, T), the mean loss in nats of each
        label after the first. Padding stands on the right, where no real token sees it."""
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("pad on the right (padding_side='right') or export without --code")
        if self.core.rope_cos.device != input_ids.device:  # not a buffer of this module: moved here
            self.core.reset_derived(input_ids.device)
        self.core.compute_dtype = self.model.embed_tokens.weight.dtype
        logits = self.core(input_ids)
        loss = None if labels is None else F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # type: ignore[override]  # in 5 with more names than in 4
            self, input_ids: Tensor, **more) -> dict:
        """The whole text at every token: there is no cache here."""
        return {"input_ids": input_ids, "attention_mask": more.get("attention_mask")}
