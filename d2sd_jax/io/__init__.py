"""Files in and out: GGUF targets, drafter checkpoints, tokenizers, caches.

Nothing is imported here, so that a module's own dependencies load on use.
"""
