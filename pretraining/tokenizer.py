"""The tiny language model's tokenizer: byte-level BPE with Qwen's special tokens."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
# As in Qwen3 the tags are single tokens but not special ones: they stay in decoded text.
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
# Words (hyphens included) and numbers take their leading space, so that a key and its value are neighbours.
_WORDS = Regex(r" ?[\p{L}-]+| ?\p{N}+| ?[^\s\p{L}\p{N}-]+|\s+(?!\S)|\s+")
# Every line begins with a space, as in SentencePiece: a word is then one token wherever it stands, and looking a word
# up is looking its token up. With two tokens a word this model had learnt no look-up after four million tokens.
_SPACES = (normalizers.Replace("\n", "\n "), normalizers.Prepend(" "))


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train the tokenizer.

    Args:
        texts: the corpus.
        vocab_size: upper bound; the merges end when no pair of symbols occurs twice.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.normalizer = normalizers.Sequence(list(_SPACES))
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAG_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
