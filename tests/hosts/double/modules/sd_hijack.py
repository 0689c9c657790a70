"""The host's hold on the loaded model: comments and infotext that the text encoder adds."""

from __future__ import annotations

from typing import Any


class _EmbeddingDatabase:
    word_embeddings: dict[str, Any] = {}
    skipped_embeddings: dict[str, Any] = {}

    def load_textual_inversion_embeddings(self, force_reload: bool = False) -> None:
        pass

    def find_embedding_at_position(self, tokens: list[int], offset: int) -> tuple[None, None]:
        return None, None


class StableDiffusionModelHijack:
    layers = None
    circular_enabled = False
    optimization_method = "sdp"

    def __init__(self) -> None:
        self.comments: list[str] = []
        self.extra_generation_params: dict[str, Any] = {}
        self.embedding_db = _EmbeddingDatabase()
        self.fixes: Any = None

    def clear_comments(self) -> None:
        self.comments = []
        self.extra_generation_params = {}

    def apply_circular(self, enable: bool) -> None:
        self.circular_enabled = bool(enable)

    def get_prompt_lengths(self, text: str) -> tuple[int, int]:
        from modules import shared

        encoder = shared.sd_model.cond_stage_model
        _, count = encoder.process_texts([text])
        return count, encoder.get_target_prompt_token_count(count)


model_hijack = StableDiffusionModelHijack()
