"""Folders as the hub gives them, in little: a tiny model beside its tokenizer."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

WORDS = "<s> <pad> </s> <unk> a good bad film Name # Instruction Response : .".split()


def saved(folder, model):
    """Write a tiny model beside a tokenizer that has neither a chat template nor a pad token."""
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def tiny_llama(folder):
    """Write a tiny Llama of the base kind."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=16,
    )  # fmt: skip
    return saved(folder, LlamaForCausalLM(config))


def tiny_roberta(folder):
    """Write a tiny RoBERTa."""
    config = RobertaConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=16, max_position_embeddings=40, type_vocab_size=1,
    )  # fmt: skip
    return saved(folder, RobertaModel(config))
