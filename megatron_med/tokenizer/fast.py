"""A SentencePiece model as ``tokenizer.json``. transformers makes one itself, but ranks merges by id instead of score,
and so gives other ids to runs of spaces."""

from __future__ import annotations

from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as _proto
from tokenizers import decoders, models, pre_tokenizers, processors

from megatron_med.tokenizer.load import SentencePieceTokenizer

_SPACE = "\u2581"


def fast_tokenizer(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer | None:
    """The same tokenizer for the ``tokenizers`` library; None where the model is no BPE with bytes for what it does
    not know and text as it is (Llama and Mistral are)."""
    model: Any = _proto.ModelProto.FromString(  # type: ignore[attr-defined]
        tokenizer.files[0].read_bytes()
    )
    trained, normal = model.trainer_spec, model.normalizer_spec
    is_known = trained.model_type == trained.BPE and trained.byte_fallback and normal.add_dummy_prefix
    if not is_known or normal.precompiled_charsmap or normal.remove_extra_whitespaces:
        return None
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    unknown = model.pieces[trained.unk_id].piece
    fast = tokenizers.Tokenizer(
        models.BPE(vocabulary, _merges(model, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    fast.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    fast.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [unknown, *(piece.piece for piece in model.pieces if piece.type == piece.CONTROL)]
    special = [*control, *tokenizer.added_tokens]
    fast.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in special])
    if tokenizer.bos_id is not None:
        begin = model.pieces[tokenizer.bos_id].piece
        fast.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, tokenizer.bos_id)]
        )
    return fast


def _merges(model: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair that makes a piece, the best score first; of equal scores the longer one first."""
    found = []
    for piece in model.pieces:
        if piece.type not in (piece.NORMAL, piece.USER_DEFINED):
            continue
        text = piece.piece
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(-piece.score, -len(left), -len(right), left, right) for left, right in known]
    found.sort(key=lambda entry: entry[:3])
    return [(left, right) for *_, left, right in found]
