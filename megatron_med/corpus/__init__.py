"""GAP-Replay: raw papers, abstracts, guidelines and replay text to clean, deduplicated, split JSONL."""
