"""The miniature's `CLIPTokenizer`: byte-pair merges that make every word of the world one token, and letters for all other ASCII text."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from rlstitch.shapes.prompts import BACKGROUNDS, NUMBERS, TEMPLATES
from rlstitch.shapes.scenes import COLOURS, RELATIONS, SHAPES

MAX_LENGTH = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build(folder: Path) -> CLIPTokenizer:
    """Write a CLIP tokenizer to `folder`. Its end token has the largest id (never 2, which transformers' CLIP takes for a legacy case)."""
    text = " ".join(
        [
            *SHAPES,
            *(s + ("es" if s == "cross" else "s") for s in SHAPES),
            *COLOURS,
            *RELATIONS,
            *NUMBERS.values(),
            *TEMPLATES,
            *BACKGROUNDS,
            "an and ,",
        ]
    )
    words = sorted({w for w in text.replace("{}", " ").split()})
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", initial_alphabet=[], show_progress=False)
    tokenizer.train_from_iterator(words * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    letters = [c for c in string.ascii_lowercase + string.digits + string.punctuation]
    vocab: dict[str, int] = {}
    for token in [*letters, *(c + "</w>" for c in letters), *sorted(model["vocab"], key=model["vocab"].get), BOS, EOS]:
        vocab.setdefault(token, len(vocab))
    folder.mkdir(parents=True, exist_ok=True)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    clip = CLIPTokenizer(
        vocab=vocab, merges=merges, bos_token=BOS, eos_token=EOS, pad_token=EOS, unk_token=EOS, model_max_length=MAX_LENGTH
    )
    clip.save_pretrained(folder)
    return clip
