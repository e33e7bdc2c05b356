"""The tokens that Meditron adds to Llama-2's vocabulary, in their fixed order (Chen et al. 2023, arXiv 2311.16079)."""

from __future__ import annotations

CORPUS_TOKENS = (
    *("[bib_ref]", "[/bib_ref]", "[fig_ref]", "[/fig_ref]", "[bib]", "[/bib]"),
    *("[fig]", "[/fig]", "[table]", "[/table]", "[formula]", "[/formula]"),
)
"""What the corpus builder writes into papers: 32,000 pieces become 32,012."""

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
"""ChatML's message borders, behind the corpus tokens: 32,014."""

TOKEN_SETS = {"gap_replay": CORPUS_TOKENS, "chatml": CHAT_TOKENS}
"""Names for the command line."""
